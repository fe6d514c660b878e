"""A small decoder, one with a window, and the completions' log-probabilities without a cache."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
import pytest

from jaxtrain.data.tokenizer import SentencePieceBPE
from jaxtrain.models import DecoderConfig, build_model
from jaxtrain.models.decoder_config import LayerSpec
from jaxtrain.models.layers import MLPSpec
from jaxtrain.objectives.common import token_logps
from jaxtrain.types import Tokens

V = 24
CONFIG = DecoderConfig(
    vocab_size=V,
    num_layers=2,
    d_model=32,
    num_heads=4,
    num_kv_heads=2,
    d_ff=48,
    max_positions=48,
    init_std=0.3,
)


@pytest.fixture(scope="session")
def model():
    return build_model(CONFIG)


@pytest.fixture(scope="session")
def params(model):
    return model.init(jax.random.key(0))


@pytest.fixture(scope="session")
def perturbed(params):
    """Parameters after an update of the weights."""
    return jax.tree.map(lambda x: x + 0.02 * jax.random.normal(jax.random.key(7), x.shape), params)


@pytest.fixture(scope="session")
def teacher_forced():
    """``score(model, params, prompts, completions, temperature)``: log-probabilities and logits of every completion's
    tokens, from one forward pass without a cache, padded on the right."""

    @functools.cache
    def compiled(model):
        @jax.jit
        def forward(params, tokens, temperature):
            logits = model.apply(params, tokens).logits
            return logits, token_logps(logits, tokens.targets, temperature)

        return forward

    def score(model, params, prompts, completions, temperature=1.0):
        rows = [[*prompt, *completion] for prompt, completion in zip(prompts, completions, strict=True)]
        width = model.config.max_positions
        ids = np.array([row + [0] * (width - len(row)) for row in rows], np.int32)
        lengths = np.array([len(row) for row in rows])
        steps = np.arange(width, dtype=np.int32)
        tokens = Tokens(
            ids=ids,
            targets=np.roll(ids, -1, axis=1),
            weights=np.zeros(ids.shape, np.float32),
            positions=np.tile(steps, (len(rows), 1)),
            segments=(steps < lengths[:, None]).astype(np.int32),
        )
        logits, logps = map(np.asarray, compiled(model)(params, tokens, temperature))
        actions = [slice(len(p) - 1, len(row) - 1) for p, row in zip(prompts, rows, strict=True)]
        return [(logps[i, where], logits[i, where]) for i, where in enumerate(actions)]

    return score


@dataclasses.dataclass(frozen=True, kw_only=True)
class WindowedConfig(DecoderConfig):
    """Layers that see six tokens between layers that see all."""

    window: int = 6

    def spec(self):
        mlp, norm = MLPSpec(d_ff=self.d_ff), self.norm()
        local, whole = (
            LayerSpec(attention=self.attention_spec(window=window), mlp=mlp, norm=norm) for window in (self.window, 0)
        )
        return dataclasses.replace(super().spec(), stacks={"layers": (local, whole) * (self.num_layers // 2)})


@pytest.fixture(scope="session")
def windowed():
    from jaxtrain.models.decoder import build_decoder

    return build_decoder(WindowedConfig(**{f.name: getattr(CONFIG, f.name) for f in dataclasses.fields(CONFIG)}))


class Letters:
    """One id a letter, from 1."""

    vocab_size = 27
    stop_ids = ()

    def encode(self, text: str) -> list[int]:
        return [ord(c) - ord("a") + 1 for c in text]

    def decode(self, ids) -> str:
        return "".join(chr(ord("a") + i - 1) if i else "_" for i in ids)

    def piece(self, i: int) -> str:
        return self.decode([i])


@pytest.fixture(scope="session")
def letters():
    return Letters()


@dataclasses.dataclass(frozen=True)
class Texts:
    documents_: tuple[str, ...]

    def documents(self, split):
        return iter(self.documents_)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """Our own, of 300 ids: most of what it writes are single bytes and syllables."""
    texts = (
        "The cat sat on the mat; the dog ate 中文 and naïve cafés \U0001f600.\n",
        "Grüße an alle, und alles Gute!\n",
    ) * 8
    return SentencePieceBPE(vocab_size=300, sources=(Texts(texts),)).train(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def chat_model(tokenizer):
    return build_model(dataclasses.replace(CONFIG, vocab_size=tokenizer.vocab_size + 4, max_positions=160))


@pytest.fixture(scope="session")
def chat_params(chat_model):
    return chat_model.init(jax.random.key(1))
