"""Blocked attention against the definition in value and gradient, and in bfloat16 against float64."""

from __future__ import annotations

import dataclasses
import itertools
import random
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxtrain.kernels.attention import api, blocked, reference
from jaxtrain.kernels.attention.extents import key_extents, may_meet, query_extents
from jaxtrain.kernels.attention.flash import flash
from jaxtrain.kernels.attention.masks import Spec, make_marks, visible

# It is compiling that takes time.
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several of them in short rows, and not square."""
    monkeypatch.setattr(blocked, "QUERIES", 4)
    monkeypatch.setattr(blocked, "KEYS", 3)


@dataclasses.dataclass(frozen=True)
class Case:
    mask: str  # what may be seen within a segment
    rows: str  # what segments there are
    T: int
    S: int
    K: int
    G: int
    V: int
    softcap: float


VALUES = {
    "mask": ("causal", "bidirectional", "prefix", "window", "two-sided window", "prefix and window"),
    "rows": ("one", "packed", "padded", "shuffled", "blind"),
    "lengths": ((11, 11), (12, 12), (1, 7), (5, 13), (13, 5)),
    "heads": ((1, 1), (2, 1), (1, 3), (2, 2)),
    "V": (6, 2, 9),
    "softcap": (0.0, 0.8),
}


def cases(count: int) -> list[Case]:
    """Of all combinations, some in which every two values of different fields meet as often as not."""
    every = list(itertools.product(*VALUES.values()))
    picked = random.Random(0).sample(every, count)
    return [Case(mask, rows, *lengths, *heads, V, softcap) for mask, rows, lengths, heads, V, softcap in picked]


def make(case: Case, seed: int = 0, dtype=np.float32, B: int = 2, H: int = 6):
    """(spec, (q, k, v), marks)."""
    rng = np.random.default_rng(seed)
    length = max(case.T, case.S)
    segments = np.ones((B, length), np.int32)
    if case.rows != "one":
        segments = np.sort(rng.integers(1, 4, (B, length)), axis=1).astype(np.int32)
    if case.rows == "padded":
        segments[0, -length // 3 :], segments[1, : length // 4] = 0, 0
    starts = np.array([[np.argmax(row == s) for s in row] for row in segments])
    positions = (np.arange(length) - starts).astype(np.int32)
    if case.rows == "shuffled":
        order = rng.permutation(length)
        segments, positions = segments[:, order], positions[:, order]
    q_segments, q_positions = segments[:, length - case.T :].copy(), positions[:, length - case.T :]
    if case.rows == "blind":
        q_segments[0], q_segments[1, 0] = 9, 0
    causal = case.mask in ("causal", "prefix", "window", "prefix and window")
    marks, low, high = make_marks(
        *(jnp.asarray(x) for x in (q_positions, positions[:, : case.S], q_segments, segments[:, : case.S])),
        causal=causal,
        window=3 if "window" in case.mask else 0,
        q_prefix=jnp.asarray(rng.integers(0, 5, (B, case.T))) if "prefix" in case.mask else None,
    )
    shapes = ((B, case.K * case.G, case.T, H), (B, case.K, case.S, H), (B, case.K, case.S, case.V))
    arrays = tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)
    return Spec(scale=0.4, softcap=case.softcap, low=low, high=high), arrays, marks


def by_reference(spec, q, k, v, marks):
    return reference.attention(q, k, v, visible(marks), scale=spec.scale, softcap=spec.softcap)


def results(function, spec, arrays, marks):
    """out, lse, dq, dk, dv for random gradients of both results."""
    shape = (*arrays[0].shape[:-1], arrays[2].shape[-1])
    rng = np.random.default_rng(7)
    d_out, d_lse = jnp.asarray(rng.normal(size=shape), arrays[0].dtype), rng.normal(size=shape[:-1]).astype(np.float32)

    @jit
    def run(arrays, marks):
        (out, lse), pull = jax.vjp(lambda *qkv: function(spec, *qkv, marks), *arrays)
        return out, lse, *pull((d_out, jnp.where(jnp.isneginf(lse), 0.0, d_lse)))

    return run(arrays, marks)


def by_hand(spec, arrays, marks):
    """The same in float64, from the formulas at the head of flash.py."""
    q, k, v = (np.asarray(x, np.float64) for x in arrays)
    G = q.shape[1] // k.shape[1]
    rng = np.random.default_rng(7)
    d_out = np.asarray(jnp.asarray(rng.normal(size=(*q.shape[:-1], v.shape[-1])), arrays[0].dtype), np.float64)
    d_lse = rng.normal(size=q.shape[:-1])
    mask = np.asarray(visible(marks))[:, None]
    k, v = (np.repeat(x, G, axis=1) for x in (k, v))
    logits = spec.scale * q @ k.swapaxes(-1, -2)
    slope = np.ones_like(logits)
    if spec.softcap:
        slope = 1 - np.tanh(logits / spec.softcap) ** 2
        logits = spec.softcap * np.tanh(logits / spec.softcap)
    weights = np.where(mask, np.exp(logits), 0)
    total = weights.sum(-1, keepdims=True)
    p = weights / np.where(total > 0, total, 1)
    out = p @ v
    with np.errstate(divide="ignore"):
        lse = np.log(total[..., 0])
    delta = (out * d_out).sum(-1) - d_lse * (total[..., 0] > 0)
    ds = p * (d_out @ v.swapaxes(-1, -2) - delta[..., None]) * slope * spec.scale

    def grouped(x):
        return x.reshape(x.shape[0], -1, G, *x.shape[2:]).sum(2)

    dk, dv = grouped(ds.swapaxes(-1, -2) @ q), grouped(p.swapaxes(-1, -2) @ d_out)
    return out, lse, ds @ k, dk, dv


def check(found, wanted, atol=1e-5):
    for name, x, y in zip(("out", "lse", "dq", "dk", "dv"), found, wanted, strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype
        np.testing.assert_allclose(x, y, atol=atol, rtol=atol, err_msg=name)


@pytest.mark.parametrize("case", cases(26), ids=lambda case: "-".join(map(str, dataclasses.astuple(case))))
def test_matches_the_definition(case):
    spec, arrays, marks = make(case)
    check(results(partial(flash, blocked), spec, arrays, marks), results(by_reference, spec, arrays, marks))


def test_the_cases_meet_every_value():
    for field in ("mask", "rows", "V", "softcap"):
        assert {getattr(case, field) for case in cases(26)} == set(VALUES[field])
    assert {(case.T, case.S) for case in cases(26)} == set(VALUES["lengths"])
    assert {(case.K, case.G) for case in cases(26)} == set(VALUES["heads"])


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    case=st.builds(
        Case,
        mask=st.sampled_from(VALUES["mask"]),
        rows=st.sampled_from(VALUES["rows"]),
        T=st.integers(1, 17),
        S=st.integers(1, 17),
        K=st.integers(1, 3),
        G=st.integers(1, 3),
        V=st.integers(1, 5),
        softcap=st.sampled_from((0.0, 1.3)),
    ),
    seed=st.integers(0, 2**16),
)
def test_matches_the_definition_at_any_shape(case, seed):
    spec, arrays, marks = make(case, seed)
    check(results(partial(flash, blocked), spec, arrays, marks), results(by_reference, spec, arrays, marks))


@pytest.mark.parametrize("softcap", [0.0, 0.8])
def test_bfloat16_is_as_near_to_float64_as_the_reference(softcap):
    case = Case("causal", "packed", 32, 32, 2, 2, 16, softcap)
    spec, arrays, marks = make(case, dtype=jnp.bfloat16, H=16)
    truth = by_hand(spec, arrays, marks)

    def errors(function):
        found = results(function, spec, arrays, marks)
        assert [x.dtype for x in found] == [jnp.bfloat16, jnp.float32] + [jnp.bfloat16] * 3
        return [np.sqrt(np.mean((np.asarray(x, np.float64) - y) ** 2)) for x, y in zip(found, truth, strict=True)]

    ours, theirs = errors(partial(flash, blocked)), errors(by_reference)
    assert all(a <= 1.02 * b + 1e-6 for a, b in zip(ours, theirs, strict=True)), (ours, theirs)


def test_by_hand_is_the_definition():
    spec, arrays, marks = make(Case("window", "padded", 9, 9, 2, 2, 5, 0.8))
    found = results(by_reference, spec, arrays, marks)
    for x, y in zip(found, by_hand(spec, arrays, marks), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)


@pytest.mark.parametrize("case", cases(58)[26:], ids=lambda case: f"{case.mask}-{case.rows}-{case.T}-{case.S}")
def test_no_block_with_something_visible_is_skipped(case):
    spec, _, marks = make(case)
    marks = jax.tree.map(np.asarray, marks)
    for begin, start in itertools.product(range(0, case.T, 3), range(0, case.S, 3)):
        part = dataclasses.replace(
            marks,
            **{name: getattr(marks, name)[:, begin : begin + 3] for name in ("q_segments", "q_low", "q_high")},
            **{name: getattr(marks, name)[:, start : start + 3] for name in ("k_segments", "k_positions")},
        )
        some = np.any(visible(part), axis=(1, 2))
        assert np.all(may_meet(query_extents(spec, part), key_extents(part)) | ~some)


def test_what_cannot_be_seen_is_never_computed(monkeypatch):
    """Three documents of four tokens, causal: three pairs of blocks each, of 36."""
    visits = []
    original = blocked._logits

    def counted(spec, q, k):
        jax.debug.callback(lambda: visits.append(1))
        return original(spec, q, k)

    monkeypatch.setattr(blocked, "_logits", counted)
    monkeypatch.setattr(blocked, "QUERIES", 2)
    monkeypatch.setattr(blocked, "KEYS", 2)
    segments = np.repeat([[1, 2, 3]], 4, axis=1).astype(np.int32)
    positions = np.tile(np.arange(4, dtype=np.int32), 3)[None]
    marks, low, high = make_marks(*map(jnp.asarray, (positions, positions, segments, segments)), causal=True)
    spec = Spec(scale=1.0, low=low, high=high)
    q = k = v = jnp.ones((1, 1, 12, 4))
    jax.block_until_ready(blocked.forward(spec, q, k, v, marks))
    jax.effects_barrier()
    assert len(visits) == 9
    out, lse = blocked.forward(spec, q, k, v, marks)
    jax.effects_barrier()
    visits.clear()
    jax.block_until_ready(blocked.backward(spec, q, k, v, marks, lse, jnp.zeros_like(lse), out))
    jax.effects_barrier()
    assert len(visits) == 9


def test_memory_is_linear_in_the_length(monkeypatch):
    """Forward and backward compiled at 4,096 and 16,384 tokens, with the blocks of real use."""
    monkeypatch.undo()

    def temporaries(T):
        x = jax.ShapeDtypeStruct((1, 1, T, 16), jnp.float32)
        ids = jax.ShapeDtypeStruct((1, T), jnp.int32)

        def loss(q, k, v, positions, segments):
            q, k, v = (y.swapaxes(1, 2) for y in (q, k, v))
            kinds = dict(q_positions=positions, k_positions=positions, q_segments=segments, k_segments=segments)
            return jnp.sum(api.attention(q, k, v, **kinds, backend="blocked"))

        compiled = jit(jax.grad(loss, argnums=(0, 1, 2))).lower(x, x, x, ids, ids).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    small, large = temporaries(4096), temporaries(16384)
    assert large < 5 * small
    assert large < 16384**2 / 4


def test_a_bias_is_refused():
    q = jnp.ones((1, 4, 1, 2))
    ids = jnp.ones((1, 4), jnp.int32)
    kinds = dict(q_positions=ids, k_positions=ids, q_segments=ids, k_segments=ids)
    with pytest.raises(ValueError, match="'blocked' cannot run here: only 'xla' adds a bias"):
        api.attention(q, q, q, **kinds, bias=jnp.zeros((1, 4, 4)), backend="blocked")
    assert api.attention(q, q, q, **kinds, bias=jnp.zeros((1, 4, 4))).shape == q.shape
