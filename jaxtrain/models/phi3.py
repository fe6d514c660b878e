"""Phi-3, 3.5 and Phi-4 (2404.14219), and how LongRoPE (2402.13753) chooses its frequencies.

Letters: B rows, T tokens, S cache slots, N query heads, K key heads, H head size, R turned dimensions of it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtrain.kernels.attention import api
from jaxtrain.models.attention import Attention, AttentionSpec, attend_cached
from jaxtrain.models.cache import slot_positions, write
from jaxtrain.models.decoder_config import DecoderConfig, LayerSpec
from jaxtrain.models.layers import MLPSpec
from jaxtrain.models.rope import Rope, apply_rope, rope_tables
from jaxtrain.types import Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phi3Config(DecoderConfig):
    """window: a token sees itself and the ``window - 1`` tokens before it; 0: all.

    rope: with "longrope" every token of a text of more than ``rope.original_max_positions`` tokens is turned by
        ``long_factor``, also the first ones, and every token of a shorter one by ``short_factor``.  A cached call knows
        only the text so far: see ``LongRopeAttention``.
    """

    window: int = 0
    norm_eps: float = 1e-5
    tie_embeddings: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.window < 0:
            raise ValueError(f"window must be 0 (none) or at least 1, found {self.window}")
        self.rope.rotary_dim(self.head_dim)

    def layer_spec(self) -> LayerSpec:
        attention = self.attention_spec(window=self.window)
        if self.rope.scaling == "longrope":
            attention = LongRopeSpec(**{field.name: getattr(attention, field.name) for field in FIELDS})
        return LayerSpec(attention=attention, mlp=MLPSpec(d_ff=self.d_ff), norm=self.norm())


FIELDS = dataclasses.fields(AttentionSpec)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongRopeSpec(AttentionSpec):
    """Attention whose rope depends on the length of the text."""

    def build(self, config: Any, rngs: nnx.Rngs) -> nnx.Module:
        return LongRopeAttention(self, config, rngs)

    def rope_table(self) -> tuple[Rope, int] | None:
        """None that layers share: cached keys are turned too, by tables of their own."""
        return None


class LongRopeAttention(Attention):
    """Attention with LongRoPE.

    Without a cache the longest position of a segment decides for all its tokens, as transformers' forward pass does
    for a batch.  The cache holds keys that are not turned yet, and every call turns them all as the text read so far
    asks for.  So decoding equals the whole text's forward pass as long as prompt and answer are on the same side of
    ``rope.original_max_positions``, whatever the size of the cache.  A text that crosses it while it is decoded
    is turned by ``long_factor`` from there on; what its first tokens computed stays as it was, which the forward pass
    of the whole text, where they too are turned by ``long_factor``, does not reproduce.  Where ``short_factor`` and
    ``long_factor`` are equal there is no such border.
    """

    def __call__(self, x, *, ropes, positions, segments, constrain, cache=None):
        spec = self.spec
        q_BTNH, k_BTKH, v_BTKH = self.heads(x, None, positions.shape)
        q_BTNH = constrain(q_BTNH, ("batch", "sequence", "act_heads", None))
        kinds = dict(window=spec.window, scale=spec.scale, softcap=spec.softcap)
        kinds |= dict(backend=self.backend, rules=constrain.rules)
        if cache is None:
            long_BT = text_lengths(positions, segments) > spec.rope.original_max_positions
            tables = rope_tables(spec.rope, positions, spec.head_dim, long_BT=long_BT)
            entry = None
            out_BTNH = api.attention(
                apply_rope(q_BTNH, *tables),
                apply_rope(k_BTKH, *tables),
                v_BTKH,
                q_positions=positions,
                k_positions=positions,
                q_segments=segments,
                k_segments=segments,
                in_order=True,
                **kinds,
            )
        else:
            entry, lengths = cache
            read_B1 = (lengths + jnp.sum(segments > 0, axis=1))[:, None]
            long_B1 = read_B1 > spec.rope.original_max_positions
            tables = rope_tables(spec.rope, positions, spec.head_dim, long_BT=long_B1)
            turned = dict(entry)
            slots = entry["keys"].shape[2]
            if slots:
                held_BS = slot_positions(lengths, slots)
                old = rope_tables(spec.rope, held_BS, spec.head_dim, long_BT=long_B1)  # [B, S, 1, R / 2]
                turned["keys"] = apply_rope(entry["keys"], *(jnp.swapaxes(table, 1, 2) for table in old))
            out_BTNH, _ = attend_cached(
                apply_rope(q_BTNH, *tables),
                apply_rope(k_BTKH, *tables),
                v_BTKH,
                positions,
                segments,
                turned,
                lengths,
                **kinds,
            )
            new = {"keys": k_BTKH.transpose(0, 2, 1, 3), "values": v_BTKH.transpose(0, 2, 1, 3)}
            entry = {name: write(entry[name], new[name], positions, segments) if slots else new[name] for name in new}
        return self.out(out_BTNH.reshape(*x.shape[:-1], *out_BTNH.shape[-2:])), entry


def text_lengths(positions: Array, segments: Array) -> Array:
    """int32 ``[B, T]``: how many positions the segment of each token has (0 for padding).

    positions, segments: int32 ``[B, T]``; segments are numbered from 1 to at most T.
    """
    count = jnp.where(segments > 0, positions + 1, 0)

    def row(count_T: Array, segments_T: Array) -> Array:
        return jax.ops.segment_max(count_T, segments_T, num_segments=count.shape[1] + 1)[segments_T]

    return jax.vmap(row)(count, segments)
