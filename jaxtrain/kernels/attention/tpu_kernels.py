"""The three kernels of flash attention on a TPU: forward, dq, and dk with dv.

All hold one block (of queries in the first two, of keys in the third) and loop over the tiles it makes with blocks of
the other side.  Tiles of logits have keys along the sublanes and queries along the lanes: reductions over keys and
statistics of the softmax are then one row of lanes, not a column of them (in which every number takes a vector
register's 128 lanes), and o^T and dq^T are products that have the tile itself in the matrix unit, whose 256 x 256 cells
on newer chips a head of 128 would half fill.

Letters: H size of queries and keys, V of values, Q queries and K keys of a tile.
"""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxtrain.kernels.attention.masks import Spec

# Logits are in units of log 2, since that is the exponential that the hardware has.
LOG2E = math.log2(math.e)
# Hidden logits lie far below the lowest maximum, so that their exponentials are 0 in a row that sees nothing.
HIDDEN, LOWEST = -2e30, -1e30
# In the backward pass the square of it must not overflow (the slope of the soft cap).
BACKWARD_HIDDEN = -1e15
LANES = 128


@dataclasses.dataclass(frozen=True)
class Shape:
    """Queries and keys of a tile, and how many tiles a chunk of the looped side has, which is in VMEM at a time."""

    queries: int
    keys: int
    tiles: int


def dot(a, b, contract: tuple[int, int]):
    """``a`` times ``b`` over one dimension of each, added up in float32; float32 factors are not rounded."""
    # Never the process's own default: of bfloat16 the compiler of kernels takes no other.
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def _before_unit(spec: Spec, product):
    """Logits up to a constant factor: products of queries and keys, or with a soft cap their tanh."""
    return jnp.tanh(product * (spec.scale / spec.softcap)) if spec.softcap else product


def _unit(spec: Spec) -> float:
    """What makes them logits in units of log 2."""
    return (spec.softcap or spec.scale) * LOG2E


