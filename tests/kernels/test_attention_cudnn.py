"""What surrounds cuDNN, with XLA in its place: lengths, masks, layouts, and which rows go where.

cuDNN itself needs a GPU, where ``benchmarks/attention_gpu.py --check`` compares it.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.kernels.attention import cudnn, reference
from jaxtrain.kernels.attention.masks import Spec, make_marks, visible


def setup(segments, k_segments=None, causal=True):
    """q, k, v of two heads to one, the spec and the marks; positions are indices."""
    k_segments = segments if k_segments is None else k_segments
    rng = np.random.default_rng(0)
    (B, T), S = np.shape(segments), np.shape(k_segments)[1]
    q, k, v = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((B, 4, T, 8), (B, 2, S, 8), (B, 2, S, 8)))
    positions = (jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32), (B, n)) for n in (T, S))
    segments, k_segments = (jnp.asarray(x, jnp.int32) for x in (segments, k_segments))
    marks, low, high = make_marks(*positions, segments, k_segments, causal=causal)
    return q, k, v, Spec(scale=0.4, low=low, high=high, in_order=causal), marks


@pytest.mark.parametrize("causal", [True, False])
def test_rows_of_one_document_match_the_reference_and_take_the_library(monkeypatch, causal):
    monkeypatch.setattr(cudnn, "_IMPLEMENTATION", "xla")
    monkeypatch.setattr(cudnn, "flash", lambda backend, spec, q, k, v, marks: (q * jnp.nan, None))
    segments = [[3] * 9, [1] * 5 + [0] * 4, [0] * 9]
    keys = None if causal else [[3] * 4 + [0] * 3, [1] * 7, [0] * 7]
    q, k, v, spec, marks = setup(segments, keys, causal)
    d_out = jnp.asarray(np.random.default_rng(1).normal(size=q.shape), jnp.float32)
    found, pull = jax.vjp(jax.jit(lambda *x: cudnn.attention(spec, *x, marks)), q, k, v)
    wanted, wanted_pull = jax.vjp(lambda *x: reference.attention(*x, visible(marks), scale=spec.scale)[0], q, k, v)
    for mine, theirs in zip((found, *pull(d_out)), (wanted, *wanted_pull(d_out)), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5)


@pytest.mark.parametrize(
    ("queries", "keys"),
    [
        ([[1, 1, 2, 2]], None),
        ([[1, 1, 1, 1], [0, 1, 1, 1]], None),
        ([[1, 0, 1, 1]], None),
        ([[1, 1, 1, 1]], [[2, 2, 2]]),
        ([[1, 1, 1, 1]], [[0, 0, 0]]),
        ([[0, 0, 0, 0]], [[2, 2, 2]]),
    ],
)
def test_other_rows_take_the_kernels(monkeypatch, queries, keys):
    monkeypatch.setattr(cudnn, "_IMPLEMENTATION", "xla")
    monkeypatch.setattr(cudnn, "flash", lambda backend, spec, q, k, v, marks: (q * 0 + 7, None))
    q, k, v, spec, marks = setup(queries, keys, causal=False)
    assert (cudnn.attention(spec, q, k, v, marks) == 7).all()


def test_refusals_give_the_reason():
    like = jax.ShapeDtypeStruct
    q = like((1, 2, 64, 128), jnp.bfloat16)
    spec = Spec(scale=1.0, in_order=True)
    assert "not on cpu" in cudnn.refusal(spec, q, q, q)
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA A100-SXM4-80GB", num_cores=None, platform="cuda")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("data",), abstract_device=device)):
        assert cudnn.refusal(spec, q, q, q) is None
        assert cudnn.refusal(dataclasses.replace(spec, high=False, in_order=False), q, q, q) is None
        for change, word in (
            ({"softcap": 2.0}, "soft cap"),
            ({"low": True}, "window"),
            ({"in_order": False}, "in_order"),
        ):
            assert word in cudnn.refusal(dataclasses.replace(spec, **change), q, q, q)
        wide, short = like((1, 2, 64, 256), jnp.bfloat16), like((1, 2, 32, 128), jnp.bfloat16)
        exact = like(q.shape, jnp.float32)
        assert "up to 128" in cudnn.refusal(spec, wide, wide, wide)
        assert "as many queries as keys" in cudnn.refusal(spec, short, q, q)
        assert "float32" in cudnn.refusal(spec, exact, exact, exact)
        assert "256" in cudnn.refusal(spec, q, q, wide)
