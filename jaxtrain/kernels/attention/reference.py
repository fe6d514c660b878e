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


def attention(q_BTNH, k_BSKH, v_BSKH, mask_BTS, *, scale: float, blocks: int = 1) -> jax.Array:
    """``softmax(scale * q k^T) v`` (Vaswani et al., 1706.03762) with grouped heads (2305.13245).

    Letters: B rows, T queries, S keys, N query heads, K key heads, G = N / K queries a key head, H head size.
    Softmax is float32; the result ``[B, T, N, H]`` has the type of ``q_BTNH``.  A query that may see nothing
    gets 0, and gives zero gradient.

    blocks: for S = T, where the mask lets no query see a key that stands after it: queries are taken in that many
        blocks, each with the keys up to its own end, so that most of what the mask would hide is never computed.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BKGTH = (q_BTNH * jnp.asarray(scale, q_BTNH.dtype)).reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    k_BKSH, v_BKSH = k_BSKH.transpose(0, 2, 1, 3), v_BSKH.transpose(0, 2, 1, 3)

    def some(q_BKGTH, k_BKSH, v_BKSH, mask_BTS):
        logits_BKGTS = jnp.einsum("bkgth,bksh->bkgts", q_BKGTH, k_BKSH, preferred_element_type=jnp.float32)
        logits_BKGTS = jnp.where(mask_BTS[:, None, None], logits_BKGTS, MASKED)
        probs_BKGTS = jax.nn.softmax(logits_BKGTS, axis=-1).astype(v_BKSH.dtype)
        return jnp.einsum("bkgts,bksh->bkgth", probs_BKGTS, v_BKSH)

    if blocks == 1:
        out_BKGTH = some(q_BKGTH, k_BKSH, v_BKSH, mask_BTS)
    else:
        assert T % blocks == 0 and k_BSKH.shape[1] == T, f"{blocks} blocks of {T} queries, {k_BSKH.shape[1]} keys"
        cuts = [slice(start, start + T // blocks) for start in range(0, T, T // blocks)]
        parts = [
            some(
                q_BKGTH[..., cut, :],
                k_BKSH[..., : cut.stop, :],
                v_BKSH[..., : cut.stop, :],
                mask_BTS[:, cut, : cut.stop],
            )
            for cut in cuts
        ]
        out_BKGTH = jnp.concatenate(parts, axis=3)
    out_BTNH = out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)
    seen_BT = jnp.any(mask_BTS, axis=-1)
    return jnp.where(seen_BT[:, :, None, None], out_BTNH, 0).astype(q_BTNH.dtype)
