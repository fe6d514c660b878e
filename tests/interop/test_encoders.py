"""MiniLM's own weights (the "minilm" data): sentence embeddings are transformers'."""

from __future__ import annotations

import os
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxtrain.interop.importing import load_pretrained
from jaxtrain.models.encoder_heads import sentence_embeddings
from jaxtrain.types import Tokens

pytestmark = pytest.mark.parity

SENTENCES = [
    "Hi.",
    "The cat sat on the mat.",
    "A cat is sitting on a rug.",
    "Interest rates were raised by a quarter of a point on Thursday.",
    "def add(a, b):\n    return a + b",
    "Die Hauptstadt von Frankreich ist Paris.",
    "Paris is the capital of France, a country in Western Europe.",
    "数学很有趣。",
    "Café naïve résumé — “quoted” … 🙂",
    "3.14159 * 2 ** 10 = 3216.99",
    "Antidisestablishmentarianism",
    "In the beginning God created the heaven and the earth. " * 12,
]


@pytest.fixture(scope="module")
def folder():
    root = Path(os.environ.get("JAXTRAIN_DATA") or Path.home() / ".cache" / "jaxtrain-data") / "minilm"
    found = sorted(root.rglob("model.safetensors"))
    if not found:
        pytest.skip(f"no MiniLM weights below {root} (set JAXTRAIN_DATA to the folder that holds 'minilm')")
    return found[0].parent


def test_sentence_embeddings_are_those_of_transformers(folder):
    torch = pytest.importorskip("torch", reason="parity needs torch (the 'parity' extra)")
    transformers = pytest.importorskip("transformers", reason="parity needs transformers (the 'parity' extra)")

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    read = tokenizer(SENTENCES, padding=True, return_tensors="np")
    ids, mask = read["input_ids"].astype(np.int32), read["attention_mask"].astype(np.int32)
    lengths = mask.sum(1)
    assert len(set(lengths)) >= 8 and lengths.min() < 6 and lengths.max() > 100

    with torch.no_grad():
        their_model = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
        out = their_model(**{name: torch.from_numpy(np.asarray(x)).long() for name, x in read.items()})
        hidden = out.last_hidden_state * torch.from_numpy(mask)[..., None]
        wanted = torch.nn.functional.normalize(hidden.sum(1) / torch.from_numpy(lengths)[:, None], dim=1).numpy()

    model, params, _ = load_pretrained(folder)
    tokens = Tokens(
        ids=ids,
        targets=ids,
        weights=mask.astype(np.float32),
        positions=np.arange(ids.shape[1], dtype=np.int32) * mask,
        segments=mask,
        types=read["token_type_ids"].astype(np.int32),
    )
    out_of_ours = jax.jit(model.apply)(params, tokens)
    found = np.asarray(sentence_embeddings(out_of_ours.hidden, mask))[:, 0]
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    cosine = np.sum(found.astype(np.float64) * wanted, axis=1)
    np.testing.assert_allclose(cosine, 1, atol=1e-5)
    # The cosine forgives small errors: so do not leave it at that.
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    np.testing.assert_allclose(out_of_ours.pooled[:, 0], out.pooler_output.numpy(), atol=1e-4)
    similar = found @ found.T
    assert similar[1, 2] > 0.5 > similar[1, 3]
