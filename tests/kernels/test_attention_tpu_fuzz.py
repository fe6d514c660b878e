"""The TPU kernels at any shape and under any marks, and what ``ranges`` says of any marks, drawn by Hypothesis.

Marks are data of a compiled program, so that hundreds of them cost little.  They are of two sorts: rows as they occur
(packed documents with windows and prefixes, in order or not), and integers without any sense, for which the definition
in ``masks`` must hold just the same.
"""

from __future__ import annotations

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtrain.kernels.attention import reference, tpu
from jaxtrain.kernels.attention.flash import flash
from jaxtrain.kernels.attention.masks import Marks, Spec, make_marks, visible
from jaxtrain.kernels.attention.ranges import key_ranges, pad_marks, query_ranges

# It is compiling that takes time.
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
check_many = settings(max_examples=60, deadline=None, derandomize=True)
check_few = settings(max_examples=4, deadline=None, derandomize=True)
FIRST, LAST = -(2**31), 2**31 - 1


@st.composite
def packed(draw, T: int, S: int) -> tuple[Marks, bool, bool]:
    """One row of documents; queries are the last T of the longer side, keys the first S.  With ``Spec.low, high``."""
    length = max(T, S)
    ends = draw(st.lists(st.integers(1, length), max_size=9, unique=True).map(sorted))
    segments = np.searchsorted(ends, np.arange(length), side="right").astype(np.int32)
    if draw(st.booleans()):
        segments += 1  # else the first document is padding
    if draw(st.booleans()):
        segments[segments == segments.max()] = 0
    starts = np.concatenate([[0], ends]).astype(np.int32)
    positions = np.arange(length, dtype=np.int32) - starts[np.searchsorted(ends, np.arange(length), side="right")]
    positions += draw(st.sampled_from((0, 5, 10**6)))
    if draw(st.booleans()):
        order = np.random.default_rng(draw(st.integers(0, 99))).permutation(length)
        segments, positions = segments[order], positions[order]
    causal, window = draw(st.booleans()), draw(st.sampled_from((0, 1, 2, 50, 128, 200)))
    prefix = None
    if causal and draw(st.booleans()):
        prefix = jnp.full((1, T), draw(st.integers(0, length)), jnp.int32)
    tokens = (positions[None, length - T :], positions[None, :S], segments[None, length - T :], segments[None, :S])
    return make_marks(*map(jnp.asarray, tokens), causal=causal, window=window, q_prefix=prefix)


