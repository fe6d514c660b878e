"""The attention that models call: checks shapes, then hands over to a backend."""

from __future__ import annotations

import jax

from jaxtrain.kernels.attention import reference

BACKENDS = ("auto", "xla")


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKV: jax.Array,
    *,
    q_positions: jax.Array,
    k_positions: jax.Array,
    q_segments: jax.Array,
    k_segments: jax.Array,
    causal: bool = True,
    window: int = 0,
    softcap: float = 0.0,
    bias: jax.Array | None = None,
    in_order: bool = False,
    scale: float | None = None,
    backend: str = "auto",
) -> jax.Array:
    """Grouped-query attention within segments.

    q_BTNH: ``[B, T, N, H]``; k_BSKH: ``[B, S, K, H]`` with N a multiple of K; v_BSKV: ``[B, S, K, V]``.
    positions, segments: int32 ``[B, T]`` for queries and ``[B, S]`` for keys.  A query sees the keys of its own
    segment (0 is padding and sees nothing), and under ``causal`` only those at its own position or before.
    window: a query sees keys less than this many positions before it (and, without ``causal``, after it); 0: all.
    softcap: logits become ``softcap * tanh(logits / softcap)``; 0: unchanged.
    bias: float ``[N, T, S]`` or ``[B, N, T, S]``, added to the logits after ``scale``.
    in_order: promises that keys and queries are the same tokens, in the order of their positions within each segment,
        so that under ``causal`` no query sees a key that stands after it; work that this rules out may be left undone.
    scale: multiplies the logits; ``H ** -0.5`` by default.
    backend: "xla", or "auto" for the best that runs here.
    Returns ``[B, T, N, V]`` in the type of ``q_BTNH``; rows that see nothing are 0.
    Raises ValueError for shapes that do not fit and for an unknown backend.
    """
    if backend not in BACKENDS:
        raise ValueError(f"attention backend {backend!r} is unknown; one of {BACKENDS}")
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    if k_BSKH.shape != (B, S, K, H) or v_BSKV.shape[:-1] != (B, S, K) or N % K:
        raise ValueError(
            f"attention: q {q_BTNH.shape}, k {k_BSKH.shape} and v {v_BSKV.shape} do not fit: want [B, T, N, H], "
            "[B, S, K, H] and [B, S, K, V] with N a multiple of K"
        )
    for name, x, want in (
        ("q_positions", q_positions, (B, T)),
        ("q_segments", q_segments, (B, T)),
        ("k_positions", k_positions, (B, S)),
        ("k_segments", k_segments, (B, S)),
        ("bias", bias, (N, T, S) if bias is None or bias.ndim == 3 else (B, N, T, S)),
    ):
        if x is not None and x.shape != want:
            raise ValueError(f"attention: {name} has shape {x.shape}, expected {want}")
    mask_BTS = reference.attention_mask(q_positions, k_positions, q_segments, k_segments, causal=causal, window=window)
    return reference.attention(
        q_BTNH,
        k_BSKH,
        v_BSKV,
        mask_BTS,
        scale=H**-0.5 if scale is None else scale,
        softcap=softcap,
        bias=bias,
        blocks=_causal_blocks(T) if causal and in_order else 1,
    )


def decode_attention(
    q_BNH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSV: jax.Array,
    visible_BS: jax.Array,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    bias: jax.Array | None = None,
) -> jax.Array:
    """One query a row over a cache laid out ``[B, K, S, H]``, whose keys and values are read once and never moved.

    visible_BS: bool, the slots that row b's query sees.  bias: float ``[B, N, S]``, added to the logits after
    ``scale``.  The rest as in :func:`attention`; returns ``[B, N, V]``.
    """
    H = q_BNH.shape[-1]
    return reference.decode_attention(
        q_BNH, k_BKSH, v_BKSV, visible_BS, scale=H**-0.5 if scale is None else scale, softcap=softcap, bias_BNS=bias
    )


def _causal_blocks(length: int) -> int:
    """Into how many blocks of at least 64 queries a sequence is cut; 1 where it is split over devices."""
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.shape["context"] > 1:
        return 1
    return next((n for n in (8, 4, 2) if length % n == 0 and length // n >= 64), 1)
