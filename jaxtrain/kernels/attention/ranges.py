"""Which key blocks a query block has to visit, and which need no mask: computed in XLA before the kernels run.

Letters: B rows, L tokens of one side, I blocks of the side that is held, J blocks of the side that is looped over.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxtrain.kernels.attention.extents import key_extents, may_meet, query_extents
from jaxtrain.kernels.attention.masks import Marks, Spec


def pad_marks(marks: Marks, block_q: int, block_k: int) -> tuple[jax.Array, jax.Array]:
    """Whole blocks: int32 ``[B, 3, T']`` of (segment, low, high) and ``[B, 2, S']`` of (segment, position).

    Padding is segment -1 for queries and 0 for keys, so that a kernel need only compare the two.
    """
    q_segments = jnp.where(marks.q_segments > 0, marks.q_segments, -1)
    k_segments = jnp.maximum(marks.k_segments, 0)
    q_marks = jnp.stack([_pad(q_segments, block_q, -1), _pad(marks.q_low, block_q), _pad(marks.q_high, block_q)], 1)
    return q_marks, jnp.stack([_pad(k_segments, block_k), _pad(marks.k_positions, block_k)], 1)


def _pad(x_BL, block: int, value: int = 0):
    return jnp.pad(x_BL, ((0, 0), (0, -x_BL.shape[1] % block)), constant_values=value)


def key_ranges(spec: Spec, q_marks, k_marks, block_q: int, block_k: int, *, square: bool) -> jax.Array:
    """int32 ``[B, I, 4]`` for each query block I: (first, full from, full to, last) of the key blocks.

    The kernel visits ``first <= j < last``; in ``full from <= j < full to`` every query of the block sees every key,
    and it may leave the mask away.  Blocks outside are empty; blocks inside that are neither may still be empty.
    square: T = S, so that ``spec.in_order`` speaks of indices.
    """
    some_BIJ, full_BIJ = _pairs(spec, q_marks, k_marks, block_q, block_k, square)
    return _ranges(some_BIJ, full_BIJ)


def query_ranges(spec: Spec, q_marks, k_marks, block_q: int, block_k: int, *, square: bool) -> jax.Array:
    """The same for each key block: ``[B, I, 4]`` of the query blocks that see it."""
    some_BIJ, full_BIJ = _pairs(spec, q_marks, k_marks, block_q, block_k, square)
    return _ranges(some_BIJ.swapaxes(1, 2), full_BIJ.swapaxes(1, 2))


def _ranges(some_BIJ, full_BIJ):
    """Runs of blocks.  Of several runs of full blocks the first is taken: the others go the masked way."""
    blocks = some_BIJ.shape[2]
    j = jnp.arange(blocks, dtype=jnp.int32)
    first = jnp.min(jnp.where(some_BIJ, j, blocks), -1)
    last = jnp.max(jnp.where(some_BIJ, j + 1, 0), -1)
    full_from = jnp.min(jnp.where(full_BIJ, j, blocks), -1)
    full_to = jnp.min(jnp.where(~full_BIJ & (j > full_from[..., None]), j, blocks), -1)
    # No full block: an empty run at the end, after which nothing is left.
    full_from = jnp.clip(full_from, first, jnp.maximum(first, last))
    full_to = jnp.clip(full_to, full_from, jnp.maximum(first, last))
    return jnp.stack([first, full_from, full_to, jnp.maximum(first, last)], -1)


def _pairs(spec: Spec, q_marks, k_marks, block_q: int, block_k: int, square: bool):
    """bool ``[B, I, J]`` twice: may a query of block I see a key of block J, and does each see all?"""
    q_segments, q_low, q_high = (_blocks(x, block_q) for x in jnp.unstack(q_marks, axis=1))
    k_segments, k_positions = (_blocks(x, block_k) for x in jnp.unstack(k_marks, axis=1))
    marks = Marks(q_segments=q_segments, q_low=q_low, q_high=q_high, k_segments=k_segments, k_positions=k_positions)
    queries = jax.tree.map(lambda x: x[:, :, None], query_extents(spec, marks))
    keys = jax.tree.map(lambda x: x[:, None], key_extents(marks))
    some = may_meet(queries, keys)
    if spec.in_order and square:
        ends = (jnp.arange(some.shape[1], dtype=jnp.int32) + 1) * block_q
        some &= ends[:, None] > jnp.arange(some.shape[2], dtype=jnp.int32) * block_k

    # No padding, each of one segment (two that may meet have the same), and the tightest bounds hold for the outermost.
    full = jnp.all(q_segments > 0, -1)[:, :, None] & jnp.all(k_segments > 0, -1)[:, None]
    full &= (queries.first_segment == queries.last_segment) & (keys.first_segment == keys.last_segment)
    if spec.low:
        full &= jnp.max(q_low, -1)[:, :, None] <= jnp.min(k_positions, -1)[:, None]
    if spec.high:
        full &= jnp.min(q_high, -1)[:, :, None] >= jnp.max(k_positions, -1)[:, None]
    return some, full & some


def _blocks(x_BL, block: int):
    return x_BL.reshape(x_BL.shape[0], -1, block)
