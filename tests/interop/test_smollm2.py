"""SmolLM2-135M-Instruct's own weights (the "smollm2" data): what it writes is what transformers writes with them."""

from __future__ import annotations

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.data.chat import chat_ids
from jaxtrain.generate.engine import Engine, sequence_keys
from jaxtrain.generate.sampling import Sampling
from jaxtrain.interop.exporting import export_params
from jaxtrain.interop.importing import load_pretrained
from jaxtrain.objectives.common import token_logps
from jaxtrain.types import Tokens

pytestmark = [pytest.mark.parity, pytest.mark.slow]
NEW = 64
QUESTIONS = (
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "How do I sort a list in Python?",
    "用中文说你好。",
    "Who are you?",
)
TEXTS = (
    "The capital of France is",
    "def fibonacci(n):\n",
    "Once upon a time, there was a little",
    "Water boils at a temperature of",
    "The three primary colours are",
)
# Written for this test, so in no corpus that anything was trained on.
HELD = (
    "On the second of March the ferry ran aground below the old lighthouse at Kell, and its eleven passengers walked "
    "ashore over the sandbank at low tide. Nobody was hurt. The captain, who had steered the same crossing for thirty "
    "years, said that the channel had moved by at least forty metres since the autumn storms, and that he had asked "
    "the harbour office twice for a new survey. A tug from the mainland is expected to pull the ship free on Sunday."
)


@pytest.fixture(scope="module")
def ours():
    root = Path(os.environ.get("JAXTRAIN_DATA") or Path.home() / ".cache" / "jaxtrain-data") / "smollm2"
    found = sorted(root.rglob("*.gguf"))
    if not found:
        pytest.skip(f"no SmolLM2 weights below {root} (set JAXTRAIN_DATA to the folder that holds 'smollm2')")
    pytest.importorskip("gguf", reason="reading GGUF needs the 'gguf' extra")
    return load_pretrained(found[0], max_positions=256)


@pytest.fixture(scope="module")
def theirs(ours, tmp_path_factory):
    """transformers with the same dequantised weights: those that we export."""
    pytest.importorskip("torch", reason="parity needs torch (the 'parity' extra)")
    transformers = pytest.importorskip("transformers", reason="parity needs transformers (the 'parity' extra)")
    folder = tmp_path_factory.mktemp("smollm2")
    model, params, tokenizer = ours
    export_params(model, params, folder, tokenizer=tokenizer)
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def test_greedy_text_is_that_of_transformers(ours, theirs):
    import torch

    model, params, tokenizer = ours
    prompts = [tokenizer.text_ids(text) for text in TEXTS]
    prompts += [chat_ids(tokenizer, [{"role": "user", "content": text}]) for text in QUESTIONS]
    engine = Engine(model, Sampling(temperature=0.0, stop_ids=tokenizer.stop_ids), slots=8)
    keys = sequence_keys(range(len(prompts)))
    written = engine.generate(engine.prepare(params), prompts, max_new_tokens=NEW, keys=keys)
    for prompt, found in zip(prompts, written, strict=True):
        read = torch.tensor([prompt])
        stops = list(tokenizer.stop_ids)
        whole = theirs.generate(read, max_new_tokens=NEW, do_sample=False, eos_token_id=stops, pad_token_id=stops[0])
        assert found.ids.tolist() == whole[0, len(prompt) :].tolist(), tokenizer.decode(prompt)
    assert "Paris" in tokenizer.decode(written[0].ids[:8])


def test_the_loss_on_held_text_is_that_of_transformers(ours, theirs):
    import torch

    model, params, tokenizer = ours
    ids = np.array([tokenizer.text_ids(HELD)], np.int32)
    ones = np.ones_like(ids)
    tokens = Tokens(
        ids=ids, targets=ids, weights=ones, positions=np.arange(ids.shape[1], dtype=np.int32)[None], segments=ones
    )
    logps = jax.jit(lambda p: token_logps(model.apply(p, tokens).logits[:, :-1], jnp.asarray(ids[:, 1:])))(params)
    with torch.no_grad():
        wanted = theirs(torch.from_numpy(ids).long(), labels=torch.from_numpy(ids).long()).loss
    loss = -float(jnp.mean(logps))
    assert 1.5 < loss < 5, "neither gibberish (about 10) nor known by heart"
    assert abs(loss - float(wanted)) < 1e-3
