"""Self-attention with grouped queries, as most families have it.

Letters: B rows, T tokens, S cache slots, D model width, N query heads, K key heads, H head size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx

from jaxtrain.kernels.attention import api
from jaxtrain.models.cache import Entry, slot_positions, write
from jaxtrain.models.layers import Linear, NormSpec, linear_kinds
from jaxtrain.models.rope import Rope, apply_rope
from jaxtrain.sharding import ShardingRules
from jaxtrain.types import Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """One layer's attention.

    rope: None where positions are not rotated in.
    bias, out_bias: on queries, keys and values; on the output.
    qk_norm: "none"; "head" normalises every head of queries and keys (2302.05442); "full" all heads together (OLMo 2,
        2501.00656).
    window: a token sees itself and the ``window - 1`` tokens before it; 0: all before it.
    softcap, scale: of the logits, as in ``kernels.attention.api``; scale None: ``head_dim ** -0.5``.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: Rope | None = None
    bias: bool = False
    out_bias: bool = False
    qk_norm: str = "none"
    norm: NormSpec = NormSpec()
    window: int = 0
    softcap: float = 0.0
    scale: float | None = None

    def __post_init__(self):
        assert self.qk_norm in ("none", "head", "full"), self.qk_norm

    def build(self, config: Any, rngs: nnx.Rngs) -> nnx.Module:
        return Attention(self, config, rngs)

    def rope_table(self) -> tuple[Rope, int] | None:
        """Which table of ``rope.rope_tables`` this layer reads: its Rope, and the head size."""
        return None if self.rope is None else (self.rope, self.head_dim)

    def cache_shapes(self, length: int) -> dict[str, tuple[int, ...]]:
        """A row's part of every array of the layer's cache, for texts of up to ``length`` tokens."""
        slots = min(length, self.window) if self.window else length
        shape = (self.num_kv_heads, slots, self.head_dim)
        return {"keys": shape, "values": shape}


class Attention(nnx.Module):
    """See ``AttentionSpec``."""

    def __init__(self, spec: AttentionSpec, config: Any, rngs: nnx.Rngs):
        D, N, K, H = config.d_model, spec.num_heads, spec.num_kv_heads, spec.head_dim
        kinds = linear_kinds(config)
        inner = dict(std=D**-0.5, bias=spec.bias, **kinds)
        self.query = Linear(rngs, (D,), (N, H), ("embed", "q_heads", "head_dim"), **inner)
        self.key = Linear(rngs, (D,), (K, H), ("embed", "kv_heads", "head_dim"), **inner)
        self.value = Linear(rngs, (D,), (K, H), ("embed", "kv_heads", "head_dim"), **inner)
        # GPT-2's rule: residual branches start smaller, so that depth does not blow the stream up.
        outer = dict(std=(N * H * 2 * config.num_layers) ** -0.5, bias=spec.out_bias, **kinds)
        self.out = Linear(rngs, (N, H), (D,), ("q_heads", "head_dim", "embed"), **outer)
        if spec.qk_norm != "none":
            full = spec.qk_norm == "full"
            self.query_norm = spec.norm.build(N * H if full else H, config.param_dtype)
            self.key_norm = spec.norm.build(K * H if full else H, config.param_dtype)
        self.spec = spec
        self.backend = config.attention

    def heads(self, x: Array, rope: tuple[Array, Array] | None, shape: tuple[int, int]) -> tuple[Array, Array, Array]:
        """Queries ``[B, T, N, H]``, keys and values ``[B, T, K, H]``, normalised and rotated."""
        q, k, v = self.query(x), self.key(x), self.value(x)
        if self.spec.qk_norm == "head":
            q, k = self.query_norm(q), self.key_norm(k)
        elif self.spec.qk_norm == "full":
            q, k = (
                norm(y.reshape(*y.shape[:-2], -1)).reshape(y.shape)
                for norm, y in ((self.query_norm, q), (self.key_norm, k))
            )
        q_BTNH, k_BTKH, v_BTKH = (y.reshape(*shape, *y.shape[-2:]) for y in (q, k, v))
        if rope is not None:
            q_BTNH, k_BTKH = apply_rope(q_BTNH, *rope), apply_rope(k_BTKH, *rope)
        return q_BTNH, k_BTKH, v_BTKH

    def __call__(self, x, *, ropes, positions, segments, constrain, cache=None):
        """``x``: ``[B, T, D]`` or ``[B * T, D]``, and so is the first result; the second is the layer's new cache.

        ropes: tables by ``AttentionSpec.rope_table``.
        cache: (the layer's ``Entry``, int32 ``[B]`` tokens read before), or None to attend within x.
        """
        spec = self.spec
        rope = None if spec.rope is None else ropes[spec.rope_table()]
        q_BTNH, k_BTKH, v_BTKH = self.heads(x, rope, positions.shape)
        q_BTNH = constrain(q_BTNH, ("batch", "sequence", "act_heads", None))
        kinds = dict(scale=spec.scale, softcap=spec.softcap)
        if cache is None:
            entry = None
            out_BTNH = api.attention(
                q_BTNH,
                k_BTKH,
                v_BTKH,
                q_positions=positions,
                k_positions=positions,
                q_segments=segments,
                k_segments=segments,
                window=spec.window,
                in_order=True,
                backend=self.backend,
                rules=constrain.rules,
                **kinds,
            )
        else:
            out_BTNH, entry = attend_cached(
                q_BTNH,
                k_BTKH,
                v_BTKH,
                positions,
                segments,
                *cache,
                window=spec.window,
                backend=self.backend,
                rules=constrain.rules,
                **kinds,
            )
        return self.out(out_BTNH.reshape(*x.shape[:-1], *out_BTNH.shape[-2:])), entry


