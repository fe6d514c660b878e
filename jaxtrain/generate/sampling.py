"""From logits to a sampled id and its log-probability.

B rows, V vocabulary, K ids that may be sampled.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from jaxtrain.objectives.common import token_logps
from jaxtrain.types import Array

# Ids are drawn in two steps, a piece of this many and then one of it: two short sums instead of one over V.
PIECE = 256
# How many of the likeliest ids are tried for top_p before all of them are sorted, which costs 20 times as much.
WINDOWS = (256, 4096)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """The sampling distribution, and the ids that end a completion.

    Logits of ids that stand in the prompt or the completion so far are divided by ``repetition_penalty`` where
    positive and multiplied by it where negative (1909.05858), then all are divided by ``temperature``.  Of the result
    the ``top_k`` most likely ids are kept (0: all); of those, renormalised, the smallest number whose probabilities
    add up to at least ``top_p``; and of those the ones at least ``min_p`` times as likely as the likeliest
    (2407.01082).  Ids of equal logits are ranked by id, the lower first; the likeliest always stays.

    temperature: 0 takes the most likely id, and reports its log-probability under the unscaled, unfiltered
        softmax.
    stop_ids: any of them ends a completion, of which it is then the last token.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop_ids: tuple[int, ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "stop_ids", tuple(self.stop_ids))
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"Sampling.temperature must be a finite number, at least 0; got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"Sampling.top_k must be at least 0 (0 keeps every id); got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"Sampling.top_p must be above 0 and at most 1 (1 keeps every id); got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"Sampling.min_p must be from 0 (keeps every id) to 1; got {self.min_p}")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise ValueError(
                f"Sampling.repetition_penalty must be a number above 0 (1 changes nothing); got"
                f" {self.repetition_penalty}"
            )
        bad = [i for i in self.stop_ids if isinstance(i, bool) or not isinstance(i, int) or i < 0]
        if bad:
            raise ValueError(f"Sampling.stop_ids must be token ids, integers of at least 0; got {bad}")

    @property
    def plain(self) -> bool:
        """Whether ids are drawn from the whole softmax at ``temperature``."""
        unfiltered = self.top_k == 0 and self.top_p == 1 and self.min_p == 0
        return self.temperature > 0 and unfiltered and self.repetition_penalty == 1


def penalise(logits_BV: Array, seen_BV: Array, penalty: float) -> Array:
    """``Sampling.repetition_penalty``.  seen_BV: bool, the ids of each row so far."""
    return jnp.where(seen_BV, jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty), logits_BV)


def sample(keys_B: Array, logits_BV: Array, sampling: Sampling, seen_BV: Array | None = None) -> tuple[Array, Array]:
    """Samples one id a row: a function of the row's key and logits, whatever the other rows are.

    keys_B: typed PRNG keys.  seen_BV: bool, for the repetition penalty; not read without one.
    Returns ids, int32 ``[B]``, and their log-probabilities under the distribution sampled from, float32 ``[B]``.
    """
    logits_BV = logits_BV.astype(jnp.float32)
    if sampling.repetition_penalty != 1:
        assert seen_BV is not None, "a repetition penalty needs the ids so far"
        logits_BV = penalise(logits_BV, seen_BV, sampling.repetition_penalty)
    if sampling.temperature == 0:
        ids_B = greedy(logits_BV)
        return ids_B, token_logps(logits_BV, ids_B)

    V, temperature = logits_BV.shape[-1], sampling.temperature
    if sampling.top_k == 0 and sampling.top_p == 1:
        if sampling.min_p:
            least_B1 = jnp.max(logits_BV, axis=-1, keepdims=True) + temperature * math.log(sampling.min_p)
            logits_BV = jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)
        ids_B = draw(keys_B, logits_BV / temperature)
        return ids_B, token_logps(logits_BV, ids_B, temperature)

    mass_B = jax.nn.logsumexp(logits_BV / temperature, axis=-1)

    def among(count: int) -> tuple[Array, Array]:
        """From the ``count`` likeliest ids."""
        sorted_BK, ids_BK = jax.lax.top_k(logits_BV, count)
        scaled_BK = sorted_BK / temperature
        keep_BK = jnp.ones(scaled_BK.shape, bool)
        if sampling.top_p < 1:
            total_B = jax.nn.logsumexp(scaled_BK, axis=-1) if sampling.top_k else mass_B
            keep_BK &= shares_before(scaled_BK, total_B) < sampling.top_p
        if sampling.min_p:
            keep_BK &= scaled_BK >= scaled_BK[:, :1] + math.log(sampling.min_p)
        kept_BK = jnp.where(keep_BK.at[:, 0].set(True), sorted_BK, -jnp.inf)
        chosen_B = draw(keys_B, kept_BK / temperature)
        ids_B = jnp.take_along_axis(ids_BK, chosen_B[:, None], axis=-1)[:, 0]
        return ids_B.astype(jnp.int32), token_logps(kept_BK, chosen_B, temperature)

    if sampling.top_k:
        return among(min(sampling.top_k, V))

    def widening(windows: tuple[int, ...]) -> tuple[Array, Array]:
        # What is kept of a window that holds top_p of the mass is what would be kept of all ids, so that it does not
        # matter to a row that another one made the window wider.
        if not windows:
            return among(V)
        likeliest_BK = jax.lax.top_k(logits_BV, windows[0])[0] / temperature
        held_B = jnp.sum(jnp.exp(likeliest_BK - mass_B[:, None]), axis=-1)
        enough = jnp.all(held_B > sampling.top_p + 1e-5)
        return jax.lax.cond(enough, lambda: among(windows[0]), lambda: widening(windows[1:]))

    return widening(tuple(window for window in WINDOWS if window < V))


