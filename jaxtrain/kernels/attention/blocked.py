"""Attention in plain XLA with memory linear in the length: the backend that runs everywhere.

Online softmax over blocks of keys (2112.05682, 2205.14135), gradients from the saved log-sum-exp (FlashAttention-2,
2307.08691).  One row at a time, and of every row only the pairs of blocks that ``extents`` cannot rule out.

Letters: B rows, T queries, S keys, N query heads, K key heads, G = N / K, H size of queries and keys, V of values,
I blocks of Q queries, J blocks of C keys.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from jaxtrain.kernels.attention.extents import Extents, key_extents, may_meet, query_extents
from jaxtrain.kernels.attention.masks import Marks, Spec, visible
from jaxtrain.kernels.attention.reference import MASKED, cap
from jaxtrain.sharding import vary_like

QUERIES = KEYS = 256  # in a block


def refusal(spec: Spec, q, k, v) -> str | None:
    """It runs on all shapes and types."""
    return None


def forward(spec: Spec, q_BNTH, k_BKSH, v_BKSV, marks: Marks) -> tuple[jax.Array, jax.Array]:
    """See ``flash``."""
    N, T = q_BNTH.shape[1:3]

    def row(arrays):
        q_KGTH, k_KSH, v_KSV, marks = arrays
        q, k, v, marks = _in_blocks(q_KGTH, k_KSH, v_KSV, marks)
        queries, keys = query_extents(spec, marks), key_extents(marks)

        def block(_, i):
            numbers_J, count = _first_true(may_meet(_take(queries, i), keys))

            def add(j, carried):
                """2112.05682, and Algorithm 1 of 2307.08691: the old sums shrink as the maximum grows."""
                out_KGQV, sum_KGQ1, top_KGQ1 = carried
                j = numbers_J[j]
                mask_QC = _mask(spec, marks, i, j)
                logits_KGQC = jnp.where(mask_QC, _logits(spec, q[i], k[j]), MASKED)
                new_KGQ1 = jnp.maximum(top_KGQ1, jnp.max(logits_KGQC, axis=-1, keepdims=True))
                # A query that has seen nothing yet has MASKED for its maximum, where exp gives 1.
                weights_KGQC = jnp.where(mask_QC, jnp.exp(logits_KGQC - new_KGQ1), 0.0)
                shrink_KGQ1 = jnp.exp(top_KGQ1 - new_KGQ1)
                read_KGQV = _dot("kgqc,kcv->kgqv", weights_KGQC.astype(v.dtype), v[j])
                sum_KGQ1 = sum_KGQ1 * shrink_KGQ1 + jnp.sum(weights_KGQC, axis=-1, keepdims=True)
                return out_KGQV * shrink_KGQ1 + read_KGQV, sum_KGQ1, new_KGQ1

            shape = q.shape[1:-1]
            start = (jnp.zeros((*shape, v.shape[-1])), jnp.zeros((*shape, 1)), jnp.full((*shape, 1), MASKED))
            start = tuple(vary_like(x.astype(jnp.float32), *arrays[:3], *jax.tree.leaves(marks)) for x in start)
            out_KGQV, sum_KGQ1, top_KGQ1 = jax.lax.fori_loop(0, count, add, start)
            # A sum that is not 0 is at least 1, the largest weight; log(0) is the -inf of a query that sees nothing.
            out_KGQV = (out_KGQV / jnp.maximum(sum_KGQ1, 1.0)).astype(q.dtype)
            return None, (out_KGQV, (top_KGQ1 + jnp.log(sum_KGQ1))[..., 0])

        _, (out_IKGQV, lse_IKGQ) = jax.lax.scan(block, None, jnp.arange(q.shape[0]))
        return _joined(out_IKGQV, 3)[:, :, :T], _joined(lse_IKGQ, 3)[:, :, :T]

    out_BKGTV, lse_BKGT = jax.lax.map(row, (_grouped(q_BNTH, k_BKSH), k_BKSH, v_BKSV, marks))
    return out_BKGTV.reshape(-1, N, *out_BKGTV.shape[3:]), lse_BKGT.reshape(-1, N, T)


def backward(spec: Spec, q_BNTH, k_BKSH, v_BKSV, marks: Marks, lse_BNT, delta_BNT, d_out_BNTV):
    """See ``flash``; every logit is computed once, and dq is added up over the blocks of keys."""
    S = k_BKSH.shape[2]

    def row(arrays):
        q_KGTH, k_KSH, v_KSV, marks, *of_queries = arrays
        T = q_KGTH.shape[2]
        q, k, v, marks = _in_blocks(q_KGTH, k_KSH, v_KSV, marks)
        lse, delta, d_out = (_cut(x, 2, q.shape[-2]) for x in of_queries)
        queries, keys = query_extents(spec, marks), key_extents(marks)

        def zeros(shape):
            return vary_like(jnp.zeros(shape, jnp.float32), *arrays[:3], *jax.tree.leaves(marks), *of_queries)

        def block(dq_IKGQH, j):
            numbers_I, count = _first_true(may_meet(queries, _take(keys, j)))

            def add(i, carried):
                dq_IKGQH, dk_KCH, dv_KCV = carried
                i = numbers_I[i]
                mask_QC = _mask(spec, marks, i, j)
                logits_KGQC = _logits(spec, q[i], k[j])
                weights_KGQC = jnp.exp(jnp.where(mask_QC, logits_KGQC, -jnp.inf) - lse[i][..., None])
                d_weights_KGQC = _dot("kgqv,kcv->kgqc", d_out[i], v[j])
                d_logits_KGQC = weights_KGQC * (d_weights_KGQC - delta[i][..., None])
                if spec.softcap:
                    d_logits_KGQC *= 1.0 - jnp.square(logits_KGQC / spec.softcap)
                d_logits_KGQC = (d_logits_KGQC * spec.scale).astype(q.dtype)
                dv_KCV += _dot("kgqc,kgqv->kcv", weights_KGQC.astype(d_out.dtype), d_out[i])
                dk_KCH += _dot("kgqc,kgqh->kch", d_logits_KGQC, q[i])
                return dq_IKGQH.at[i].add(_dot("kgqc,kch->kgqh", d_logits_KGQC, k[j])), dk_KCH, dv_KCV

            start = (dq_IKGQH, zeros(k.shape[1:]), zeros(v.shape[1:]))
            dq_IKGQH, dk_KCH, dv_KCV = jax.lax.fori_loop(0, count, add, start)
            return dq_IKGQH, (dk_KCH.astype(k.dtype), dv_KCV.astype(v.dtype))

        dq_IKGQH, (dk_JKCH, dv_JKCV) = jax.lax.scan(block, zeros(q.shape), jnp.arange(k.shape[0]))
        dq_KGTH = _joined(dq_IKGQH, 3)[:, :, :T].astype(q.dtype)
        return dq_KGTH, _joined(dk_JKCH, 2)[:, :S], _joined(dv_JKCV, 2)[:, :S]

    grouped = (_grouped(x, k_BKSH) for x in (lse_BNT, delta_BNT, d_out_BNTV))
    dq, dk, dv = jax.lax.map(row, (_grouped(q_BNTH, k_BKSH), k_BKSH, v_BKSV, marks, *grouped))
    return dq.reshape(q_BNTH.shape), dk, dv


_dot = partial(jnp.einsum, preferred_element_type=jnp.float32)


def _logits(spec: Spec, q_KGQH, k_KCH) -> jax.Array:
    return cap(_dot("kgqh,kch->kgqc", q_KGQH, k_KCH) * spec.scale, spec.softcap)


def _mask(spec: Spec, marks: Marks, i, j) -> jax.Array:
    """bool ``[Q, C]``."""
    of_queries = (marks.q_segments, marks.q_low, marks.q_high)
    q_segments, q_low, q_high = (x[i][None] for x in of_queries)
    k_segments, k_positions = (x[j][None] for x in (marks.k_segments, marks.k_positions))
    return visible(
        Marks(q_segments=q_segments, q_low=q_low, q_high=q_high, k_segments=k_segments, k_positions=k_positions)
    )[0]


def _first_true(wanted: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The numbers of the blocks that are wanted, before those of the others; and how many are."""
    return jnp.argsort(~wanted), jnp.sum(wanted, dtype=jnp.int32)


