"""A Llama-style decoder: RMSNorm, RoPE, grouped-query attention, SwiGLU; layers stacked and scanned."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtrain.kernels.attention.api import BACKENDS
from jaxtrain.models.cache import Cache
from jaxtrain.models.functional import Model, functionalize, param, stack
from jaxtrain.models.heads import ScalarHead, lm_logits
from jaxtrain.models.layers import ROWS, Attention, RMSNorm, SwiGLU, dropout, normal
from jaxtrain.models.rope import Rope, rope_tables
from jaxtrain.sharding import DEFAULT_RULES, ShardingRules, constrain
from jaxtrain.types import Array, Outputs, Params, Tokens

HEADS = ("lm", "reward", "value")
REMAT = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Sizes and choices of a decoder.

    head_dim: 0 means ``d_model / num_heads``.  max_positions: the longest segment.  heads: which outputs exist,
    of "lm", "reward" and "value".  dropout: on the embedding and both residual branches, in training only.
    remat: "none" keeps every activation for the backward pass, "dots" the matrix products, "full" only each
    layer's input.  scan_unroll: layers compiled in line per loop turn; more is faster to run, slower to compile.
    """

    vocab_size: int
    num_layers: int
    d_model: int
    num_heads: int
    num_kv_heads: int
    d_ff: int
    max_positions: int
    head_dim: int = 0
    rope: Rope = Rope()
    tie_embeddings: bool = True
    qk_norm: bool = False
    dropout: float = 0.0
    norm_eps: float = 1e-6
    init_std: float = 0.02
    heads: tuple[str, ...] = ("lm",)
    remat: str = "none"
    scan_unroll: int = 1
    attention: str = "auto"
    compute_dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self):
        for name in ("vocab_size", "num_layers", "d_model", "num_heads", "num_kv_heads", "d_ff", "max_positions"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, found {getattr(self, name)}")
        if self.head_dim == 0:
            if self.d_model % self.num_heads:
                raise ValueError(f"d_model={self.d_model} is not a multiple of num_heads={self.num_heads}")
            object.__setattr__(self, "head_dim", self.d_model // self.num_heads)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: RoPE turns pairs")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), found {self.dropout}")
        if not 1 <= self.scan_unroll <= self.num_layers:
            raise ValueError(f"scan_unroll={self.scan_unroll} must be from 1 to num_layers={self.num_layers}")
        if not self.heads or set(self.heads) - set(HEADS) or len(set(self.heads)) != len(self.heads):
            raise ValueError(f"heads must name some of {HEADS} once each, found {self.heads}")
        if self.remat not in REMAT:
            raise ValueError(f"remat={self.remat!r}; one of {tuple(REMAT)}")
        if self.attention not in BACKENDS:
            raise ValueError(f"attention={self.attention!r}; one of {BACKENDS}")
        for name in ("compute_dtype", "param_dtype"):
            if getattr(self, name) not in ("float32", "bfloat16"):
                raise ValueError(f"{name}={getattr(self, name)!r}; 'float32' or 'bfloat16'")


class Embed(nnx.Module):
    """A table of one vector per token id."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        shape = (config.vocab_size, config.d_model)
        self.embedding = param(normal(rngs, shape, config.init_std, config.param_dtype), "vocab", "embed")


class LMHead(nnx.Module):
    """An output matrix of its own, where embeddings are not tied."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        shape = (config.d_model, config.vocab_size)
        self.kernel = param(normal(rngs, shape, config.d_model**-0.5, config.param_dtype), "embed", "vocab")


class Block(nnx.Module):
    """Pre-norm attention and MLP, each added to the residual stream."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        norm = partial(RMSNorm, config.d_model, eps=config.norm_eps, dtype=config.param_dtype)
        self.attention_norm, self.attention = norm(), Attention(config, rngs)
        self.mlp_norm, self.mlp = norm(), SwiGLU(config, rngs)
        self.dropout = config.dropout

    def __call__(self, x, *, rope, positions, segments, constrain, rng=None, cache=None):
        """``x``: ``[B, T, D]`` or ``[B * T, D]``."""
        first, second = (None, None) if rng is None else jax.random.split(rng)
        attended, kv = self.attention(
            self.attention_norm(x),
            rope=rope,
            positions=positions,
            segments=segments,
            constrain=constrain,
            cache=cache,
        )
        x = x + dropout(attended, self.dropout, first)
        x = x + dropout(self.mlp(self.mlp_norm(x), constrain), self.dropout, second)
        return constrain(x, (*ROWS[x.ndim], "act_embed")), kv


def build_decoder(config: DecoderConfig, rules: ShardingRules = DEFAULT_RULES) -> Model:
    """The model of ``config``, sharded by ``rules``."""
    parts = {
        "embed": functionalize(lambda rngs: Embed(config, rngs)),
        "layers": stack(functionalize(lambda rngs: Block(config, rngs)), config.num_layers),
        "final_norm": functionalize(
            lambda rngs: RMSNorm(config.d_model, eps=config.norm_eps, dtype=config.param_dtype)
        ),
    }
    if "lm" in config.heads and not config.tie_embeddings:
        parts["lm_head"] = functionalize(lambda rngs: LMHead(config, rngs))
    for head, std in (("reward", (config.d_model + 1) ** -0.5), ("value", 0.0)):
        if head in config.heads:
            parts[f"{head}_head"] = functionalize(
                lambda rngs, std=std: ScalarHead(config.d_model, rngs, std=std, dtype=config.param_dtype)
            )

    def init(key: Array) -> Params:
        # A part's key depends on its name alone, so that another head does not change the trunk.
        order = ("embed", "layers", "final_norm", "lm_head", "reward_head", "value_head")
        return {name: part.init(jax.random.fold_in(key, order.index(name))) for name, part in parts.items()}

    return Model(
        config=config,
        rules=rules,
        init=init,
        apply=partial(_forward, config, rules, parts),
        axes={name: part.axes for name, part in parts.items()},
    )


def _forward(
    config: DecoderConfig,
    rules: ShardingRules,
    parts: dict[str, Any],
    params: Params,
    tokens: Tokens,
    *,
    cache: Cache | None = None,
    rng: Array | None = None,
) -> Outputs:
    positions, segments = tokens.positions, tokens.segments
    T = tokens.ids.shape[1]
    if config.max_positions < T:
        raise ValueError(f"{T} tokens in a row, but the model's max_positions is {config.max_positions}")
    pin = partial(constrain, rules=rules)
    if config.dropout == 0.0:
        rng = None

    # Gathered over fsdp first: a lookup in a table split by width would leave the rows' sharding behind.
    embedding = pin(params["embed"]["embedding"].astype(config.compute_dtype), ("vocab", "act_embed"))
    x = jnp.take(embedding, tokens.ids, axis=0)
    # One dimension of rows rather than two: XLA's CPU backend takes the gradients of products of matrices in half the
    # time of those with several free dimensions (a SwiGLU of 256 x 688 over 2,048 tokens: 37 ms against 82), and no
    # other minds.  A sequence split over devices keeps its own dimension: merged, the two could not both be split.
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape["context"] == 1:
        x = x.reshape(-1, config.d_model)
    x = pin(x, (*ROWS[x.ndim], "act_embed"))
    if rng is not None:
        rng, embed_rng = jax.random.split(rng)
        x = dropout(x, config.dropout, embed_rng)
    shared = {
        "rope": rope_tables(config.rope, positions, config.head_dim),
        "positions": positions,
        "segments": segments,
        "constrain": pin,
    }
    if cache is None:
        x = _layers(config, parts["layers"].call, params["layers"], x, rng, shared)
    else:
        x, cache = _cached_layers(config, parts["layers"].call, params["layers"], x, shared, cache)
    hidden = parts["final_norm"].call(params["final_norm"], x)
    hidden_BTD = hidden.reshape(*tokens.ids.shape, -1)

    logits = rewards = values = None
    if "lm" in config.heads:
        if config.tie_embeddings:
            logits = lm_logits(hidden, embedding, transpose=True)
        else:
            logits = lm_logits(hidden, params["lm_head"]["kernel"], transpose=False)
        logits = logits.reshape(*tokens.ids.shape, -1)
        logits = pin(logits, ("batch", "sequence", "act_vocab"))
    if "reward" in config.heads:
        rewards = parts["reward_head"].call(params["reward_head"], hidden_BTD)
    if "value" in config.heads:
        values = parts["value_head"].call(params["value_head"], hidden_BTD)
    return Outputs(hidden=hidden_BTD, logits=logits, rewards=rewards, values=values, cache=cache)


def _layers(config, block, layers, x, rng, shared):
    def body(carry, scanned):
        layer, layer_rng = scanned
        return block(layer, carry, rng=layer_rng, **shared)[0], None

    if config.remat != "none":
        body = jax.checkpoint(body, policy=REMAT[config.remat], prevent_cse=False)
    keys = None if rng is None else jax.random.split(rng, config.num_layers)
    return jax.lax.scan(body, x, (layers, keys), unroll=config.scan_unroll)[0]


def _cached_layers(config, block, layers, x, shared, cache):
    """The cache rides in the loop's carry, so that XLA updates it in place instead of copying it every call."""

    def write(old, new):
        return jax.lax.dynamic_update_slice_in_dim(old, new, cache.index, axis=1)

    k_positions = write(cache.positions, shared["positions"])
    k_segments = write(cache.segments, shared["segments"])

    def body(carry, scanned):
        x, keys, values = carry
        layer, number = scanned
        mine = (keys[number], values[number], k_positions, k_segments, cache.index)
        x, (k, v) = block(layer, x, cache=mine, **shared)
        return (x, keys.at[number].set(k), values.at[number].set(v)), None

    numbers = jnp.arange(config.num_layers)
    carry = (x, cache.keys, cache.values)
    (x, keys, values), _ = jax.lax.scan(body, carry, (layers, numbers))
    index = cache.index + shared["positions"].shape[1]
    return x, Cache(keys=keys, values=values, positions=k_positions, segments=k_segments, index=index)
