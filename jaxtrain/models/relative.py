"""T5's relative positions (1910.10683): a bias on attention's logits, learned for each head and bucket of distances.

Letters: B rows, T queries, S keys, N heads.
"""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp

from jaxtrain.types import Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Relative:
    """How distances are sorted into buckets.

    buckets: how many; an encoder's first half is for keys before the query, its second for those after it.
    max_distance: from here on all distances share a bucket.
    """

    buckets: int = 32
    max_distance: int = 128

    def __post_init__(self):
        if self.buckets < 4 or self.buckets % 4:
            raise ValueError(f"relative_buckets must be a positive multiple of 4, found {self.buckets}")
        if self.max_distance <= self.buckets // 2:
            raise ValueError(
                f"relative_max_distance={self.max_distance} must exceed half of relative_buckets={self.buckets}"
            )

    def bucket(self, distance: Array, *, causal: bool) -> Array:
        """int32, of ``distance`` = the key's position - the query's.

        Half of a direction's buckets hold one distance each, the others grow by a constant factor.  ``causal`` gives
        all buckets to keys before the query.
        """
        count = self.buckets if causal else self.buckets // 2
        away = jnp.maximum(-distance, 0) if causal else jnp.abs(distance)
        exact = count // 2
        ratio = jnp.log(jnp.maximum(away, exact).astype(jnp.float32) / exact) / math.log(self.max_distance / exact)
        far = exact + (ratio * (count - exact)).astype(jnp.int32)
        bucket = jnp.where(away < exact, away, jnp.minimum(far, count - 1))
        return bucket if causal else bucket + jnp.where(distance > 0, count, 0)

    def row_bias(self, table: Array, length: int, *, causal: bool) -> Array:
        """``[N, T, T]`` for whole rows, from a table ``[buckets, N]``.

        One for all rows, since distances are those in the row: a segment's tokens stand together.
        """
        at = jnp.arange(length)
        return jnp.moveaxis(table[self.bucket(at[None, :] - at[:, None], causal=causal)], -1, 0)

    def bias(self, table: Array, q_positions: Array, k_positions: Array, *, causal: bool) -> Array:
        """``[B, N, T, S]`` for positions int32 ``[B, T]`` and ``[B, S]``."""
        distance_BTS = k_positions[:, None, :] - q_positions[:, :, None]
        return jnp.moveaxis(table[self.bucket(distance_BTS, causal=causal)], -1, 1)