def _take(extents: Extents, i) -> Extents:
    return jax.tree.map(lambda x: x[i], extents)


def _grouped(x_BNT, k_BKSH) -> jax.Array:
    """``[B, N, ...]`` as ``[B, K, G, ...]``."""
    B, K = k_BKSH.shape[:2]
    return x_BNT.reshape(B, K, -1, *x_BNT.shape[2:])


def _in_blocks(q_KGTH, k_KSH, v_KSV, marks: Marks):
    """``[I, K, G, Q, H]``, ``[J, K, C, H]``, ``[J, K, C, V]`` and the marks ``[I, Q]`` and ``[J, C]``.

    What is added to fill the last block is padding: segment 0.
    """
    Q, C = min(QUERIES, q_KGTH.shape[2]), min(KEYS, k_KSH.shape[1])
    marks = Marks(
        q_segments=_cut(marks.q_segments, 0, Q),
        q_low=_cut(marks.q_low, 0, Q),
        q_high=_cut(marks.q_high, 0, Q),
        k_segments=_cut(marks.k_segments, 0, C),
        k_positions=_cut(marks.k_positions, 0, C),
    )
    return _cut(q_KGTH, 2, Q), _cut(k_KSH, 1, C), _cut(v_KSV, 1, C), marks


def _cut(x: jax.Array, axis: int, size: int) -> jax.Array:
    """Pads ``axis`` with zeros to a multiple of ``size``; the blocks become the first dimension."""
    width = [(0, 0)] * x.ndim
    width[axis] = (0, -x.shape[axis] % size)
    x = jnp.pad(x, width)
    x = x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis, 0)


def _joined(x: jax.Array, axis: int) -> jax.Array:
    """The inverse of ``_cut``, less the padding; ``axis`` is that of a block's tokens."""
    x = jnp.moveaxis(x, 0, axis - 1)
    return x.reshape(*x.shape[: axis - 1], -1, *x.shape[axis + 1 :])