@st.composite
def senseless(draw, T: int, S: int) -> tuple[Marks, bool, bool]:
    """Integers of a few or of all bits, each side in runs of some length."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    runs, segments = draw(st.sampled_from((1, 3, 128, 300))), draw(st.integers(1, 4))

    def integers(length, low, high):
        return np.repeat(rng.integers(low, high, (1, -(-length // runs)), np.int64), runs, 1)[:, :length]

    low, high = draw(st.sampled_from(((0, 9), (-50, 50), (FIRST, LAST))))
    marks = Marks(
        q_segments=integers(T, -1, segments + 1),
        q_low=integers(T, low, high),
        q_high=integers(T, low, high),
        k_segments=integers(S, -1, segments + 1),
        k_positions=integers(S, low, high),
    )
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.int32), marks), True, True


@cache
def programs(low: bool, high: bool):
    """(kernels, reference) at one shape, 3 x 4 tiles, two of whose keys make a chunk: marks -> out, lse, dq, dk, dv."""
    (N, K, T, S, H), rng = (2, 1, 300, 500, 64), np.random.default_rng(0)
    shapes = (1, N, T, H), (1, K, S, H), (1, K, S, H), (1, N, T, H), (1, N, T)
    q, k, v, d_out, d_lse = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    spec = Spec(scale=H**-0.5, low=low, high=high, tiles=(128, 128))

    def by_reference(q, k, v, marks):
        if not (low and high):
            marks = dataclasses.replace(
                marks,
                q_low=marks.q_low if low else jnp.full_like(marks.q_low, FIRST),
                q_high=marks.q_high if high else jnp.full_like(marks.q_high, LAST),
            )
        return reference.attention(q, k, v, visible(marks), scale=spec.scale)

    def program(attend):
        def run(marks):
            (out, lse), pull = jax.vjp(lambda *qkv: attend(*qkv, marks), q, k, v)
            return out, lse, *pull((d_out, jnp.where(jnp.isneginf(lse), 0.0, d_lse)))

        return jit(run)

    return program(lambda *args: flash(tpu, spec, *args)), program(by_reference)


@pytest.fixture(params=[True, False], ids=["fused", "two kernels"], scope="module")
def small_chunks(request):
    """Two tiles a chunk; one kernel for the backward pass, or two."""
    chip = dataclasses.replace(tpu.chip(), fused=2**30 if request.param else 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tpu, "CHUNK_BYTES", 2 * 128 * 256 * 4)
        patch.setattr(tpu, "chip", lambda: chip)
        programs.cache_clear()
        yield
        programs.cache_clear()


def compare(marks: Marks, low: bool, high: bool) -> None:
    kernels, definition = programs(low, high)
    mask = np.asarray(visible(marks))[0]
    hidden = (~mask.any(1), ~mask.any(1), ~mask.any(1), ~mask.any(0), ~mask.any(0))
    for mine, theirs, blind in zip(kernels(marks), definition(marks), hidden, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5)
        assert np.isin(np.asarray(mine)[0, :, blind], (0, -np.inf)).all()


@check_many
@given(drawn=packed(300, 500))
def test_any_documents(small_chunks, drawn):
    marks, low, high = drawn
    # Bounds that hide nothing may be read all the same, which saves a program.
    compare(marks, *((False, False) if not (low or high) else (True, True)))


@check_many
@given(drawn=senseless(300, 500))
def test_any_integers(small_chunks, drawn):
    compare(*drawn)


@check_few
@given(
    T=st.integers(1, 270),
    S=st.integers(1, 270),
    heads=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    H=st.integers(1, 140),
    V=st.integers(1, 140),
    tiles=st.tuples(st.sampled_from((128, 256)), st.sampled_from((128, 256))),
    data=st.data(),
)
def test_any_shape(T, S, heads, H, V, tiles, data):
    marks, low, high = data.draw(packed(T, S))
    (K, G), rng = heads, np.random.default_rng(0)
    shapes = (2, K * G, T, H), (2, K, S, H), (2, K, S, V), (2, K * G, T, V)
    q, k, v, d_out = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    marks = jax.tree.map(lambda x: x.repeat(2, 0), marks)
    spec = Spec(scale=H**-0.5, low=low, high=high, tiles=tiles)

    def run(attend):
        out, pull = jax.vjp(lambda *qkv: attend(*qkv), q, k, v)
        return *out, *pull((d_out, jnp.where(jnp.isneginf(out[1]), 0.0, 1.0)))

    mine = jit(lambda: run(lambda *qkv: flash(tpu, spec, *qkv, marks)))()
    theirs = jit(lambda: run(lambda *qkv: reference.attention(*qkv, visible(marks), scale=spec.scale)))()
    for x, y in zip(mine, theirs, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("length", [1, 129])
def test_rows_of_padding_give_nothing(length):
    """Nothing is seen in the whole array: no tile is visited."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 1, length, 64)), jnp.float32)
    zeros = jnp.zeros((1, length), jnp.int32)
    marks, low, high = make_marks(zeros, zeros, zeros, zeros, causal=True)
    spec = Spec(scale=1.0, low=low, high=high, in_order=True, tiles=(128, 128))
    (out, lse), pull = jax.vjp(jax.jit(lambda q, k, v: flash(tpu, spec, q, k, v, marks)), x, x, x)
    assert not np.any(out) and np.all(np.isneginf(lse))
    for gradient in pull((x, jnp.ones_like(lse))):
        assert gradient.shape == x.shape and not np.any(gradient)