def _column(row, lanes: int):
    """``[1, n] -> [n, lanes]``, every lane the same."""
    column = jnp.broadcast_to(row, (LANES, row.shape[1])).T
    return jnp.tile(column, (1, lanes // LANES))


def _visible(spec: Spec, q_segment, q_low, q_high, k_segment, k_position):
    """bool, broadcast: see ``masks.Marks``.  Padding is -1 among queries and 0 among keys."""
    mask = q_segment == k_segment
    if spec.high:
        mask &= k_position <= q_high
    if spec.low:
        mask &= k_position >= q_low
    return mask


def _visible_KQ(spec: Spec, q_marks_ref, k_marks_ref, rows):
    """The same for a tile of keys x queries."""
    q_marks = [q_marks_ref[0, i : i + 1] for i in range(3)]
    k_marks = (_column(k_marks_ref[0, i : i + 1, rows], q_marks_ref.shape[2]) for i in range(2))
    return _visible(spec, *q_marks, *k_marks)


def _p_ds(spec: Spec, x, dp, lse, delta):
    """P and dS of a tile from ``_before_unit``; ``lse`` in units of log 2."""
    p = jnp.exp2(x * _unit(spec) - lse)
    ds = p * (dp - delta)
    return p, ds * (1 - x * x) if spec.softcap else ds


def _rows(tile, size: int):
    return pl.ds(pl.multiple_of(tile * size, size), size)


def _loop(begin, end, body) -> None:
    lax.fori_loop(begin, end, lambda tile, _: body(tile), None)


def _chunk_ranges(ranges_ref, at, chunk, tiles: int):
    """``ranges.key_ranges`` of what is held, within this chunk and counted from its start."""
    return [jnp.clip(ranges_ref[at + i] - chunk * tiles, 0, tiles) for i in range(4)]


def _pipelined(first, end, start, finish) -> None:
    """``start(tile, slot)`` and ``finish(tile, slot)`` of all tiles from ``first`` to ``end``, at least one, each tile
    started in the stretch of code that finishes the one before it.

    The two share no data, so that the compiler fills the matrix unit and the vector units at once.  Slots 0 and 1
    alternate, and are known when the code is compiled: only then can it tell that they are different memory.
    """

    def both(tile, slot):
        start(tile, slot)
        finish(tile - 1, 1 - slot)

    def two(turn):
        both(first + 2 * turn + 1, 1)
        both(first + 2 * turn + 2, 0)

    count = end - first
    start(first, 0)
    _loop(0, (count - 1) // 2, two)

    @pl.when(count % 2 == 1)
    def _():
        finish(end - 1, 0)

    @pl.when(count % 2 == 0)
    def _():
        both(end - 1, 1)
        finish(end - 1, 1)


def _all_tiles(ranges, start, finish) -> None:
    """Every tile that has anything to see.  ``start(tile, slot, hide)``: whether tokens may be hidden in the tile."""
    first, full_from, full_to, last = ranges

    def alone(tile):
        start(tile, 0, True)
        finish(tile, 0)

    _loop(first, full_from, alone)
    pl.when(full_to > full_from)(
        lambda: _pipelined(full_from, full_to, lambda tile, slot: start(tile, slot, False), finish)
    )
    _loop(full_to, last, alone)


def forward_kernel(
    ranges_ref, q_ref, k_ref, v_ref, q_marks_ref, k_marks_ref, out_ref, lse_ref,
    q_HQ, s_KQ, o_VQ, l_Q, m_Q, new_m_Q, alpha_Q, *, spec: Spec, shape: Shape,
):  # fmt: skip
    """FlashAttention-2 (2307.08691), algorithm 1, transposed: one block of queries along the lanes.

    With m the running maximum of a query's logits (2112.05682), l its sum of exponentials, o its sum of values:

        m' = max(m, max_k s),  p = 2^(s - m'),  l' = l 2^(m - m') + sum_k p,  o' = o 2^(m - m') + v^T p.
    """
    chunk, chunks = pl.program_id(3), pl.num_programs(3)
    at = (pl.program_id(0) * pl.num_programs(2) + pl.program_id(2)) * 4

    @pl.when(chunk == 0)
    def _():
        q_HQ[...] = q_ref[0, 0].T
        o_VQ[...] = jnp.zeros_like(o_VQ)
        l_Q[...] = jnp.zeros_like(l_Q)
        m_Q[...] = jnp.full_like(m_Q, LOWEST)

    def start(tile, slot, hide):
        """The logits of a tile, the maximum with them, and what it does to the sums so far."""
        rows = _rows(tile, shape.keys)
        s = _before_unit(spec, dot(k_ref[0, 0, rows], q_HQ[...], (1, 0))) * _unit(spec)
        if hide:
            s = jnp.where(_visible_KQ(spec, q_marks_ref, k_marks_ref, rows), s, HIDDEN)
        m = m_Q[...]
        higher = jnp.maximum(m, jnp.max(s, axis=0, keepdims=True))
        s_KQ[slot], new_m_Q[slot], alpha_Q[slot] = s, higher, jnp.exp2(m - higher)
        m_Q[...] = higher

    def finish(tile, slot):
        p = jnp.exp2(s_KQ[slot] - new_m_Q[slot])
        l_Q[...] = l_Q[...] * alpha_Q[slot] + jnp.sum(p, axis=0, keepdims=True)
        v = v_ref[0, 0, _rows(tile, shape.keys)]
        o_VQ[...] = o_VQ[...] * alpha_Q[slot] + dot(v, p.astype(v.dtype), (0, 0))

    _all_tiles(_chunk_ranges(ranges_ref, at, chunk, shape.tiles), start, finish)

    @pl.when(chunk == chunks - 1)
    def _():
        seen = l_Q[...] > 0
        total = jnp.where(seen, l_Q[...], 1.0)
        out_ref[0, 0] = (o_VQ[...] / total).T.astype(out_ref.dtype)
        lse_ref[0, 0] = jnp.where(seen, m_Q[...] / LOG2E + jnp.log(total), -jnp.inf)


def dq_kernel(
    ranges_ref, q_ref, k_ref, v_ref, d_out_ref, lse_ref, delta_ref, q_marks_ref, k_marks_ref, dq_ref,
    q_HQ, d_out_VQ, x_KQ, dp_KQ, dq_HQ, *, spec: Spec, shape: Shape,
):  # fmt: skip
    """Equations in ``flash``: dS is a tile of keys x queries, and dq^T adds up k^T dS."""
    chunk, chunks = pl.program_id(3), pl.num_programs(3)
    at = (pl.program_id(0) * pl.num_programs(2) + pl.program_id(2)) * 4

    @pl.when(chunk == 0)
    def _():
        q_HQ[...] = q_ref[0, 0].T
        d_out_VQ[...] = d_out_ref[0, 0].T
        dq_HQ[...] = jnp.zeros_like(dq_HQ)

    def start(tile, slot, hide):
        rows = _rows(tile, shape.keys)
        x = _before_unit(spec, dot(k_ref[0, 0, rows], q_HQ[...], (1, 0)))
        if hide:
            x = jnp.where(_visible_KQ(spec, q_marks_ref, k_marks_ref, rows), x, BACKWARD_HIDDEN / _unit(spec))
        x_KQ[slot] = x
        dp_KQ[slot] = dot(v_ref[0, 0, rows], d_out_VQ[...], (1, 0))

    def finish(tile, slot):
        _, ds = _p_ds(spec, x_KQ[slot], dp_KQ[slot], lse_ref[0, 0] * LOG2E, delta_ref[0, 0])
        k = k_ref[0, 0, _rows(tile, shape.keys)]
        dq_HQ[...] += dot(k, ds.astype(k.dtype), (0, 0))

    _all_tiles(_chunk_ranges(ranges_ref, at, chunk, shape.tiles), start, finish)

    @pl.when(chunk == chunks - 1)
    def _():
        dq_ref[0, 0] = (dq_HQ[...] * spec.scale).T.astype(dq_ref.dtype)


def dkv_kernel(
    ranges_ref, q_ref, k_ref, v_ref, d_out_ref, lse_ref, delta_ref, q_marks_ref, k_marks_ref, dk_ref, dv_ref, *more,
    spec: Spec, shape: Shape, chunks: int,
):  # fmt: skip
    """One block of keys, all the queries of its group of heads in turn: dv adds up P^T d_out, and dk adds up dS^T q, of
    tiles of keys x queries.

    Where all of a group's dq^T fits into VMEM it is added up on the way, in float32, and a tile's logits and their
    gradients need not be computed a second time for it: five products instead of seven.
    """
    fused = len(more) > 4
    dq_ref, x_KQ, dp_KQ, dk_KH, dv_KV, dq_GHQ = more if fused else (None, *more, None)
    turn, turns = pl.program_id(3), pl.num_programs(3)
    at = (pl.program_id(0) * pl.num_programs(2) + pl.program_id(2)) * 4

    @pl.when(turn == 0)
    def _():
        dk_KH[...] = jnp.zeros_like(dk_KH)
        dv_KV[...] = jnp.zeros_like(dv_KV)

    def each_block_of_dq(do):
        heads, _, length = dq_GHQ.shape
        blocks = length // shape.queries
        _loop(0, heads * blocks, lambda n: do((n // blocks, slice(None), _rows(n % blocks, shape.queries))))

    @pl.when((turn == 0) & (pl.program_id(2) == 0))
    def _():
        def clear(place):
            dq_GHQ[place] = jnp.zeros((dq_GHQ.shape[1], shape.queries), jnp.float32)

        if fused:
            each_block_of_dq(clear)

    def start(tile, slot, hide):
        rows = _rows(tile, shape.queries)
        x = _before_unit(spec, dot(k_ref[0, 0], q_ref[0, 0, rows], (1, 1)))
        if hide:
            q_marks = [q_marks_ref[0, i : i + 1, rows] for i in range(3)]
            k_marks = (_column(k_marks_ref[0, i : i + 1], shape.queries) for i in range(2))
            x = jnp.where(_visible(spec, *q_marks, *k_marks), x, BACKWARD_HIDDEN / _unit(spec))
        x_KQ[slot] = x
        dp_KQ[slot] = dot(v_ref[0, 0], d_out_ref[0, 0, rows], (1, 1))

    def finish(tile, slot):
        rows = _rows(tile, shape.queries)
        p, ds = _p_ds(spec, x_KQ[slot], dp_KQ[slot], lse_ref[0, 0, :, rows] * LOG2E, delta_ref[0, 0, :, rows])
        q, d_out = q_ref[0, 0, rows], d_out_ref[0, 0, rows]
        dv_KV[...] += dot(p.astype(d_out.dtype), d_out, (1, 0))
        ds = ds.astype(q.dtype)
        dk_KH[...] += dot(ds, q, (1, 0))
        if fused:
            at_q = _rows(turn % chunks * shape.tiles + tile, shape.queries)
            dq_GHQ[turn // chunks, :, at_q] += dot(k_ref[0, 0], ds, (0, 0))

    _all_tiles(_chunk_ranges(ranges_ref, at, turn % chunks, shape.tiles), start, finish)

    @pl.when(turn == turns - 1)
    def _():
        dk_ref[0, 0] = (dk_KH[...] * spec.scale).astype(dk_ref.dtype)
        dv_ref[0, 0] = dv_KV[...].astype(dv_ref.dtype)

    @pl.when((turn == turns - 1) & (pl.program_id(2) == pl.num_programs(2) - 1))
    def _():
        def hand_over(place):
            dq_ref[0, *place] = (dq_GHQ[place] * spec.scale).astype(dq_ref.dtype)

        if fused:
            each_block_of_dq(hand_over)
