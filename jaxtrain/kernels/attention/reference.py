"""Attention in plain XLA: the definition that every faster backend must match in value and gradient."""

from __future__ import annotations

import jax
import jax.numpy as jnp

# Finite, so that a row with nothing to attend to gives a uniform softmax and finite gradients, not NaN.
MASKED = -1e30


def attention_mask(q_positions, k_positions, q_segments, k_segments, *, causal: bool) -> jax.Array:
    """bool ``[B, T, S]``: may query t see key s?  Same segment, not padding (segment 0), not later if causal."""
    mask = (q_segments[:, :, None] == k_segments[:, None, :]) & (k_segments[:, None, :] > 0)
    if causal:
        mask &= q_positions[:, :, None] >= k_positions[:, None, :]
    return mask


def attention(q_BTNH, k_BSKH, v_BSKH, mask_BTS, *, scale: float) -> jax.Array:
    """``softmax(scale * q k^T) v`` (Vaswani et al., 1706.03762) with grouped heads (2305.13245).

    Letters: B rows, T queries, S keys, N query heads, K key heads, G = N / K queries a key head, H head size.
    Softmax is float32; the result ``[B, T, N, H]`` has the type of ``q_BTNH``.  A query that may see nothing
    gets 0, and gives zero gradient.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = (q_BTNH * jnp.asarray(scale, q_BTNH.dtype)).reshape(B, T, K, N // K, H)
    logits_BKGTS = jnp.einsum("btkgh,bskh->bkgts", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32)
    logits_BKGTS = jnp.where(mask_BTS[:, None, None], logits_BKGTS, MASKED)
    probs_BKGTS = jax.nn.softmax(logits_BKGTS, axis=-1).astype(v_BSKH.dtype)
    out_BTKGH = jnp.einsum("bkgts,bskh->btkgh", probs_BKGTS, v_BSKH)
    seen_BT = jnp.any(mask_BTS, axis=-1)
    return jnp.where(seen_BT[:, :, None, None], out_BTKGH.reshape(B, T, N, H), 0).astype(q_BTNH.dtype)
