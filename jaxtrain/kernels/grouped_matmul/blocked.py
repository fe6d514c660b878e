"""Grouped products as a loop over blocks of rows, each with the one matrix of its group.

Only blocks that have rows are visited, so that the work follows the groups' sizes and not the number of groups:
on XLA's CPU backend, where ``jax.lax.ragged_dot`` multiplies every row with every matrix, 4,096 rows in 64 groups of
256 x 256 take 8 ms against 181.

Letters: M rows, E groups (experts), K and N the sides of a group's matrix, R rows of a block.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxtrain.sharding import vary_like


class Blocks(NamedTuple):
    """How groups are cut: ``count`` blocks are in use.  int32 arrays, one entry a block.

    group: whose rows they are.  start, stop: its first row, and the end of its group.
    """

    count: jax.Array
    group: jax.Array
    start: jax.Array
    stop: jax.Array


def block_rows(rows: int, groups: int) -> int:
    """Rows of a block: half a group of average size, from 8 to 128."""
    return min(128, max(8, 1 << (rows // (2 * groups)).bit_length() - 1 if rows >= 2 * groups else 8))


def cut(sizes_E: jax.Array, rows: int, size: int) -> Blocks:
    """Cuts groups of ``sizes_E`` rows, ``rows`` in all at most, into blocks of up to ``size`` rows."""
    groups = sizes_E.shape[0]
    # A group has at most one block that is not full, and no block is empty.
    most = min(rows, rows // size + groups)
    blocks_E = -(-sizes_E // size)
    last_E, ends_E = jnp.cumsum(blocks_E), jnp.cumsum(sizes_E)
    number = jnp.arange(most, dtype=jnp.int32)
    group = jnp.minimum(jnp.searchsorted(last_E, number, side="right"), groups - 1).astype(jnp.int32)
    start = (ends_E - sizes_E)[group] + (number - (last_E - blocks_E)[group]) * size
    return Blocks(count=last_E[-1], group=group, start=start, stop=ends_E[group])


def product(x_MK: jax.Array, w_EKN: jax.Array, sizes_E: jax.Array, *, transpose: bool = False) -> jax.Array:
    """Each row times its group's matrix, ``[M, N]``; with ``transpose`` ``[M, N] -> [M, K]`` by the transposed one."""
    M, inner = x_MK.shape
    outer = w_EKN.shape[1 if transpose else 2]
    size = block_rows(M, w_EKN.shape[0])
    blocks = cut(sizes_E, M, size)
    x_MK = jnp.pad(x_MK, ((0, size), (0, 0)))
    contract = (((1,), (1 if transpose else 0,)), ((), ()))

    def body(number, out):
        x_RK = jax.lax.dynamic_slice(x_MK, (blocks.start[number], 0), (size, inner))
        w_KN = jax.lax.dynamic_index_in_dim(w_EKN, blocks.group[number], keepdims=False)
        y_RN = jax.lax.dot_general(x_RK, w_KN, contract, preferred_element_type=jnp.float32).astype(out.dtype)
        # Rows of the next group that stick out of the block are written again by that group's own.
        return jax.lax.dynamic_update_slice(out, y_RN, (blocks.start[number], 0))

    out = jax.lax.fori_loop(0, blocks.count, body, vary_like(jnp.zeros((M + size, outer), x_MK.dtype), x_MK))[:M]
    return jnp.where(jnp.arange(M)[:, None] < jnp.sum(sizes_E), out, 0)


def outer_product(x_MK: jax.Array, y_MN: jax.Array, sizes_E: jax.Array, *, rows: int | None = None) -> jax.Array:
    """Each group's ``x^T y`` over its rows, float32 ``[E, K, N]``: the gradient of the matrices.  rows: of a block."""
    (M, K), N, E = x_MK.shape, y_MN.shape[1], sizes_E.shape[0]
    size = rows or block_rows(M, E)
    blocks = cut(sizes_E, M, size)
    x_MK, y_MN = (jnp.pad(x, ((0, size), (0, 0))) for x in (x_MK, y_MN))

    def body(number, out):
        start, group = blocks.start[number], blocks.group[number]
        mine_R1 = (start + jnp.arange(size) < blocks.stop[number])[:, None]
        x_RK = jnp.where(mine_R1, jax.lax.dynamic_slice(x_MK, (start, 0), (size, K)), 0)
        y_RN = jnp.where(mine_R1, jax.lax.dynamic_slice(y_MN, (start, 0), (size, N)), 0)
        sum_KN = jax.lax.dot_general(x_RK, y_RN, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
        return out.at[group].add(sum_KN)

    # The name tells a reader of the compiled program, in which no number of turns stands, how many there can be.
    with jax.named_scope(f"at_most_{len(blocks.group)}_turns"):
        return jax.lax.fori_loop(0, blocks.count, body, vary_like(jnp.zeros((E, K, N), jnp.float32), x_MK))
