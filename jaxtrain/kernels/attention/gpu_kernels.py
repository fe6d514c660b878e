"""FlashAttention-2 (Dao, 2307.08691) for NVIDIA GPUs from Ampere on, in Pallas lowered through Triton.

Three kernels.  ``forward`` holds a block of queries and loops over keys (algorithm 1), and so does ``dq``, backward;
``dkv`` holds a block of keys and loops over the queries of its whole group of heads.  The two are algorithm 2, split so
that nothing is added up in memory and results do not depend on the order of execution.

Logits are kept in base two, ``s log2(e)``: the hardware's exponential is ``2^x``.  Triton's arrays have sizes that are
powers of two, so a head of 80 is taken as 64 + 16: a tuple of pieces wherever a head's dimension stands.

Letters: T queries, S keys of a block; H size of queries and keys, V of values.
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxtrain.kernels.attention.masks import Spec

LOG2E = math.log2(math.e)


def pieces(size: int, dtype) -> tuple[tuple[int, int], ...]:
    """(start, length) of powers of two that make up a multiple of 16.

    Products of float32 run outside the matrix units, whose operands then stand in registers: short pieces fit there.
    """
    found, start, longest = [], 0, 32 if dtype == jnp.float32 else 256
    while start < size:
        length = min(longest, 1 << ((size - start).bit_length() - 1))
        found.append((start, length))
        start += length
    return tuple(found)


def read(ref, rows, size: int) -> tuple[jax.Array, ...]:
    """The rows of a head, in pieces."""
    return tuple(ref[rows, pl.ds(start, length)] for start, length in pieces(size, ref.dtype))


def write(ref, values: tuple[jax.Array, ...], size: int) -> None:
    for (start, length), value in zip(pieces(size, ref.dtype), values, strict=True):
        ref[:, pl.ds(start, length)] = value.astype(ref.dtype)


def zeros(rows: int, size: int, dtype) -> tuple[jax.Array, ...]:
    """float32 sums, for pieces of that type."""
    return tuple(jnp.zeros((rows, length), jnp.float32) for _, length in pieces(size, dtype))


def dot(a, b, *, over: tuple[int, int] = (1, 0)) -> jax.Array:
    """float32 product, summed over axis ``over[0]`` of a and ``over[1]`` of b.  float32 is not rounded to TF32."""
    # Never the process's own default: of bfloat16 the compiler of kernels takes no other.
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(
        a, b, (((over[0],), (over[1],)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def dot_pieces(a, b) -> jax.Array:
    """``a b^T`` of two heads in pieces."""
    return sum(dot(x, y, over=(1, 1)) for x, y in zip(a, b, strict=True))


def logits(spec: Spec, products) -> tuple[jax.Array, jax.Array | None]:
    """Logits in base two, and the derivative of the soft cap (2408.00118) by what it caps, if there is one."""
    if not spec.softcap:
        return products * (spec.scale * LOG2E), None
    tanh = jnp.tanh(products * (spec.scale / spec.softcap))
    return tanh * (spec.softcap * LOG2E), 1 - tanh * tanh


def seen(spec: Spec, q_marks, k_marks, *, keys_first: bool = False) -> jax.Array:
    """bool ``[T, S]``, or ``[S, T]`` with ``keys_first``; marks as in :func:`ranges.pad_marks`."""
    q, k = ((None, slice(None)), (slice(None), None)) if keys_first else ((slice(None), None), (None, slice(None)))
    segments, low, high = q_marks
    k_segments, positions = k_marks
    found = segments[q] == k_segments[k]
    if spec.low:
        found &= low[q] <= positions[k]
    if spec.high:
        found &= positions[k] <= high[q]
    return found


def read_q_marks(spec: Spec, ref, rows) -> tuple:
    return ref[0, rows], ref[1, rows] if spec.low else None, ref[2, rows] if spec.high else None


def read_k_marks(spec: Spec, ref, rows) -> tuple:
    return ref[0, rows], ref[1, rows] if spec.low or spec.high else None


def in_three(ranges_ref, step, carry):
    """The run of blocks: masked, then those that need no mask, then masked."""
    first, full_from, full_to, last = (ranges_ref[i] for i in range(4))
    carry = lax.fori_loop(first, full_from, partial(step, masked=True), carry)
    carry = lax.fori_loop(full_from, full_to, partial(step, masked=False), carry)
    return lax.fori_loop(full_to, last, partial(step, masked=True), carry)


def forward(q_ref, k_ref, v_ref, q_marks_ref, k_marks_ref, ranges_ref, out_ref, lse_ref, *, spec: Spec, block_k: int):
    """Online softmax: m is the running maximum, l the running sum of ``2^(s - m)``."""
    (T, H), V = q_ref.shape, v_ref.shape[1]
    q, q_marks = read(q_ref, slice(None), H), read_q_marks(spec, q_marks_ref, slice(None))

    def step(j, carry, *, masked):
        out, m_T, l_T = carry
        rows = pl.ds(j * block_k, block_k)
        s_TS, _ = logits(spec, dot_pieces(q, read(k_ref, rows, H)))
        if masked:
            s_TS = jnp.where(seen(spec, q_marks, read_k_marks(spec, k_marks_ref, rows)), s_TS, -jnp.inf)
        new_T = jnp.maximum(m_T, jnp.max(s_TS, axis=1))
        # A query that has seen nothing yet has no maximum: -inf minus itself would be NaN.
        shift_T = jnp.where(new_T == -jnp.inf, 0.0, new_T) if masked else new_T
        p_TS, shrink_T = jnp.exp2(s_TS - shift_T[:, None]), jnp.exp2(m_T - shift_T)
        p_cast = p_TS.astype(v_ref.dtype)
        out = tuple(o * shrink_T[:, None] + dot(p_cast, v) for o, v in zip(out, read(v_ref, rows, V), strict=True))
        return out, new_T, l_T * shrink_T + jnp.sum(p_TS, axis=1)

    start = zeros(T, V, v_ref.dtype), jnp.full((T,), -jnp.inf, jnp.float32), jnp.zeros((T,), jnp.float32)
    out, m_T, l_T = in_three(ranges_ref, step, start)
    safe_T = jnp.where(l_T == 0.0, 1.0, l_T)
    write(out_ref, tuple(o / safe_T[:, None] for o in out), V)
    lse_ref[...] = m_T * (1 / LOG2E) + jnp.log(safe_T)


def dq(
    q_ref, k_ref, v_ref, q_marks_ref, k_marks_ref, ranges_ref, lse_ref, delta_ref, d_out_ref, dq_ref, *, spec, block_k
):
    """``dq = scale dS k`` with ``dS = P (dP - delta) cap'`` and ``dP = d_out v^T``.  lse is in base two."""
    (T, H), V = q_ref.shape, v_ref.shape[1]
    q, d_out = read(q_ref, slice(None), H), read(d_out_ref, slice(None), V)
    q_marks, lse_T, delta_T = read_q_marks(spec, q_marks_ref, slice(None)), lse_ref[...], delta_ref[...]

    def step(j, dq, *, masked):
        rows = pl.ds(j * block_k, block_k)
        k = read(k_ref, rows, H)
        s_TS, slope_TS = logits(spec, dot_pieces(q, k))
        if masked:
            s_TS = jnp.where(seen(spec, q_marks, read_k_marks(spec, k_marks_ref, rows)), s_TS, -jnp.inf)
        ds_TS = jnp.exp2(s_TS - lse_T[:, None]) * (dot_pieces(d_out, read(v_ref, rows, V)) - delta_T[:, None])
        ds_TS = (ds_TS if slope_TS is None else ds_TS * slope_TS).astype(k_ref.dtype)
        return tuple(total + dot(ds_TS, x) for total, x in zip(dq, k, strict=True))

    total = in_three(ranges_ref, step, zeros(T, H, q_ref.dtype))
    write(dq_ref, tuple(x * spec.scale for x in total), H)


