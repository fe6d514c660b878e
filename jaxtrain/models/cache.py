"""The key-value cache of incremental decoding: preallocated, written in place under jit."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from jaxtrain.types import Array, record


@record
class Cache:
    """Keys and values of what was read so far.

    keys, values: ``[L, B, S, K, H]`` in the compute dtype.  positions, segments: int32 ``[B, S]``; segment 0 marks
    an empty slot or padding, so nothing attends to it.  index: int32 scalar, the next slot to write, common to all
    rows (prompts of different lengths are padded on the left).
    """

    keys: Array
    values: Array
    positions: Array
    segments: Array
    index: Array


def init_cache(config: Any, batch: int, length: int, dtype: Any = None) -> Cache:
    """An empty cache of ``length`` slots a row.  Raises ValueError beyond the model's positions."""
    if length > config.max_positions:
        raise ValueError(
            f"a cache of {length} positions is longer than the model's max_positions={config.max_positions}"
        )
    shape = (config.num_layers, batch, length, config.num_kv_heads, config.head_dim)
    dtype = jnp.dtype(dtype or config.compute_dtype)
    return Cache(
        keys=jnp.zeros(shape, dtype),
        values=jnp.zeros(shape, dtype),
        positions=jnp.zeros((batch, length), jnp.int32),
        segments=jnp.zeros((batch, length), jnp.int32),
        index=jnp.zeros((), jnp.int32),
    )
