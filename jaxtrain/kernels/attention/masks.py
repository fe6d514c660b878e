"""Who sees whom, in a form that every backend reads: a few integers a token, never an array of ``T x S``.

Letters: B rows, T queries, S keys.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.types import record

_FIRST, _LAST = -(2**31), 2**31 - 1


@record
class Marks:
    """Query t sees key s if ``k_segments[s] == q_segments[t] > 0`` and ``q_low[t] <= k_positions[s] <= q_high[t]``.

    All are int32: q_segments, q_low, q_high ``[B, T]``; k_segments, k_positions ``[B, S]``.
    """

    q_segments: jax.Array
    q_low: jax.Array
    q_high: jax.Array
    k_segments: jax.Array
    k_positions: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """What a backend knows while it is traced.

    scale: multiplies the logits.
    softcap: logits become ``softcap * tanh(logits / softcap)`` (2408.00118); 0: unchanged.
    low, high: whether ``q_low`` and ``q_high`` hide anything of a query's own segment; one that does not is not read.
    in_order: no query sees a key that stands after it (at a larger index); only for T = S.
    share: of all ``T x S`` pairs, how many the mask leaves where there is but one segment; for estimates of cost.
    tiles: queries and keys of a tile, for backends that have such; None: what their own table says.
    """

    scale: float
    softcap: float = 0.0
    low: bool = False
    high: bool = True
    in_order: bool = False
    share: float = 1.0
    tiles: tuple[int, int] | None = None


def make_marks(
    q_positions: jax.Array,
    k_positions: jax.Array,
    q_segments: jax.Array,
    k_segments: jax.Array,
    *,
    causal: bool,
    window: int = 0,
    q_prefix: jax.Array | None = None,
) -> tuple[Marks, bool, bool]:
    """The marks of a causal, bidirectional, windowed or prefix mask; and ``Spec.low``, ``Spec.high``.

    q_prefix: int32 ``[B, T]``, how many tokens of the query's segment are its prefix, all of which the query sees.
    """
    low, high = jnp.full_like(q_positions, _FIRST), jnp.full_like(q_positions, _LAST)
    if window:
        low, high = q_positions - (window - 1), q_positions + (window - 1)
    if causal:
        last = q_positions if q_prefix is None else jnp.maximum(q_positions, q_prefix - 1)
        high = jnp.minimum(high, last)
    marks = Marks(q_segments=q_segments, q_low=low, q_high=high, k_segments=k_segments, k_positions=k_positions)
    return jax.tree.map(lambda x: x.astype(jnp.int32), marks), bool(window), causal or bool(window)


def visible_share(T: int, S: int, *, causal: bool, window: int = 0) -> float:
    """``Spec.share`` of T queries that are the last of S tokens (the first, if there are more of them than keys)."""
    at = np.arange(T) + max(S - T, 0)
    first = np.maximum(at - (window - 1), 0) if window else np.zeros_like(at)
    last = at if causal else (at + (window - 1) if window else np.full_like(at, S - 1))
    return float(np.sum(np.maximum(np.minimum(last, S - 1) - first + 1, 0)) / (T * S))


def visible(marks: Marks) -> jax.Array:
    """bool ``[B, T, S]``: may query t see key s?"""
    mask_BTS = (marks.q_segments[:, :, None] == marks.k_segments[:, None, :]) & (marks.k_segments[:, None, :] > 0)
    mask_BTS &= marks.k_positions[:, None, :] <= marks.q_high[:, :, None]
    return mask_BTS & (marks.k_positions[:, None, :] >= marks.q_low[:, :, None])