def dkv(
    q_ref, k_ref, v_ref, q_marks_ref, k_marks_ref, ranges_ref, lse_ref, delta_ref, d_out_ref, dk_ref, dv_ref,
    *, spec: Spec, block_q: int,
):  # fmt: skip
    """``dk = scale dS^T q`` and ``dv = P^T d_out``; q, lse, delta, d_out have a leading axis, the heads of the group.

    Everything is computed with keys first, which gives the transposed operands without a transposition.
    """
    (S, H), V = k_ref.shape, v_ref.shape[1]
    k, v, k_marks = (
        read(k_ref, slice(None), H),
        read(v_ref, slice(None), V),
        read_k_marks(spec, k_marks_ref, slice(None)),
    )

    def head(g, carry):
        def read_head(ref, rows, size):
            return tuple(ref[g, rows, pl.ds(start, length)] for start, length in pieces(size, ref.dtype))

        def step(i, carry, *, masked):
            dk, dv = carry
            rows = pl.ds(i * block_q, block_q)
            q, d_out = read_head(q_ref, rows, H), read_head(d_out_ref, rows, V)
            s_ST, slope_ST = logits(spec, dot_pieces(k, q))
            if masked:
                found = seen(spec, read_q_marks(spec, q_marks_ref, rows), k_marks, keys_first=True)
                s_ST = jnp.where(found, s_ST, -jnp.inf)
            p_ST = jnp.exp2(s_ST - lse_ref[g, rows][None])
            p_cast = p_ST.astype(d_out_ref.dtype)
            dv = tuple(total + dot(p_cast, x) for total, x in zip(dv, d_out, strict=True))
            ds_ST = p_ST * (dot_pieces(v, d_out) - delta_ref[g, rows][None])
            ds_ST = (ds_ST if slope_ST is None else ds_ST * slope_ST).astype(q_ref.dtype)
            return tuple(total + dot(ds_ST, x) for total, x in zip(dk, q, strict=True)), dv

        return in_three(ranges_ref, step, carry)

    start = zeros(S, H, k_ref.dtype), zeros(S, V, v_ref.dtype)
    dk, dv = lax.fori_loop(0, q_ref.shape[0], head, start)
    write(dk_ref, tuple(x * spec.scale for x in dk), H)
    write(dv_ref, dv, V)
