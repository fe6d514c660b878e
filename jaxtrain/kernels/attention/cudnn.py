"""cuDNN's flash attention (``jax.nn.dot_product_attention``) for rows of one document; packed rows take ``gpu``.

cuDNN masks by index and by a length for each row; anything else it can only be told by an array of ``T x S``.  Which
rows are packed is known when the program runs, so both are compiled and the batch decides.  cuDNN's backward pass
gives no gradient to the log-sum-exp and takes none from outside, hence a function of its own in place of the pair
``forward`` and ``backward`` of ``flash``: it serves neither sinks nor a ring.

Letters: B rows, T queries, S keys, N query heads, K key heads, H size of a head.
"""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp

from jaxtrain.kernels.attention import gpu
from jaxtrain.kernels.attention.flash import flash
from jaxtrain.kernels.attention.masks import Marks, Spec
from jaxtrain.kernels.target import target

_IMPLEMENTATION = "cudnn"
_HEADS_OF_256 = re.compile(r"\b(H100|H200|H800|H20|GH200|B200|B300|GB200|GB300)\b")


def refusal(spec: Spec, q, k, v) -> str | None:
    """What cuDNN cannot do of this, or why it is not there."""
    platform, kind = target()
    if platform != "gpu":
        return f"cuDNN runs on NVIDIA GPUs, not on {platform}"
    if reason := gpu.refusal(spec, q, k, v):
        return reason
    if q.dtype != jnp.bfloat16:
        return f"cuDNN's attention takes bfloat16, not {q.dtype}"
    if spec.softcap:
        return "cuDNN's attention has no soft cap"
    if spec.low:
        return "cuDNN's attention takes no window here: it counts indices, where ours counts positions"
    if spec.high and not (spec.in_order and q.shape[2] == k.shape[2]):
        return "cuDNN's causal mask counts indices: it needs in_order, and as many queries as keys"
    if q.shape[-1] != v.shape[-1]:
        return f"cuDNN's attention takes values of the size of the keys, not {v.shape[-1]} beside {k.shape[-1]}"
    largest = 256 if _HEADS_OF_256.search(kind) else 128
    if q.shape[-1] % 8 or q.shape[-1] > largest:
        return f"cuDNN's attention takes heads of a multiple of 8 up to {largest} on {kind}, not {q.shape[-1]}"
    return None


def attention(spec: Spec, q_BNTH, k_BKSH, v_BKSH, marks: Marks) -> jax.Array:
    """``out [B, N, T, H]`` in the type of q, differentiable in q, k and v."""

    def by_cudnn(q_BNTH, k_BKSH, v_BKSH):
        out_BTNH = jax.nn.dot_product_attention(
            *(x.swapaxes(1, 2) for x in (q_BNTH, k_BKSH, v_BKSH)),
            scale=spec.scale,
            is_causal=spec.high,
            # A row of padding alone: one token, whose output is dropped below.
            query_seq_lengths=jnp.maximum(jnp.sum(marks.q_segments > 0, axis=1, dtype=jnp.int32), 1),
            key_value_seq_lengths=jnp.maximum(jnp.sum(marks.k_segments > 0, axis=1, dtype=jnp.int32), 1),
            implementation=_IMPLEMENTATION,
        )
        return jnp.where(marks.q_segments[:, None, :, None] > 0, out_BTNH.swapaxes(1, 2), 0).astype(q_BNTH.dtype)

    def by_kernels(q_BNTH, k_BKSH, v_BKSH):
        return flash(gpu, spec, q_BNTH, k_BKSH, v_BKSH, marks)[0]

    return jax.lax.cond(one_document(marks), by_cudnn, by_kernels, q_BNTH, k_BKSH, v_BKSH)


def one_document(marks: Marks) -> jax.Array:
    """bool: is every row one segment, the same for queries and keys, and then nothing but padding?"""
    segment_B1 = marks.q_segments[:, :1]

    def alone(segments_BL):
        real_BL = segments_BL > 0
        prefix_BL = jnp.arange(segments_BL.shape[1]) < jnp.sum(real_BL, axis=1, keepdims=True)
        return jnp.all((real_BL == prefix_BL) & (~real_BL | (segments_BL == segment_B1)))

    # Queries that see no key would need a length of 0.
    both = jnp.any(marks.q_segments > 0, axis=1) == jnp.any(marks.k_segments > 0, axis=1)
    return alone(marks.q_segments) & alone(marks.k_segments) & jnp.all(both)
