"""From logits to a sampled id and its log-probability.

B rows, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from jaxtrain.objectives.common import token_logps
from jaxtrain.types import Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """The sampling distribution, and the ids that end a completion.

    The logits are divided by ``temperature``; of the result the ``top_k`` most likely ids are kept (0: all),
    and of those, renormalised, the smallest number whose probabilities add up to at least ``top_p``.

    temperature: 0 takes the most likely id, and reports its log-probability under the unscaled, unfiltered
        softmax.
    stop_ids: any of them ends a completion, of which it is then the last token.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    stop_ids: tuple[int, ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "stop_ids", tuple(self.stop_ids))
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"Sampling.temperature must be a finite number, at least 0; got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"Sampling.top_k must be at least 0 (0 keeps every id); got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"Sampling.top_p must be above 0 and at most 1 (1 keeps every id); got {self.top_p}")
        bad = [i for i in self.stop_ids if isinstance(i, bool) or not isinstance(i, int) or i < 0]
        if bad:
            raise ValueError(f"Sampling.stop_ids must be token ids, integers of at least 0; got {bad}")

    @property
    def filters(self) -> bool:
        """Whether some ids are given probability 0."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1)


def filter_logits(logits_BV: Array, sampling: Sampling) -> Array:
    """Puts -inf in the place of the logits that ``sampling`` excludes; the rest stay as they are, float32.

    Ids of equal logits are ranked by id, the lower first, so exactly ``top_k`` ids remain and the last one
    that ``top_p`` needs is well defined.  The most likely id always remains.
    """
    logits_BV = logits_BV.astype(jnp.float32)
    if not sampling.filters:
        return logits_BV
    order_BV = jnp.argsort(-logits_BV, axis=-1, stable=True)
    sorted_BV = jnp.take_along_axis(logits_BV, order_BV, axis=-1) / sampling.temperature
    rank_V = jnp.arange(logits_BV.shape[-1])
    keep_BV = jnp.ones(logits_BV.shape, bool)
    if sampling.top_k > 0:
        keep_BV &= rank_V < sampling.top_k
    if sampling.top_p < 1:
        probabilities_BV = jax.nn.softmax(jnp.where(keep_BV, sorted_BV, -jnp.inf), axis=-1)
        # An id is needed when the more likely ones do not reach top_p without it.
        before_BV = jnp.pad(jnp.cumsum(probabilities_BV, axis=-1), ((0, 0), (1, 0)))[:, :-1]
        keep_BV &= (before_BV < sampling.top_p) | (rank_V == 0)
    rank_of_id_BV = jnp.argsort(order_BV, axis=-1)
    return jnp.where(jnp.take_along_axis(keep_BV, rank_of_id_BV, axis=-1), logits_BV, -jnp.inf)


def sample(key: Array, logits_BV: Array, sampling: Sampling) -> tuple[Array, Array]:
    """Samples one id a row.

    Row b draws with ``fold_in(key, b)``: what a row samples does not depend on the others.

    Returns ids, int32 ``[B]``, and their log-probabilities under the distribution sampled from, float32
    ``[B]``.
    """
    logits_BV = logits_BV.astype(jnp.float32)
    if sampling.temperature == 0:
        ids_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
        return ids_B, token_logps(logits_BV[:, None], ids_B[:, None])[:, 0]
    kept_BV = filter_logits(logits_BV, sampling)
    keys_B = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(logits_BV.shape[0]))
    ids_B = jax.vmap(jax.random.categorical)(keys_B, kept_BV / sampling.temperature).astype(jnp.int32)
    return ids_B, token_logps(kept_BV[:, None], ids_B[:, None], sampling.temperature)[:, 0]
