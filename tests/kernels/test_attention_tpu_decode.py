"""Attention of few queries over a cache, as the TPU kernel computes it, interpreted, against the reference."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.kernels.attention import reference, tpu_decode
from jaxtrain.sharding import DEFAULT_RULES, MeshConfig, make_mesh

# B, N, K, T, S, H, V, softcap
CASES = {
    "one query": (2, 4, 2, 1, 300, 64, 64, 0.0),
    "two chunks and a rest, other values": (3, 8, 1, 1, 2500, 128, 64, 2.0),
    "more heads than a register": (1, 20, 1, 1, 130, 16, 16, 0.0),
    "few queries": (2, 4, 2, 5, 1300, 32, 32, 0.0),
    "more queries than a register": (1, 3, 3, 17, 200, 16, 48, 5.0),
}


def inputs(case: str):
    B, N, K, T, S, H, V, softcap = CASES[case]
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=s).astype(np.float32) for s in ((B, N, T, H), (B, K, S, H), (B, K, S, V))]
    visible = rng.random((B, T, S)) < 0.3
    # A query that sees nothing, and chunks in which nobody sees anything.
    visible[0, T // 2] = False
    visible[-1, :, :1100] &= S < 2000
    return arrays, visible, dict(scale=0.1, softcap=softcap)


@pytest.mark.parametrize("case", CASES)
def test_it_equals_the_reference(case):
    arrays, visible, options = inputs(case)
    found = tpu_decode.decode_attention(*arrays, visible, **options)
    wanted = reference.decode_attention(*arrays, visible, **options)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert np.all(np.asarray(found[0, :, visible.shape[1] // 2]) == 0)


def test_in_bfloat16_it_is_as_near_to_float32_as_the_reference():
    arrays, visible, options = inputs("few queries")
    wanted = reference.decode_attention(*arrays, visible, **options)
    half = [jnp.asarray(x, jnp.bfloat16) for x in arrays]
    errors = [
        np.sqrt(np.mean((np.asarray(f(*half, visible, **options), np.float32) - wanted) ** 2))
        for f in (tpu_decode.decode_attention, reference.decode_attention)
    ]
    assert errors[0] <= 1.05 * errors[1]


def test_slots_that_nobody_sees_may_hold_anything():
    (q, k, v), visible, options = inputs("two chunks and a rest, other values")
    wanted = tpu_decode.decode_attention(q, k, v, visible, **options)
    unseen = ~visible.any(axis=1)[:, None, :, None]
    found = tpu_decode.decode_attention(q, np.where(unseen, 1e9, k), np.where(unseen, 1e9, v), visible, **options)
    np.testing.assert_array_equal(found, wanted)


def test_every_device_takes_its_own_rows_and_heads():
    (q, k, v), visible, options = inputs("few queries")
    wanted = reference.decode_attention(q, k, v, visible, **options)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, tensor=2, context=2))):
        run = jax.jit(lambda *args: tpu_decode.on_mesh(*args, rules=DEFAULT_RULES, **options))
        np.testing.assert_allclose(run(q, k, v, visible), wanted, atol=1e-5)


def test_what_it_refuses():
    (q, k, v), *_ = inputs("few queries")
    assert "no multiple of 128" in tpu_decode.refusal(q, k, v, DEFAULT_RULES)
    wide = [np.zeros((*x.shape[:-1], 128), np.float32) for x in (q, k, v)]
    assert tpu_decode.refusal(*wide, DEFAULT_RULES) is None
    with jax.set_mesh(make_mesh(MeshConfig(tensor=8))):
        assert "unequal parts" in tpu_decode.refusal(*wide, DEFAULT_RULES)
