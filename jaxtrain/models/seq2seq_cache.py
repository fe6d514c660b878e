"""The cache of an encoder-decoder's incremental decoding.

Letters: B rows, N heads, S slots, S' tokens of the encoder, H head size.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from jaxtrain.types import Array, record


@record
class Seq2SeqCache:
    """What decoding remembers: of each decoder layer the tokens it has read, and what the encoder shows it.

    layers: one mapping a layer.  keys, values: ``[B, N, S, H]``, the token at position p in slot p.
        cross_keys, cross_values: ``[B, N, S', H]``, of the encoder's S' tokens; absent until those have been read.
    lengths: int32 ``[B]``, decoder tokens read so far.
    segments: int32 ``[B, S']``, the encoder's; None until it has been read.
    """

    layers: tuple[dict[str, Array], ...]
    lengths: Array
    segments: Array | None = None


def init_seq2seq_cache(config: Any, batch: int, length: int, dtype: Any = None) -> Seq2SeqCache:
    """An empty cache for targets of up to ``length`` tokens.

    ``apply`` with a ``Seq2Seq`` that has an encoder's tokens reads those once and keeps what the decoder needs of them;
    later calls leave ``encoder`` None.  Raises ValueError beyond the model's positions.
    """
    if length > config.max_positions:
        raise ValueError(
            f"a cache of {length} positions is longer than the model's max_positions={config.max_positions}"
        )
    dtype = jnp.dtype(dtype or config.compute_dtype)
    shape = (batch, config.num_heads, length, config.head_dim)
    layers = tuple(
        {"keys": jnp.zeros(shape, dtype), "values": jnp.zeros(shape, dtype)} for _ in range(config.num_decoder_layers)
    )
    return Seq2SeqCache(layers=layers, lengths=jnp.zeros((batch,), jnp.int32))