def attend_cached(
    q_BTNH: Array,
    k_BTKH: Array,
    v_BTKH: Array,
    positions: Array,
    segments: Array,
    entry: Entry,
    lengths: Array,
    *,
    window: int,
    backend: str,
    rules: ShardingRules,
    scale: float | None,
    softcap: float,
    bias: Callable[[Array, Array], Array] | None = None,
) -> tuple[Array, dict[str, Array]]:
    """Attention of new tokens to a layer's cache and to each other; returns ``[B, T, N, H]`` and the new cache.

    positions, segments: int32 ``[B, T]``; segment 0 is padding, which is neither seen nor kept.
    bias: (positions of queries ``[B, T]``, of keys ``[B, S]``) -> ``[B, N, T, S]``, added to the logits.
    """
    new = {"keys": k_BTKH.transpose(0, 2, 1, 3), "values": v_BTKH.transpose(0, 2, 1, 3)}
    slots, T = entry["keys"].shape[2], q_BTNH.shape[1]
    # Written first where no token takes the slot of one that an earlier of the new tokens sees: without a window, and
    # of a single token, which may take that of the one that has just left its window.
    if slots and (T == 1 or (T <= api.FEW and not window)):
        entry = {name: write(entry[name], new[name], positions, segments) for name in new}
        held_BS = slot_positions(lengths + jnp.sum(segments > 0, axis=1), slots)
        held_B1S, positions_BT1 = held_BS[:, None], positions[..., None]
        visible_BTS = (held_B1S >= 0) & (held_B1S <= positions_BT1) & (segments[..., None] > 0)
        if window:
            visible_BTS &= held_B1S > positions_BT1 - window
        out_BTNH = api.decode_attention(
            q_BTNH,
            entry["keys"],
            entry["values"],
            visible_BTS,
            scale=scale,
            softcap=softcap,
            bias=None if bias is None else bias(positions, held_BS),
            rules=rules,
        )
        return out_BTNH, entry

    keys, values, k_positions, k_segments = k_BTKH, v_BTKH, positions, segments
    if slots:
        held_BS = slot_positions(lengths, slots)
        keys = jnp.concatenate([entry["keys"].transpose(0, 2, 1, 3).astype(keys.dtype), keys], axis=1)
        values = jnp.concatenate([entry["values"].transpose(0, 2, 1, 3).astype(values.dtype), values], axis=1)
        k_positions = jnp.concatenate([held_BS, positions], axis=1)
        # What a row has read is of the same segment as what it reads now.
        k_segments = jnp.concatenate([(held_BS >= 0) * jnp.max(segments, axis=1, keepdims=True), segments], axis=1)
        entry = {name: write(entry[name], new[name], positions, segments) for name in new}
    else:
        entry = new
    out_BTNH = api.attention(
        q_BTNH,
        keys,
        values,
        q_positions=positions,
        k_positions=k_positions,
        q_segments=segments,
        k_segments=k_segments,
        window=window,
        in_order=not slots,
        scale=scale,
        softcap=softcap,
        bias=None if bias is None else bias(positions, k_positions),
        backend=backend,
        rules=rules,
    )
    return out_BTNH, entry
