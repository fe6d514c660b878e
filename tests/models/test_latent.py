"""Latent attention: decoding in the latent's space against keys and values of every head."""

from __future__ import annotations

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.models import DeepseekV3Config, Rope, init_cache
from jaxtrain.models.cache import cache_bytes
from jaxtrain.models.functional import functionalize
from jaxtrain.models.rope import rope_tables
from jaxtrain.sharding import DEFAULT_RULES, Constrain

B, S = 3, 11  # rows, and slots of their caches
YARN = Rope(theta=100.0, scaling="yarn", factor=4.0, original_max_positions=8, mscale=0.7, mscale_all_dim=1.3)


def make(**changes):
    """(spec, the layer as a function, parameters)."""
    sizes = {"vocab_size": 24, "num_layers": 2, "d_model": 16, "num_heads": 5, "num_kv_heads": 5, "d_ff": 24}
    sizes |= {"max_positions": 32, "num_experts": 4, "top_k": 2, "expert_d_ff": 8, "latent_size": 6, "query_rank": 7}
    sizes |= {"plain_dim": 4, "rope_dim": 2, "value_dim": 3, "rope": YARN, "attention_bias": True}
    config = DeepseekV3Config(**sizes | changes)
    spec = config.layer_spec().attention
    layer = functionalize(lambda rngs: spec.build(config, rngs))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: (0.5 * rng.normal(size=x.shape)).astype(np.float32), layer.init(jax.random.key(0)))
    return config, spec, layer.call, params


def call(spec, layer, params, x, positions, segments, cache=None):
    return layer(
        params,
        x,
        ropes={spec.rope_table(): rope_tables(spec.rope, positions, spec.rope_dim)},
        positions=positions,
        segments=segments,
        constrain=Constrain(DEFAULT_RULES),
        cache=cache,
    )


@pytest.mark.parametrize("query_rank", [0, 7])
def test_decoding_equals_expanding(query_rank):
    """Five tokens at once, then four with slots that hold them, then one by one; one row is shorter."""
    _, spec, layer, params = make(query_rank=query_rank)
    x = np.random.default_rng(1).normal(size=(B, S, 16)).astype(np.float32)
    lengths = np.array([S, S, 7])
    positions = np.broadcast_to(np.arange(S), (B, S)).astype(np.int32)
    segments = (positions < lengths[:, None]).astype(np.int32)
    whole, nothing = call(spec, layer, params, x, positions, segments)
    assert nothing is None
    step = jax.jit(lambda *args: call(spec, layer, params, *args))

    entry = {name: jnp.zeros((B, *shape)) for name, shape in spec.cache_shapes(S).items()}
    read, found = jnp.zeros(B, jnp.int32), []
    for start, end in [(0, 5), (5, 9), *((i, i + 1) for i in range(9, S))]:
        part = (slice(None), slice(start, end))
        out, entry = step(x[part], positions[part], segments[part], (entry, read))
        read = read + jnp.sum(segments[part], axis=1)
        found.append(out)
    found = np.concatenate(found, axis=1)
    valid = segments > 0
    np.testing.assert_allclose(found[valid], whole[valid], atol=1e-5, rtol=1e-5)
    assert np.isfinite(found).all()


def test_decoding_expands_no_keys():
    """No array of the compiled step has slots and heads and a head's size; that of the other form has."""
    _, spec, layer, params = make()
    entry = {name: jnp.zeros((B, *shape)) for name, shape in spec.cache_shapes(S).items()}
    sizes = f"({spec.plain_dim}|{spec.plain_dim + spec.rope_dim}|{spec.value_dim})"
    expanded = re.compile(rf"\[{B},({S},5|5,{S}),{sizes}\]|\[{B * S},5,{sizes}\]|\[{B * S},{5 * 7}\]")

    def text(tokens, cache):
        x = jnp.ones((B, tokens, 16))
        positions, segments = (jnp.ones((B, tokens), jnp.int32) for _ in range(2))
        run = jax.jit(lambda x: call(spec, layer, params, x, positions, segments, cache)[0])
        return run.lower(x).as_text("hlo")

    assert not expanded.search(text(1, (entry, jnp.full(B, 4))))
    assert expanded.search(text(S, None))


def test_the_cache_is_latents():
    config, *_ = make()
    cache = init_cache(config, 2, 10)
    assert [{name: a.shape for name, a in layer.items()} for layer in cache.layers] == [
        {"latent": (2, 1, 10, 6), "rope_key": (2, 1, 10, 2)}
    ] * 2
    assert cache_bytes(cache.layers) == 2 * 2 * 10 * (6 + 2) * 4


@pytest.mark.parametrize("query_rank", [0, 7])
def test_flops_are_those_of_its_matrices_and_of_attention(query_rank):
    config, spec, _, params = make(query_rank=query_rank)
    matrices = sum(x.size for path, x in jax.tree_util.tree_leaves_with_path(params) if "kernel" in str(path))
    assert spec.flops_per_token(config.d_model, 9) == 2 * matrices + 2 * 5 * (4 + 2 + 3) * 5


def test_yarn_changes_the_scale_of_logits_and_of_the_rotation():
    _, spec, *_ = make()
    sharpness = [0.1 * a * math.log(4.0) + 1.0 for a in (0.7, 1.3)]
    assert spec.scale == pytest.approx(6**-0.5 * sharpness[1] ** 2)
    cos, sin = rope_tables(YARN, jnp.arange(4)[None], 2)
    np.testing.assert_allclose(cos**2 + sin**2, (sharpness[0] / sharpness[1]) ** 2, rtol=1e-5)
    plain = dataclasses.replace(YARN, mscale=0.0, mscale_all_dim=0.0)
    assert plain.logit_scale() == 1.0
    with pytest.raises(ValueError, match=r"belong to Rope\.scaling 'yarn'"):
        Rope(mscale=1.0)