def test_tiles_that_the_mask_rules_out_are_not_read():
    """NaN in the first document reaches no token of the second: a kernel that only masked would multiply it by 0."""
    segments = jnp.repeat(jnp.asarray([[1, 2]], jnp.int32), 128, axis=1)
    positions = jnp.tile(jnp.arange(128, dtype=jnp.int32), 2)[None]
    marks, low, high = make_marks(positions, positions, segments, segments, causal=True)
    spec = Spec(scale=1.0, low=low, high=high, tiles=(128, 128))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 1, 256, 64)), jnp.float32).at[:, :, :128].set(jnp.nan)
    (out, lse), pull = jax.vjp(jax.jit(lambda q, k, v: flash(tpu, spec, q, k, v, marks)), x, x, x)
    for found in (out, lse, *pull((jnp.ones_like(out), jnp.ones_like(lse)))):
        assert not np.isfinite(found[:, :, :128]).any() and np.isfinite(found[:, :, 128:]).all()


def blocks_of(marks: Marks, block_q: int, block_k: int) -> tuple[np.ndarray, np.ndarray]:
    """bool ``[I, J]`` twice, counted out: does any query of block I see a key of block J; does each see all?"""
    seen = np.asarray(visible(marks))[0]
    seen = np.pad(seen, ((0, -seen.shape[0] % block_q), (0, -seen.shape[1] % block_k)))
    blocks = seen.reshape(seen.shape[0] // block_q, block_q, seen.shape[1] // block_k, block_k)
    return blocks.any((1, 3)), blocks.all((1, 3))


@pytest.mark.parametrize("marks_of", [packed, senseless], ids=["documents", "integers"])
@pytest.mark.parametrize(("block_q", "block_k"), [(16, 8), (8, 16)])
def test_ranges_hold_all_that_is_visible_and_only_full_blocks_are_called_full(marks_of, block_q, block_k):
    programs = {}

    @settings(max_examples=150, deadline=None, derandomize=True)
    @given(drawn=marks_of(70, 90))
    def holds(drawn):
        marks, low, high = drawn
        some, full = blocks_of(marks, block_q, block_k)
        padded = pad_marks(marks, block_q, block_k)
        for ranges, some_of, full_of in ((key_ranges, some, full), (query_ranges, some.T, full.T)):
            if (ranges, low, high) not in programs:
                spec = Spec(scale=1.0, low=low, high=high)
                programs[ranges, low, high] = jax.jit(
                    partial(ranges, spec, block_q=block_q, block_k=block_k, square=False)
                )
            first, full_from, full_to, last = np.asarray(programs[ranges, low, high](*padded))[0].T[..., None]
            j = np.arange(some_of.shape[1])
            assert (full_from <= full_to).all() and (full_to <= np.maximum(last, first)).all()
            assert not (some_of & ~((first <= j) & (j < last))).any()
            assert not (~full_of & (full_from <= j) & (j < full_to)).any()

    holds()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(cuts=st.lists(st.integers(1, 319), min_size=7, max_size=7, unique=True), window=st.sampled_from((0, 30)))
def test_packed_documents_visit_no_block_in_vain(cuts, window):
    """Eight causal documents: exactly the pairs of blocks that hold something visible, and no mask in all full ones."""
    starts = np.array([0, *sorted(cuts)])
    segments = np.searchsorted(starts, np.arange(320), side="right").astype(np.int32)
    positions = (np.arange(320) - starts[segments - 1]).astype(np.int32)
    tokens = (jnp.asarray(x[None]) for x in (positions, positions, segments, segments))
    marks, low, high = make_marks(*tokens, causal=True, window=window)
    some, full = blocks_of(marks, 16, 16)
    spec = Spec(scale=1.0, low=low, high=high, in_order=True)
    for ranges in (key_ranges, query_ranges):
        first, full_from, full_to, last = np.asarray(_ranges(ranges, spec, *pad_marks(marks, 16, 16)))[0].T
        assert (last - first).sum() == some.sum()
        assert (full_to - full_from).sum() == full.sum()


@partial(jax.jit, static_argnums=(0, 1))
def _ranges(ranges, spec: Spec, q_marks, k_marks):
    return ranges(spec, q_marks, k_marks, 16, 16, square=True)
