"""The cache of incremental decoding: per layer, preallocated, no larger than the layer's window.

Letters: B rows, T tokens of a call, S slots, P prompt slots.  Every array of a layer is ``[B, *, S, *]``: keys and
values ``[B, K, S, H]``, latents ``[B, 1, S, C]``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from jaxtrain.types import Array, record

Entry = Mapping[str, Array]  # one layer's arrays


@record
class Cache:
    """What every layer remembers of the tokens that each row has read.

    The token at position p of a row lies in slot ``p % S`` of a layer with S slots, so that a sliding window of W
    positions takes W slots however long the text grows.
    layers: one mapping a layer.  lengths: int32 ``[B]``, tokens read so far.
    """

    layers: tuple[dict[str, Array], ...]
    lengths: Array


def init_cache(config: Any, batch: int, length: int, dtype: Any = None) -> Cache:
    """An empty cache for rows of up to ``length`` tokens.

    Without slots (length 0) it takes whatever it is given: reading a prompt with it returns the prompt's own keys and
    values, for ``insert`` to put in place.  Raises ValueError beyond the model's positions.
    """
    if length > config.max_positions:
        raise ValueError(
            f"a cache of {length} positions is longer than the model's max_positions={config.max_positions}"
        )
    dtype = jnp.dtype(dtype or config.compute_dtype)
    layers = tuple(
        {name: jnp.zeros((batch, *shape), dtype) for name, shape in layer.attention.cache_shapes(length).items()}
        for layer in config.spec().layers()
    )
    return Cache(layers=layers, lengths=jnp.zeros((batch,), jnp.int32))


def slot_positions(lengths: Array, slots: int) -> Array:
    """int32 ``[B, S]``: the position of the token that lies in each slot of a row of ``lengths`` tokens; negative where
    there is none."""
    last_B1 = lengths[:, None] - 1
    return last_B1 - (last_B1 - jnp.arange(slots, dtype=jnp.int32)) % slots


def write(old: Array, new: Array, positions: Array, segments: Array) -> Array:
    """Puts ``new [B, *, T, *]`` into the slots of its positions; padding (segment 0) goes nowhere.

    Of more tokens than slots only each row's last stay.
    """
    B, slots = old.shape[0], old.shape[2]
    valid = segments > 0
    last = jnp.max(jnp.where(valid, positions, -1), axis=1, keepdims=True)
    slot_BT = jnp.where(valid & (positions > last - slots), positions % slots, slots)  # past the end: dropped
    if new.shape[2] == 1:
        # One place for each row and head, of the array's last dimension alone.  XLA's TPU compiler wants a cache whose
        # places hold several heads in another order than attention reads it, and copies it whole in every step; its CPU
        # compiler makes of a scatter to a single place an update of a slice, and copies the cache four times.
        places = (jnp.arange(B)[:, None], jnp.arange(old.shape[1]), slot_BT)
        return old.at[places].set(new[:, :, 0].astype(old.dtype), mode="drop")
    rows_B1 = jnp.arange(B)[:, None]
    # Advanced indices on both sides of a slice come first: [B, T, *, *].
    return old.at[rows_B1, :, slot_BT].set(jnp.swapaxes(new, 1, 2).astype(old.dtype), mode="drop")


def insert(cache: Cache, rows: Array, fresh: Cache) -> Cache:
    """Replaces ``rows`` (int32 ``[b]``; a row past the end is dropped) by prompts read with a cache without slots."""

    def one(old: Array, new: Array) -> Array:
        slots, width = old.shape[2], new.shape[2]
        from_slot = jnp.clip(slot_positions(fresh.lengths, slots), 0, width - 1)
        moved = jnp.take_along_axis(new, from_slot[:, None, :, None], axis=2)
        return old.at[rows].set(moved.astype(old.dtype), mode="drop")

    layers = tuple(
        {name: one(old[name], new[name]) for name in old} for old, new in zip(cache.layers, fresh.layers, strict=True)
    )
    return Cache(layers=layers, lengths=cache.lengths.at[rows].set(fresh.lengths, mode="drop"))


def cache_bytes(layers: Sequence[Entry]) -> int:
    """How many bytes the arrays of a cache take."""
    return sum(array.size * array.dtype.itemsize for layer in layers for array in layer.values())
