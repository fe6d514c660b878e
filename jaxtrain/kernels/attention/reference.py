"""Attention in plain XLA: the definition that every faster backend must match in value and gradient.

Letters: B rows, T queries, S keys, N query heads, K key heads, G = N / K queries a key head, H size of queries and
keys, V of values.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

# Finite, so that a row with nothing to attend to gives a uniform softmax and finite gradients, not NaN.
MASKED = -1e30


def attention_mask(q_positions, k_positions, q_segments, k_segments, *, causal: bool, window: int = 0) -> jax.Array:
    """bool ``[B, T, S]``: may query t see key s?  Same segment, not padding (segment 0), not later if causal, and
    less than ``window`` positions away if there is one."""
    mask = (q_segments[:, :, None] == k_segments[:, None, :]) & (k_segments[:, None, :] > 0)
    distance = q_positions[:, :, None] - k_positions[:, None, :]
    if causal:
        mask &= distance >= 0
    if window:
        mask &= (distance < window) & (distance > -window)
    return mask


def _cap(logits: jax.Array, softcap: float) -> jax.Array:
    """Gemma 2's soft cap (2408.00118)."""
    return softcap * jnp.tanh(logits / softcap) if softcap else logits


def attention(
    q_BTNH, k_BSKH, v_BSKV, mask_BTS, *, scale: float, softcap: float = 0.0, bias=None, blocks: int = 1
) -> jax.Array:
    """``softmax(cap(scale * q k^T) + bias) v`` (Vaswani et al., 1706.03762) with grouped heads (2305.13245).

    Softmax is float32; the result ``[B, T, N, V]`` has the type of ``q_BTNH``.  A query that may see nothing
    gets 0, and gives zero gradient.

    blocks: for S = T, where the mask lets no query see a key that stands after it: queries are taken in that many
        blocks, each with the keys up to its own end, so that most of what the mask would hide is never computed.
    """
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    q_BKGTH = (q_BTNH * jnp.asarray(scale, q_BTNH.dtype)).reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    k_BKSH, v_BKSV = k_BSKH.transpose(0, 2, 1, 3), v_BSKV.transpose(0, 2, 1, 3)
    # A leading 1 where the bias is every row's.
    bias_BKGTS = None if bias is None else bias.reshape(-1, K, N // K, T, S).astype(jnp.float32)

    def some(queries: slice, keys: slice):
        logits_BKGTS = jnp.einsum(
            "bkgth,bksh->bkgts", q_BKGTH[..., queries, :], k_BKSH[..., keys, :], preferred_element_type=jnp.float32
        )
        logits_BKGTS = _cap(logits_BKGTS, softcap)
        if bias_BKGTS is not None:
            logits_BKGTS += bias_BKGTS[..., queries, keys]
        logits_BKGTS = jnp.where(mask_BTS[:, None, None, queries, keys], logits_BKGTS, MASKED)
        probs_BKGTS = jax.nn.softmax(logits_BKGTS, axis=-1).astype(v_BKSV.dtype)
        return jnp.einsum("bkgts,bksv->bkgtv", probs_BKGTS, v_BKSV[..., keys, :])

    if blocks == 1:
        out_BKGTV = some(slice(None), slice(None))
    else:
        assert T % blocks == 0 and S == T, f"{blocks} blocks of {T} queries, {S} keys"
        size = T // blocks
        parts = [some(slice(start, start + size), slice(0, start + size)) for start in range(0, T, size)]
        out_BKGTV = jnp.concatenate(parts, axis=3)
    out_BTNV = out_BKGTV.transpose(0, 3, 1, 2, 4).reshape(B, T, N, -1)
    seen_BT = jnp.any(mask_BTS, axis=-1)
    return jnp.where(seen_BT[:, :, None, None], out_BTNV, 0).astype(q_BTNH.dtype)


def decode_attention(
    q_BNH, k_BKSH, v_BKSV, visible_BS, *, scale: float, softcap: float = 0.0, bias_BNS=None
) -> jax.Array:
    """``attention`` of one query a row over keys and values laid out ``[B, K, S, H]``.  Returns ``[B, N, V]``."""
    B, N, H = q_BNH.shape
    K = k_BKSH.shape[1]
    q_BKGH = (q_BNH * jnp.asarray(scale, q_BNH.dtype)).reshape(B, K, N // K, H)
    logits_BKGS = jnp.einsum("bkgh,bksh->bkgs", q_BKGH, k_BKSH, preferred_element_type=jnp.float32)
    logits_BKGS = _cap(logits_BKGS, softcap)
    if bias_BNS is not None:
        logits_BKGS += bias_BNS.reshape(logits_BKGS.shape).astype(jnp.float32)
    logits_BKGS = jnp.where(visible_BS[:, None, None], logits_BKGS, MASKED)
    probs_BKGS = jax.nn.softmax(logits_BKGS, axis=-1).astype(v_BKSV.dtype)
    out_BNV = jnp.einsum("bkgs,bksv->bkgv", probs_BKGS, v_BKSV).reshape(B, N, -1)
    return jnp.where(jnp.any(visible_BS, axis=-1)[:, None, None], out_BNV, 0).astype(q_BNH.dtype)
