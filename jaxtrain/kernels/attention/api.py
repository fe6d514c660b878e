"""The attention that models call: checks shapes, chooses a backend, and hands over to it."""

from __future__ import annotations

import logging
from functools import cache

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxtrain.kernels.attention import blocked, cudnn, gpu, on_mesh, reference, tpu, tpu_decode
from jaxtrain.kernels.attention.masks import Marks, Spec, make_marks, visible, visible_share
from jaxtrain.kernels.target import target
from jaxtrain.sharding import DEFAULT_RULES, ShardingRules

logger = logging.getLogger(__name__)

# See ``flash``.
FLASH = {"blocked": blocked, "tpu": tpu, "gpu": gpu}
BACKENDS = ("auto", "xla", *FLASH, "cudnn")
# So many queries a row are worth ``decode_attention``: their products with the cache still wait for its memory.
FEW = 16
# What "auto" takes where it can.
PLATFORMS = {"tpu": "tpu", "gpu": "gpu"}


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
    q_prefix: jax.Array | None = None,
    softcap: float = 0.0,
    sinks: jax.Array | None = None,
    bias: jax.Array | None = None,
    in_order: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
    tiles: tuple[int, int] | None = None,
    rules: ShardingRules = DEFAULT_RULES,
    across: str = "auto",
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Grouped-query attention within segments.

    q_BTNH: ``[B, T, N, H]``; k_BSKH: ``[B, S, K, H]`` with N a multiple of K; v_BSKV: ``[B, S, K, V]``.
    positions, segments: int32 ``[B, T]`` for queries and ``[B, S]`` for keys.  A query sees the keys of its own
    segment (0 is padding and sees nothing), and under ``causal`` only those at its own position or before.
    window: a query sees keys less than this many positions before it (and, without ``causal``, after it); 0: all.
    q_prefix: int32 ``[B, T]``, for prefix language models (1910.10683) under ``causal``: so many tokens at the start of
        its segment are seen by the query wherever it stands.
    softcap: logits become ``softcap * tanh(logits / softcap)``; 0: unchanged.
    sinks: float ``[N]``, the logit of one more key of value 0 that each query of a head sees (2309.17453, as learned in
        2508.10925); a query that sees no other key still gets 0.
    bias: float ``[N, T, S]`` or ``[B, N, T, S]``, added to the logits after ``scale``.
    in_order: promises that keys and queries are the same tokens, in the order of their positions within each segment,
        so that under ``causal`` no query sees a key that stands after it; work that this rules out may be left undone.
    scale: multiplies the logits; ``H ** -0.5`` by default.
    backend: one of ``BACKENDS``; "auto" is the best that runs on the devices of the current mesh: the kernels in
        ``tpu`` or ``gpu``, which on a CPU are interpreted; elsewhere "blocked" for long rows, whose memory is linear
        in the length, and "xla" for short ones.  "cudnn" is NVIDIA's, for what it can do.
    tiles: queries and keys of a tile, in place of the backend's own choice.
    rules: which mesh axes split rows ("batch"), heads ("act_heads") and the sequence ("sequence").
    across: how a sequence that is split over devices is attended to, by all backends but "xla": one of
        ``on_mesh.ACROSS``; "auto" is the all-gather for two devices and the ring for more.
    Returns ``[B, T, N, V]`` in the type of ``q_BTNH``; rows that see nothing are 0.  With ``return_lse`` also the
    logarithm of the softmax's denominator, float32 ``[B, T, N]``; -inf for rows that see nothing.
    Raises ValueError for shapes that do not fit, for an unknown backend, and for one that cannot run here.
    """
    if backend not in BACKENDS:
        raise ValueError(f"attention backend {backend!r} is unknown; one of {BACKENDS}")
    if across not in on_mesh.ACROSS:
        raise ValueError(f"attention across {across!r} is unknown; one of {on_mesh.ACROSS}")
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
        ("q_prefix", q_prefix, (B, T)),
        ("k_positions", k_positions, (B, S)),
        ("k_segments", k_segments, (B, S)),
        ("sinks", sinks, (N,)),
        ("bias", bias, (N, T, S) if bias is None or bias.ndim == 3 else (B, N, T, S)),
    ):
        if x is not None and x.shape != want:
            raise ValueError(f"attention: {name} has shape {x.shape}, expected {want}")
    if q_prefix is not None and not causal:
        raise ValueError("attention: q_prefix says what a causal mask leaves visible, but causal is False")
    marks, low, high = make_marks(
        q_positions, k_positions, q_segments, k_segments, causal=causal, window=window, q_prefix=q_prefix
    )
    spec = Spec(
        scale=float(H**-0.5 if scale is None else scale),
        softcap=float(softcap),
        low=low,
        high=high,
        in_order=in_order and causal and q_prefix is None,
        share=visible_share(T, S, causal=causal, window=window),
        tiles=tiles,
    )
    named = zip(("query", "key", "value"), (q_BTNH, k_BSKH, v_BSKV), strict=True)
    qkv = [checkpoint_name(x.swapaxes(1, 2), name) for name, x in named]
    backend = _choose(backend, spec, *qkv, bias, return_lse or sinks is not None, rules)
    out_BNTV, lse_BNT = _run(backend, spec, *qkv, marks, bias, rules, across)
    if sinks is not None:
        out_BNTV, lse_BNT = _add_sinks(out_BNTV, lse_BNT, sinks)
    out_BTNV = out_BNTV.swapaxes(1, 2)
    return (out_BTNV, lse_BNT.swapaxes(1, 2)) if return_lse else out_BTNV


def _choose(backend: str, spec: Spec, q_BNTH, k_BKSH, v_BKSV, bias, lse: bool, rules: ShardingRules) -> str:
    """The backend to run.  Raises ValueError where the one asked for cannot; "auto" falls back, and says so once."""
    shapes = (q_BNTH, k_BKSH, v_BKSV)
    if backend not in ("auto", "xla"):
        if reason := _refusal(backend, spec, *shapes, bias, lse):
            raise ValueError(f"attention backend {backend!r} cannot run here: {reason}; 'auto' takes one that can")
        if backend in PLATFORMS.values() and target()[0] == "cpu":
            _say_once(f"attention backend {backend!r} is interpreted on a CPU, which is very slow and meant for tests")
        return backend
    if backend == "auto" and (own := PLATFORMS.get(target()[0])):
        reason = _refusal(own, spec, *shapes, bias, lse)
        if reason is None:
            return own
        other = "xla" if bias is not None else "blocked"
        _say_once(f"attention falls back from {own!r} to {other!r}: {reason}")
        return other
    # Blocks skip what the mask hides, which on a CPU pays from about 1,024 keys; the compiler does not know how to
    # split a sequence's attention, and would gather all logits.
    wanted = k_BKSH.shape[2] >= 1024 or on_mesh.splits_sequence(rules)
    return "blocked" if backend == "auto" and wanted and bias is None else "xla"


def _refusal(backend: str, spec: Spec, q_BNTH, k_BKSH, v_BKSV, bias, lse: bool) -> str | None:
    if bias is not None:
        return "only 'xla' adds a bias to the logits"
    if backend == "cudnn":
        return cudnn.refusal(spec, q_BNTH, k_BKSH, v_BKSV) or (
            "cuDNN's gradient has no part for the log-sum-exp, which sinks and return_lse need" if lse else None
        )
    return FLASH[backend].refusal(spec, q_BNTH, k_BKSH, v_BKSV)


@cache
def _say_once(message: str) -> None:
    logger.warning(message)


def _run(
    backend: str, spec: Spec, q_BNTH, k_BKSH, v_BKSV, marks: Marks, bias, rules: ShardingRules, across: str
) -> tuple[jax.Array, jax.Array | None]:
    """``[B, N, T, V]`` and the log-sum-exp, float32 ``[B, N, T]``, which cuDNN keeps to itself."""
    if backend == "cudnn":
        return cudnn.attention(spec, q_BNTH, k_BKSH, v_BKSV, marks), None
    if backend in FLASH:
        return on_mesh.attend(FLASH[backend], spec, q_BNTH, k_BKSH, v_BKSV, marks, rules=rules, across=across)
    T, S = q_BNTH.shape[2], k_BKSH.shape[2]
    found = reference.attention(
        q_BNTH,
        k_BKSH,
        v_BKSV,
        visible(marks),
        scale=spec.scale,
        softcap=spec.softcap,
        bias=bias,
        blocks=_causal_blocks(T) if spec.in_order and T == S else 1,
    )
    return checkpoint_name(found, "attention")


def _add_sinks(out_BNTV, lse_BNT, sinks_N) -> tuple[jax.Array, jax.Array]:
    """One more key of value 0: it only makes the denominator larger."""
    seen_BNT = ~jnp.isneginf(lse_BNT)
    lse = jnp.where(seen_BNT, lse_BNT, 0.0)
    with_sink_BNT = jnp.logaddexp(lse, sinks_N.astype(jnp.float32)[:, None])
    share_BNT = jnp.where(seen_BNT, jnp.exp(lse - with_sink_BNT), 0.0)
    out_BNTV = (out_BNTV.astype(jnp.float32) * share_BNT[..., None]).astype(out_BNTV.dtype)
    return out_BNTV, jnp.where(seen_BNT, with_sink_BNT, -jnp.inf)


def decode_attention(
    q_BTNH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSV: jax.Array,
    visible_BTS: jax.Array,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    bias: jax.Array | None = None,
    rules: ShardingRules = DEFAULT_RULES,
) -> jax.Array:
    """Few queries a row (see ``FEW``) over a cache laid out ``[B, K, S, H]``, whose keys and values are read once and
    never moved.  Not for training: the kernel for TPUs has no gradient.

    visible_BTS: bool, the slots that each query sees.  bias: float ``[B, N, T, S]``, added to the logits after
    ``scale``.  The rest as in :func:`attention`; returns ``[B, T, N, V]``.
    """
    scale = q_BTNH.shape[-1] ** -0.5 if scale is None else scale
    args = (q_BTNH.swapaxes(1, 2), k_BKSH, v_BKSV, visible_BTS)
    if target()[0] == "tpu" and bias is None and tpu_decode.refusal(*args[:3], rules) is None:
        out_BNTV = tpu_decode.on_mesh(*args, scale=scale, softcap=softcap, rules=rules)
    else:
        out_BNTV = reference.decode_attention(*args, scale=scale, softcap=softcap, bias_BNTS=bias)
    return out_BNTV.swapaxes(1, 2)


def _causal_blocks(length: int) -> int:
    """Into how many blocks of at least 64 queries a sequence is cut; 1 where it is split over devices."""
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.shape["context"] > 1:
        return 1
    return next((n for n in (8, 4, 2) if length % n == 0 and length // n >= 64), 1)
