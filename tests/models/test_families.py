"""What a family's config means: published sizes give published counts, and what is no such model is refused."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from jaxtrain.models import (
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Qwen2Config,
    Qwen3Config,
    Rope,
    build_model,
)
from jaxtrain.models.flops import forward_flops_per_token, seen_keys
from jaxtrain.types import Tokens

SMALL = {"vocab_size": 19, "num_layers": 4, "d_model": 16, "num_heads": 4, "num_kv_heads": 4, "d_ff": 24}
SMALL |= {"max_positions": 32}


def sizes(vocab_size, num_layers, d_model, num_heads, num_kv_heads, d_ff, **more):
    names = ("vocab_size", "num_layers", "d_model", "num_heads", "num_kv_heads", "d_ff")
    values = (vocab_size, num_layers, d_model, num_heads, num_kv_heads, d_ff)
    return {"max_positions": 1024} | dict(zip(names, values, strict=True)) | more


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (GPT2Config(**sizes(50257, 12, 768, 12, 12, 3072)), 124_439_808),
        (LlamaConfig(**sizes(128256, 32, 4096, 32, 8, 14336, tie_embeddings=False)), 8_030_261_248),
        (LlamaConfig(**sizes(49152, 30, 576, 9, 3, 1536)), 134_515_008),
        (MistralConfig(**sizes(32000, 32, 4096, 32, 8, 14336, tie_embeddings=False, window=4096)), 7_241_732_096),
        (Qwen2Config(**sizes(151936, 24, 896, 14, 2, 4864)), 494_032_768),
        (Qwen3Config(**sizes(151936, 28, 1024, 16, 8, 3072, head_dim=128)), 596_049_920),
        (Olmo2Config(**sizes(100352, 32, 4096, 32, 32, 11008, tie_embeddings=False)), 7_298_617_344),
    ],
    ids=["GPT-2", "Llama 3.1 8B", "SmolLM2 135M", "Mistral 7B", "Qwen2 0.5B", "Qwen3 0.6B", "OLMo 2 7B"],
)
def test_published_sizes_give_published_counts(config, count):
    assert build_model(config).num_params() == count


def test_windows_stand_where_the_config_says():
    def windows(config):
        return [layer.attention.window for layer in config.spec().layers()]

    assert windows(MistralConfig(**SMALL, window=5)) == [5, 5, 5, 5]
    assert windows(MistralConfig(**SMALL)) == [0, 0, 0, 0]
    assert windows(Qwen2Config(**SMALL, window=5, full_layers=3)) == [0, 0, 0, 5]
    assert windows(Qwen3Config(**SMALL, window=5)) == [5, 5, 5, 5]


def test_biases_and_norms_are_where_the_family_has_them():
    def names(config):
        tree = build_model(config).shapes()["layers"]
        found = {name for name, part in tree["attention"].items() if "bias" in part}
        return found, set(tree) - {"attention", "mlp"}, {name for name in tree["attention"] if name.endswith("_norm")}

    every = {"query", "key", "value", "out"}
    pre, post = {"attention_norm", "mlp_norm"}, {"attention_post_norm", "mlp_post_norm"}
    qk = {"query_norm", "key_norm"}
    assert names(LlamaConfig(**SMALL)) == (set(), pre, set())
    assert names(LlamaConfig(**SMALL, attention_bias=True)) == (every, pre, set())
    assert names(GPT2Config(**SMALL)) == (every, pre, set())
    assert names(Qwen2Config(**SMALL)) == (every - {"out"}, pre, set())
    assert names(Qwen3Config(**SMALL)) == (set(), pre, qk)
    assert names(Qwen3Config(**SMALL, attention_bias=True)) == (every, pre, qk)
    assert names(Olmo2Config(**SMALL)) == (set(), post, qk)
    shapes = build_model(Olmo2Config(**SMALL | {"num_kv_heads": 2})).shapes()["layers"]["attention"]
    assert shapes["query_norm"]["scale"].shape == (4, 16) and shapes["key_norm"]["scale"].shape == (4, 8)


def test_gpt2_knows_positions_from_its_table_alone():
    """Without the table's differences, a text of equal tokens reads the same everywhere."""
    model = build_model(GPT2Config(**SMALL))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), model.shapes())
    assert params["position_embed"]["embedding"].shape == (32, 16)
    params["position_embed"]["embedding"][:] = params["position_embed"]["embedding"][0]
    row = np.arange(6, dtype=np.int32)[None]
    same = np.full_like(row, 7)
    tokens = {"ids": same, "targets": same, "weights": same * 1.0, "positions": row, "segments": np.ones_like(row)}
    logits = model.apply(params, Tokens(**tokens)).logits
    np.testing.assert_allclose(logits, np.broadcast_to(logits[:, :1], logits.shape), atol=1e-4)


def test_flops_count_windows_and_gates():
    D, N, H, F, T = 16, 4, 4, 24, 12
    projections, head = 2 * D * H * 4 * N, 2 * D * 19
    score = 4 * N * H
    gated, plain = 2 * 3 * D * F, 2 * 2 * D * F
    full, near = seen_keys(T), seen_keys(T, 5)
    assert full == 6.5 and near == pytest.approx((1 + 2 + 3 + 4 + 5 * 8) / 12)
    assert forward_flops_per_token(GPT2Config(**SMALL), T) == 4 * (projections + score * full + plain) + head
    found = forward_flops_per_token(Qwen2Config(**SMALL, window=5, full_layers=1), T)
    assert found == pytest.approx(4 * (projections + gated) + score * (full + 3 * near) + head)


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (GPT2Config, {"num_kv_heads": 2}, "num_kv_heads=2, but GPT-2 has none of that: leave it at 4"),
        (GPT2Config, {"rope": Rope(theta=5.0)}, "rope=Rope"),
        (GPT2Config, {"qk_norm": True}, "qk_norm=True, but GPT-2 has none"),
        (GPT2Config, {"activation": "mish"}, "activation='mish'; one of"),
        (MistralConfig, {"window": -1}, "window=-1 must be at least 1, or 0 for none"),
        (Qwen2Config, {"window": -1}, "window=-1 must be at least 1, or 0 for none"),
        (Qwen2Config, {"window": 3, "full_layers": 4}, "full_layers=4 are those before"),
        (Qwen3Config, {"full_layers": 1}, "full_layers=1 are those before .* and 0 where window is 0"),
        (Olmo2Config, {"qk_norm": False}, "qk_norm=False, but OLMo 2 always"),
    ],
    ids=str,
)
def test_what_is_no_such_model_is_refused(config, changes, message):
    with pytest.raises(ValueError, match=message):
        config(**SMALL | changes)