def shares_before(scaled_BK: Array, total_B: Array) -> Array:
    """The probability of all that stand before each of ``scaled_BK``, of logarithms of mass with sum ``total_B``."""
    shares_BK = jnp.exp(scaled_BK - total_B[:, None])
    return jnp.pad(jnp.cumsum(shares_BK, axis=-1), ((0, 0), (1, 0)))[:, :-1]


def greedy(logits_BV: Array) -> Array:
    """int32 ``[B]``: the most likely id, the lowest of equals.

    Of pieces first: XLA's CPU backend takes the maximum of many with vector instructions, but not its place.
    """
    pieces_BCP = _pieces(logits_BV)
    piece_B = jnp.argmax(jnp.max(pieces_BCP, axis=-1), axis=-1)
    inside_BP = jnp.take_along_axis(pieces_BCP, piece_B[:, None, None], axis=1)[:, 0]
    return (piece_B * PIECE + jnp.argmax(inside_BP, axis=-1)).astype(jnp.int32)


def draw(keys_B: Array, logits_BK: Array) -> Array:
    """int32 ``[B]``: an index of each row with the probabilities of its softmax, by inversion of their sums.

    Two uniform numbers a row, one for the piece and one within it, take a thirtieth of the time of a Gumbel number for
    every id.  -inf is never drawn.
    """
    pieces_BCP = _pieces(jnp.exp(logits_BK - jnp.max(logits_BK, axis=-1, keepdims=True)), 0.0)
    uniform_B2 = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys_B)
    piece_B = _invert(jnp.sum(pieces_BCP, axis=-1), uniform_B2[:, 0])
    inside_BP = jnp.take_along_axis(pieces_BCP, piece_B[:, None, None], axis=1)[:, 0]
    return (piece_B * PIECE + _invert(inside_BP, uniform_B2[:, 1])).astype(jnp.int32)


def _pieces(values_BK: Array, fill: float = -jnp.inf) -> Array:
    """``[B, C, PIECE]``."""
    missing = -values_BK.shape[-1] % PIECE
    padded = jnp.pad(values_BK, ((0, 0), (0, missing)), constant_values=fill)
    return padded.reshape(len(values_BK), -1, PIECE)


def _invert(weights_BM: Array, uniform_B: Array) -> Array:
    """The first index whose running sum exceeds ``uniform_B`` of the whole; never one of weight 0."""
    sums_BM = jnp.cumsum(weights_BM, axis=-1)
    beyond_BM = (sums_BM > uniform_B[:, None] * sums_BM[:, -1:]) & (weights_BM > 0)
    # Rounding can leave the last sum a little below an earlier one, and so nothing beyond.
    return jnp.where(jnp.any(beyond_BM, axis=-1), jnp.argmax(beyond_BM, axis=-1), jnp.argmax(weights_BM, axis=-1))


def likeliest(logits_BV: Array, chosen_B: Array, count: int) -> tuple[Array, Array, Array]:
    """The model's own opinion (temperature 1, nothing excluded): the probability of ``chosen_B``, float32 ``[B]``, and
    the ``count`` likeliest ids and their probabilities, ``[B, count]``."""
    mass_B = jax.nn.logsumexp(logits_BV, axis=-1)
    top_BN, ids_BN = jax.lax.top_k(logits_BV, min(count, logits_BV.shape[-1]))
    chosen_B = jnp.take_along_axis(logits_BV, chosen_B[:, None], axis=-1)[:, 0]
    return jnp.exp(chosen_B - mass_B), ids_BN.astype(jnp.int32), jnp.exp(top_BN - mass_B[:, None])
