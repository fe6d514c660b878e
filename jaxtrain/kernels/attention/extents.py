"""Which blocks of queries can see anything of which blocks of keys, from a few integers a block.

Tokens are ordered by (segment, position), as they stand in packed rows.  A query sees keys from (segment, low) to
(segment, high), so a block of queries sees nothing of a block of keys whose first key comes after its last ``high``, or
whose last key comes before its first ``low``.  That is so in any order of the tokens; in the order of packed rows
nearly every block that passes holds something visible.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxtrain.kernels.attention.masks import Marks, Spec
from jaxtrain.types import record

_FIRST, _LAST = -(2**31), 2**31 - 1


@record
class Extents:
    """Per block, int32: the first and last (segment, position) of tokens that are not padding."""

    first_segment: jax.Array
    first: jax.Array
    last_segment: jax.Array
    last: jax.Array


def query_extents(spec: Spec, marks: Marks) -> Extents:
    """What queries see; marks are ``[..., tokens of a block]``, the result has one dimension less."""
    low = marks.q_low if spec.low else jnp.full_like(marks.q_low, _FIRST)
    high = marks.q_high if spec.high else jnp.full_like(marks.q_high, _LAST)
    return _extents(marks.q_segments, low, high)


def key_extents(marks: Marks) -> Extents:
    """Where keys stand; marks are ``[..., tokens of a block]``, the result has one dimension less."""
    return _extents(marks.k_segments, marks.k_positions, marks.k_positions)


def _extents(segments, low, high) -> Extents:
    # A block of padding begins after everything and ends before everything.
    first_segment = jnp.min(jnp.where(segments > 0, segments, _LAST), axis=-1)
    last_segment = jnp.max(jnp.where(segments > 0, segments, _FIRST), axis=-1)
    first = jnp.min(jnp.where(segments == first_segment[..., None], low, _LAST), axis=-1)
    last = jnp.max(jnp.where(segments == last_segment[..., None], high, _FIRST), axis=-1)
    return Extents(first_segment=first_segment, first=first, last_segment=last_segment, last=last)


def may_meet(queries: Extents, keys: Extents) -> jax.Array:
    """bool, broadcast over both: False only where no query of the block sees any key of the other."""
    begins = _not_after(keys.first_segment, keys.first, queries.last_segment, queries.last)
    return begins & _not_after(queries.first_segment, queries.first, keys.last_segment, keys.last)


def _not_after(segment, position, other_segment, other_position) -> jax.Array:
    return (segment < other_segment) | ((segment == other_segment) & (position <= other_position))
