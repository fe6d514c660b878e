"""Attention of few queries a row over a long cache, on a TPU: every key and value that may be seen is read once.

Letters: B rows, T queries a row, K key heads, G query heads a key head, S cache slots, H size of queries and keys, V of
values, R queries of a key head: G times T, padded to whole registers.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P

from jaxtrain.kernels.attention.on_mesh import Layout
from jaxtrain.kernels.attention.reference import MASKED
from jaxtrain.kernels.attention.tpu_kernels import LANES, dot
from jaxtrain.kernels.target import target
from jaxtrain.sharding import ShardingRules

# Slots that are fetched at a time: long enough that a transfer costs more than starting it, short enough that little
# is fetched of what lies beyond the last visible slot.
CHUNK = 1024
# Rows of a register in bfloat16.
REGISTER = 16


def decode_attention(q_BNTH, k_BKSH, v_BKSV, visible_BTS, *, scale: float, softcap: float = 0.0) -> jax.Array:
    """``reference.decode_attention`` without a bias; chunks of the cache in which nothing is visible are not read."""
    B, N, T, H = q_BNTH.shape
    K, S, V = k_BKSH.shape[1], k_BKSH.shape[2], v_BKSV.shape[-1]
    G = N // K
    # One query's mask is every row's; of several each fills whole registers, and is repeated for every head.
    rows = 1 if T == 1 else -(-T // REGISTER) * REGISTER
    R = -(-G * rows // REGISTER) * REGISTER
    chunk = min(CHUNK, -(-S // LANES) * LANES)
    chunks = -(-S // chunk)
    q = jnp.pad(q_BNTH.reshape(B, K, G, T, H), ((0, 0), (0, 0), (0, 0), (0, rows - T), (0, 0)))
    q = jnp.pad(q.reshape(B, K, G * rows, H), ((0, 0), (0, 0), (0, R - G * rows), (0, 0)))
    seen_BTS = jnp.pad(visible_BTS, ((0, 0), (0, rows - T), (0, chunks * chunk - S)))
    some_BC = jnp.any(seen_BTS.reshape(B, rows, chunks, chunk), axis=(1, 3))
    first_B = jnp.argmax(some_BC, axis=1)
    last_B = jnp.where(jnp.any(some_BC, axis=1), chunks - 1 - jnp.argmax(some_BC[:, ::-1], axis=1), -1)

    def at(b, k, c, first, last):
        # A chunk that is skipped keeps the one before it in place.
        return b, k, jnp.clip(c, first[b], jnp.maximum(first[b], last[b])), 0

    out = pl.pallas_call(
        partial(_kernel, scale=scale, softcap=softcap, slots=S),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(B, K, chunks),
            in_specs=[
                pl.BlockSpec((1, 1, R, H), lambda b, k, c, *_: (b, k, 0, 0)),
                pl.BlockSpec((1, 1, chunk, H), at),
                pl.BlockSpec((1, 1, chunk, V), at),
                pl.BlockSpec((1, rows, chunk), lambda *at_: (at_[0], 0, at(*at_)[2])),
            ],
            out_specs=pl.BlockSpec((1, 1, R, V), lambda b, k, c, *_: (b, k, 0, 0)),
            scratch_shapes=[
                pltpu.VMEM((R, V), jnp.float32),
                pltpu.VMEM((R, LANES), jnp.float32),
                pltpu.VMEM((R, LANES), jnp.float32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((B, K, R, V), q_BNTH.dtype),
        cost_estimate=pl.CostEstimate(
            flops=2 * B * N * T * S * (H + V),
            transcendentals=B * N * T * S,
            bytes_accessed=B * K * S * (H + V) * k_BKSH.dtype.itemsize,
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=target()[0] != "tpu",
        name="decode_attention",
    )(first_B.astype(jnp.int32), last_B.astype(jnp.int32), q, k_BKSH, v_BKSV, seen_BTS.astype(jnp.int32))
    return out[:, :, : G * rows].reshape(B, K, G, rows, V)[:, :, :, :T].reshape(B, N, T, V)


def refusal(q_BNTH, k_BKSH, v_BKSV, rules: ShardingRules) -> str | None:
    """Why the kernel should not run on these arrays, or None."""
    if q_BNTH.shape[-1] % LANES or v_BKSV.shape[-1] % LANES:
        return f"the compiler would copy a cache whose heads are no multiple of {LANES} to lay it out for the kernel"
    layout = Layout.of(rules)
    if layout is not None and (
        q_BNTH.shape[0] % layout.ways(layout.rows) or k_BKSH.shape[1] % layout.ways(layout.heads)
    ):
        return "the mesh splits rows or key heads into unequal parts"
    return None


def on_mesh(q_BNTH, k_BKSH, v_BKSV, visible_BTS, *, rules: ShardingRules, **options) -> jax.Array:
    """``decode_attention`` of every device's own rows and heads."""
    layout = Layout.of(rules)
    function = partial(decode_attention, **options)
    if layout is None:
        return function(q_BNTH, k_BKSH, v_BKSV, visible_BTS)
    mine = P(layout.rows, layout.heads)
    return jax.shard_map(
        function,
        in_specs=(mine, mine, mine, P(layout.rows)),
        out_specs=mine,
        axis_names=layout.free,
        check_vma=False,
    )(q_BNTH, k_BKSH, v_BKSV, visible_BTS)


def _kernel(first_ref, last_ref, q_ref, k_ref, v_ref, visible_ref, out_ref, o_RV, m_R, l_R, *, scale, softcap, slots):
    """Online softmax (2112.05682) over the chunks of one row's cache, all queries of a key head at once."""
    b, c = pl.program_id(0), pl.program_id(2)
    chunk = k_ref.shape[2]

    @pl.when(c == 0)
    def _():
        o_RV[...] = jnp.zeros_like(o_RV)
        m_R[...] = jnp.full_like(m_R, MASKED)
        l_R[...] = jnp.zeros_like(l_R)

    @pl.when((c >= first_ref[b]) & (c <= last_ref[b]))
    def _():
        s = dot(q_ref[0, 0], k_ref[0, 0], (1, 1)) * scale
        if softcap:
            s = softcap * jnp.tanh(s / softcap)
        seen = visible_ref[0] > 0
        if seen.shape[0] > 1:
            seen = jnp.concatenate([seen] * (s.shape[0] // seen.shape[0]))
        s = jnp.where(seen, s, 2 * MASKED)
        m = m_R[:, :1]
        higher = jnp.maximum(m, jnp.max(s, axis=1, keepdims=True))
        p = jnp.exp(s - higher)
        alpha = jnp.exp(m - higher)
        # What stands beyond the cache's end is no number, and 0 times it would not be 0.
        inside = lax.broadcasted_iota(jnp.int32, v_ref.shape[2:], 0) < slots - c * chunk
        v = jnp.where(inside, v_ref[0, 0], 0)
        o_RV[...] = o_RV[...] * alpha + dot(p.astype(v.dtype), v, (1, 0))
        l_R[...] = l_R[...] * alpha + jnp.sum(p, axis=1, keepdims=True)
        m_R[...] = jnp.broadcast_to(higher, m_R.shape)

    @pl.when(c == pl.num_programs(2) - 1)
    def _():
        l = l_R[:, :1]  # noqa: E741
        out_ref[0, 0] = (o_RV[...] / jnp.where(l > 0, l, 1.0)).astype(out_ref.dtype)
