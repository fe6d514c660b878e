"""Layers of encoders and encoder-decoders: attention in both directions and across, and the block around it.

Letters: B rows, T tokens, S tokens of the other sequence, D model width, N heads, H head size.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
from flax import nnx

from jaxtrain.kernels.attention import api
from jaxtrain.models.attention import Attention, AttentionSpec, attend_cached
from jaxtrain.models.decoder_config import REMAT
from jaxtrain.models.layers import ROWS, Linear, MLPSpec, NormSpec, dropout
from jaxtrain.types import Array, Tokens


class Place(NamedTuple):
    """Where the tokens of ``[B, T]`` stand: int32 positions and segments of ``types.Tokens``."""

    positions: Array
    segments: Array


def place(tokens: Tokens) -> Place:
    """Of a batch's tokens."""
    return Place(tokens.positions, tokens.segments)


class OpenAttention(Attention):
    """Attention that may look both ways, or at another sequence."""

    def __init__(self, spec: AttentionSpec, config: Any, rngs: nnx.Rngs):
        super().__init__(spec, config, rngs)
        if spec.scale is not None:
            # T5 does not scale logits: its queries start that much smaller (1910.10683's code).
            D, N, H = config.d_model, spec.num_heads, spec.head_dim
            kinds = dict(dtype=config.param_dtype, compute=config.compute_dtype, bias=spec.bias)
            std = (D * H) ** -0.5 / spec.scale
            self.query = Linear(rngs, (D,), (N, H), ("embed", "q_heads", "head_dim"), std=std, **kinds)

    def to_itself(self, x, at: Place, *, causal, bias, constrain, cache):
        """``x``: ``[B, T, D]`` or ``[B * T, D]``.  Returns the same shape, and the new cache entry (None without one).

        bias: ``[N, T, T]`` or None; with a cache, see ``attend_cached``.
        cache: (the layer's entry, int32 ``[B]`` tokens read before), or None.
        """
        q_BTNH, k_BTNH, v_BTNH = self.heads(x, None, at.positions.shape)
        q_BTNH = constrain(q_BTNH, ("batch", "sequence", "act_heads", None))
        if cache is None:
            entry = None
            out_BTNH = self.attend(
                q_BTNH, k_BTNH, v_BTNH, at, at, rules=constrain.rules, causal=causal, in_order=True, bias=bias
            )
        else:
            out_BTNH, entry = attend_cached(
                q_BTNH,
                k_BTNH,
                v_BTNH,
                *at,
                *cache,
                window=0,
                backend=self.backend,
                rules=constrain.rules,
                scale=self.spec.scale,
                softcap=0.0,
                bias=bias,
            )
        return self.out(out_BTNH.reshape(*x.shape[:-1], *out_BTNH.shape[-2:])), entry

    def keys_values(self, memory, shape) -> dict[str, Array]:
        """What the tokens of ``memory`` (``[B, S, D]`` or ``[B * S, D]``) show: keys and values ``[B, N, S, H]``."""
        return {
            name: matrix(memory).reshape(*shape, self.spec.num_heads, -1).transpose(0, 2, 1, 3)
            for name, matrix in (("keys", self.key), ("values", self.value))
        }

    def to_other(self, x, at: Place, shown: dict[str, Array], shown_at: Place, *, constrain):
        """Each token sees what ``keys_values`` shows of its own segment in the other sequence."""
        q_BTNH = self.query(x).reshape(*at.positions.shape, self.spec.num_heads, -1)
        q_BTNH = constrain(q_BTNH, ("batch", "sequence", "act_heads", None))
        if q_BTNH.shape[1] == 1:
            visible_BS = (shown_at.segments == at.segments) & (shown_at.segments > 0)
            kinds = dict(scale=self.spec.scale, rules=constrain.rules)
            out_BTNH = api.decode_attention(q_BTNH, *shown.values(), visible_BS[:, None], **kinds)
        else:
            k_BSNH, v_BSNH = (array.transpose(0, 2, 1, 3) for array in shown.values())
            out_BTNH = self.attend(q_BTNH, k_BSNH, v_BSNH, at, shown_at, rules=constrain.rules)
        return self.out(out_BTNH.reshape(*x.shape[:-1], *out_BTNH.shape[-2:]))

    def attend(self, q_BTNH, k_BSNH, v_BSNH, at, other, *, rules, causal=False, in_order=False, bias=None):
        return api.attention(
            q_BTNH,
            k_BSNH,
            v_BSNH,
            q_positions=at.positions,
            k_positions=other.positions,
            q_segments=at.segments,
            k_segments=other.segments,
            causal=causal,
            in_order=in_order,
            scale=self.spec.scale,
            bias=bias,
            backend=self.backend,
            rules=rules,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockSpec:
    """One layer.

    post_norm: every sum of the residual stream is normalised (Vaswani et al., 1706.03762; BERT, BART); otherwise what
        each part reads (T5).
    causal: tokens see no later ones.  cross: between attention and feed-forward part, tokens attend to an encoder's.
    """

    attention: AttentionSpec
    mlp: MLPSpec
    norm: NormSpec
    post_norm: bool
    causal: bool = False
    cross: bool = False


class Block(nnx.Module):
    """See ``BlockSpec``."""

    def __init__(self, spec: BlockSpec, config: Any, rngs: nnx.Rngs):
        norm = partial(spec.norm.build, config.d_model, config.param_dtype)
        self.attention, self.attention_norm = OpenAttention(spec.attention, config, rngs), norm()
        if spec.cross:
            self.cross, self.cross_norm = OpenAttention(spec.attention, config, rngs), norm()
        self.mlp, self.mlp_norm = spec.mlp.build(config, rngs), norm()
        self.spec = spec
        self.dropout = config.dropout

    def __call__(self, x, *, at, constrain, bias=None, memory=None, memory_at=None, rng=None, cache=None):
        """``x``: ``[B, T, D]`` or ``[B * T, D]``.  Returns the new x and the layer's new cache entry.

        memory: the encoder's hidden states, like x; None where the cache entry has their keys and values.
        The rest as in ``OpenAttention.to_itself``.
        """
        keys = (None,) * 3 if rng is None else jax.random.split(rng, 3)
        entry = shown = None
        if cache is not None:
            held, lengths = cache
            cache = ({name: held[name] for name in ("keys", "values")}, lengths)

        def add(x, part, norm, key):
            read = x if self.spec.post_norm else norm(x)
            x = x + dropout(part(read), self.dropout, key)
            return constrain(norm(x) if self.spec.post_norm else x, (*ROWS[x.ndim], "act_embed"))

        def attend(read):
            nonlocal entry
            out, entry = self.attention.to_itself(
                read, at, causal=self.spec.causal, bias=bias, constrain=constrain, cache=cache
            )
            return out

        x = add(x, attend, self.attention_norm, keys[0])
        if self.spec.cross:
            if memory is None:
                shown = {name: held[f"cross_{name}"].astype(x.dtype) for name in ("keys", "values")}
            else:
                shown = self.cross.keys_values(memory, memory_at.positions.shape)
            across = partial(self.cross.to_other, at=at, shown=shown, shown_at=memory_at, constrain=constrain)
            x = add(x, across, self.cross_norm, keys[1])
        x = add(x, lambda read: self.mlp(read, constrain=constrain)[0], self.mlp_norm, keys[2])
        if entry is not None and shown is not None:
            entry = entry | {f"cross_{name}": array.astype(entry["keys"].dtype) for name, array in shown.items()}
        return x, entry


def run_blocks(config: Any, block: Any, params: Any, x: Array, *, rng: Array | None, **shared: Any) -> Array:
    """Scans ``block`` (a Functional's ``call``) over stacked parameters, as the config's ``remat`` says."""
    count = jax.tree.leaves(params)[0].shape[0]
    keys = None if rng is None else jax.random.split(rng, count)

    def call(layer, x, key):
        return block(layer, x, rng=key, **shared)[0]

    if config.remat != "none":
        call = jax.checkpoint(call, policy=REMAT[config.remat], prevent_cse=False)
    return jax.lax.scan(
        lambda x, scanned: (call(scanned[0], x, scanned[1]), None),
        x,
        (params, keys),
        unroll=min(config.scan_unroll, count),
    )[0]


def check_config(config: Any, sizes: tuple[str, ...], heads: tuple[str, ...]) -> None:
    """What every config of an encoder or an encoder-decoder must satisfy; raises ValueError naming the field."""
    for name in sizes:
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, found {getattr(config, name)}")
    if not 0.0 <= config.dropout < 1.0:
        raise ValueError(f"dropout must be in [0, 1), found {config.dropout}")
    if not 1 <= config.scan_unroll <= config.num_layers:
        raise ValueError(f"scan_unroll={config.scan_unroll} must be from 1 to num_layers={config.num_layers}")
    if set(config.heads) - set(heads) or len(set(config.heads)) != len(config.heads):
        raise ValueError(f"heads must name some of {heads}, once each, found {config.heads}")
    if config.remat not in REMAT:
        raise ValueError(f"remat={config.remat!r}; one of {tuple(REMAT)}")
    if config.attention not in api.BACKENDS:
        raise ValueError(f"attention={config.attention!r}; one of {api.BACKENDS}")
    for name in ("compute_dtype", "param_dtype"):
        if getattr(config, name) not in ("float32", "bfloat16"):
            raise ValueError(f"{name}={getattr(config, name)!r}; 'float32' or 'bfloat16'")


def check_rows(config: Any, tokens: Tokens) -> None:
    """Refuses rows longer than the model's positions."""
    T = tokens.ids.shape[1]
    if config.max_positions < T:
        raise ValueError(f"{T} tokens in a row, but the model's max_positions is {config.max_positions}")
