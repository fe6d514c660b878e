"""Attention in plain XLA: the definition that every faster backend must match in value and gradient.

Letters: B rows, T queries, S keys, N query heads, K key heads, G = N / K queries a key head, H size of queries and
keys, V of values.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

# Finite, so that a row with nothing to attend to gives a uniform softmax and finite gradients, not NaN.
MASKED = -1e30


def cap(logits: jax.Array, softcap: float) -> jax.Array:
    """Gemma 2's soft cap (2408.00118)."""
    return softcap * jnp.tanh(logits / softcap) if softcap else logits


def attention(
    q_BNTH, k_BKSH, v_BKSV, mask_BTS, *, scale: float, softcap: float = 0.0, bias=None, blocks: int = 1
) -> tuple[jax.Array, jax.Array]:
    """``softmax(cap(scale * q k^T) + bias) v`` (Vaswani et al., 1706.03762) with grouped heads (2305.13245).

    Returns ``[B, N, T, V]`` in the type of ``q_BNTH``, and the logarithm of the softmax's denominator, float32
    ``[B, N, T]``.  The softmax is float32.  A query that may see nothing gets 0 and -inf, and gives zero gradient.

    blocks: for S = T, where the mask lets no query see a key that stands after it: queries are taken in that many
        blocks, each with the keys up to its own end, so that most of what the mask would hide is never computed.
    """
    B, N, T, H = q_BNTH.shape
    K, S = k_BKSH.shape[1:3]
    q_BKGTH = (q_BNTH * jnp.asarray(scale, q_BNTH.dtype)).reshape(B, K, N // K, T, H)
    # A leading 1 where the bias is every row's.
    bias_BKGTS = None if bias is None else bias.reshape(-1, K, N // K, T, S).astype(jnp.float32)

    def some(queries: slice, keys: slice):
        logits_BKGTS = jnp.einsum(
            "bkgth,bksh->bkgts", q_BKGTH[..., queries, :], k_BKSH[..., keys, :], preferred_element_type=jnp.float32
        )
        logits_BKGTS = cap(logits_BKGTS, softcap)
        if bias_BKGTS is not None:
            logits_BKGTS += bias_BKGTS[..., queries, keys]
        logits_BKGTS = jnp.where(mask_BTS[:, None, None, queries, keys], logits_BKGTS, MASKED)
        probs_BKGTS = jax.nn.softmax(logits_BKGTS, axis=-1).astype(v_BKSV.dtype)
        lse_BKGT = jax.nn.logsumexp(logits_BKGTS, axis=-1)
        return jnp.einsum("bkgts,bksv->bkgtv", probs_BKGTS, v_BKSV[..., keys, :]), lse_BKGT

    if blocks == 1:
        out_BKGTV, lse_BKGT = some(slice(None), slice(None))
    else:
        assert T % blocks == 0 and S == T, f"{blocks} blocks of {T} queries, {S} keys"
        size = T // blocks
        parts = [some(slice(start, start + size), slice(0, start + size)) for start in range(0, T, size)]
        out_BKGTV, lse_BKGT = (jnp.concatenate(part, axis=3) for part in zip(*parts, strict=True))
    seen_BT = jnp.any(mask_BTS, axis=-1)[:, None]
    out_BNTV, lse_BNT = out_BKGTV.reshape(B, N, T, -1), lse_BKGT.reshape(B, N, T)
    out_BNTV = jnp.where(seen_BT[..., None], out_BNTV, 0).astype(q_BNTH.dtype)
    return out_BNTV, jnp.where(seen_BT, lse_BNT, -jnp.inf)


def decode_attention(
    q_BNTH, k_BKSH, v_BKSV, visible_BTS, *, scale: float, softcap: float = 0.0, bias_BNTS=None
) -> jax.Array:
    """``attention`` of few queries over many keys: all queries of a key head are the rows of one product, so that a
    cache is read once and never moved.  Returns ``[B, N, T, V]``."""
    B, N, T, H = q_BNTH.shape
    K = k_BKSH.shape[1]
    q_BKRH = (q_BNTH * jnp.asarray(scale, q_BNTH.dtype)).reshape(B, K, N // K * T, H)
    logits_BKRS = jnp.einsum("bkrh,bksh->bkrs", q_BKRH, k_BKSH, preferred_element_type=jnp.float32)
    logits_BKRS = cap(logits_BKRS, softcap)
    if bias_BNTS is not None:
        logits_BKRS += bias_BNTS.reshape(logits_BKRS.shape).astype(jnp.float32)
    visible_B1RS = jnp.tile(visible_BTS, (1, N // K, 1))[:, None] if T > 1 else visible_BTS[:, None]
    logits_BKRS = jnp.where(visible_B1RS, logits_BKRS, MASKED)
    probs_BKRS = jax.nn.softmax(logits_BKRS, axis=-1).astype(v_BKSV.dtype)
    out_BNTV = jnp.einsum("bkrs,bksv->bkrv", probs_BKRS, v_BKSV).reshape(B, N, T, -1)
    return jnp.where(jnp.any(visible_BTS, axis=-1)[:, None, :, None], out_BNTV, 0).astype(q_BNTH.dtype)
