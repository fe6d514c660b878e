"""What encoder families share: their configuration's common part, and the trunk that runs the layers.

A family is a config; every layer sees all tokens of its segment and normalises each sum of the residual stream.

Letters: B rows, T tokens, D model width, E embedding width, L layers, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtrain.models.attention import AttentionSpec
from jaxtrain.models.blocks import Block, BlockSpec, check_config, check_rows, place, run_blocks
from jaxtrain.models.encoder_heads import Discriminator, Labels, MLMHead, Pooler, Table
from jaxtrain.models.functional import Functional, Model, functionalize, stack
from jaxtrain.models.heads import lazy_logits
from jaxtrain.models.layers import ACTIVATIONS, ROWS, Linear, MLPSpec, NormSpec, dropout, rows_of
from jaxtrain.models.lookup import lookup
from jaxtrain.sharding import DEFAULT_RULES, Constrain, ShardingRules
from jaxtrain.types import Array, Outputs, Params, Tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Sizes and choices of an encoder; families say which heads they have, and add fields.

    max_positions: the longest segment.  type_vocab_size: kinds of ``Tokens.types``; 0: the model does not read them.
    activation: of the feed-forward layers, a name in ``layers.ACTIVATIONS``.
    heads: which outputs exist.  None at all leaves the hidden states.
    The rest as in ``decoder.DecoderConfig``.
    """

    HEADS: ClassVar[tuple[str, ...]] = ()

    vocab_size: int
    num_layers: int
    d_model: int
    num_heads: int
    d_ff: int
    max_positions: int
    type_vocab_size: int = 2
    activation: str = "gelu"
    dropout: float = 0.0
    norm_eps: float = 1e-12
    init_std: float = 0.02
    heads: tuple[str, ...] = ()
    remat: str = "none"
    scan_unroll: int = 1
    attention: str = "auto"
    compute_dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self):
        sizes = ("vocab_size", "num_layers", "d_model", "num_heads", "d_ff", "max_positions")
        check_config(self, sizes, self.HEADS)
        if self.d_model % self.num_heads:
            raise ValueError(f"d_model={self.d_model} is not a multiple of num_heads={self.num_heads}")
        if self.type_vocab_size < 0:
            raise ValueError(f"type_vocab_size must be at least 0, found {self.type_vocab_size}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation={self.activation!r}; one of {tuple(ACTIVATIONS)}")

    def first_position(self) -> int:
        """The row of the table of positions that a segment's first token reads."""
        return 0

    def embedding_width(self) -> int:
        """Of the tables; where it is not ``d_model``, a matrix leads from one to the other."""
        return self.d_model

    def mlm_activation(self) -> str:
        """Inside the "mlm" head."""
        return self.activation

    def norm(self) -> NormSpec:
        """Every norm."""
        return NormSpec(kind="layer", eps=self.norm_eps)

    def block_spec(self) -> BlockSpec:
        """Every layer."""
        heads = {"num_heads": self.num_heads, "num_kv_heads": self.num_heads}
        return BlockSpec(
            attention=AttentionSpec(**heads, head_dim=self.d_model // self.num_heads, bias=True, out_bias=True),
            mlp=MLPSpec(d_ff=self.d_ff, activation=self.activation, gated=False, bias=True),
            norm=self.norm(),
            post_norm=True,
        )


class Projection(nnx.Module):
    """From the embeddings' width to the model's."""

    def __init__(self, config: EncoderConfig, rngs: nnx.Rngs):
        sides = ((config.embedding_width(),), (config.d_model,), ("features", "embed"))
        kinds = dict(dtype=config.param_dtype, compute=config.compute_dtype)
        self.dense = Linear(rngs, *sides, std=config.embedding_width() ** -0.5, bias=True, **kinds)

    def __call__(self, x: Array) -> Array:
        return self.dense(x)


def _parts(config: EncoderConfig) -> tuple[dict[str, Functional], Functional]:
    """Every part of the model by its name in the parameters, and one layer."""
    E, V, dtype = config.embedding_width(), config.vocab_size, config.param_dtype
    block = functionalize(lambda rngs: Block(config.block_spec(), config, rngs))

    def table(size, name):
        names = (name, "embed")
        return functionalize(lambda rngs: Table(size, E, names, rngs, std=config.init_std, dtype=dtype))

    parts = {
        "embed": table(V, "vocab"),
        "position_embed": table(config.max_positions + config.first_position(), "positions"),
        "embed_norm": functionalize(lambda rngs: config.norm().build(E, dtype)),
        "layers": stack(block, config.num_layers),
    }
    if config.type_vocab_size:
        parts["type_embed"] = table(config.type_vocab_size, "types")
    if config.d_model != E:
        parts["embed_projection"] = functionalize(lambda rngs: Projection(config, rngs))
    if "mlm" in config.heads:
        kinds = dict(width=E, activation=config.mlm_activation(), norm=config.norm())
        parts["mlm"] = functionalize(lambda rngs: MLMHead(config, rngs, **kinds))
    if {"pooler", "nsp"} & set(config.heads):
        parts["pooler"] = functionalize(lambda rngs: Pooler(config, rngs))
    if "nsp" in config.heads:
        parts["next_sentence"] = functionalize(lambda rngs: Labels(config, 2, rngs))
    if "discriminator" in config.heads:
        parts["discriminator"] = functionalize(lambda rngs: Discriminator(config, rngs))
    return parts, block


# A part's key depends on its place here alone, so that another head does not change the trunk.
ORDER = ("embed", "position_embed", "type_embed", "embed_norm", "embed_projection", "layers", "mlm")
ORDER = (*ORDER, "pooler", "next_sentence", "discriminator")


def build_encoder(config: EncoderConfig, rules: ShardingRules = DEFAULT_RULES) -> Model:
    """The model of ``config``, sharded by ``rules``."""
    parts, block = _parts(config)

    def init(key: Array) -> Params:
        return {name: part.init(jax.random.fold_in(key, ORDER.index(name))) for name, part in parts.items()}

    return Model(
        config=config,
        rules=rules,
        init=init,
        apply=partial(_forward, config, rules, parts, block),
        axes={name: part.axes for name, part in parts.items()},
        dtypes={name: part.dtypes for name, part in parts.items()},
    )


def _forward(
    config: EncoderConfig,
    rules: ShardingRules,
    parts: dict[str, Functional],
    block: Functional,
    params: Params,
    tokens: Tokens,
    *,
    cache: Any = None,
    rng: Array | None = None,
) -> Outputs:
    if cache is not None:
        raise ValueError("an encoder has no cache: every token sees those that follow, so it reads whole texts")
    check_rows(config, tokens)
    pin = Constrain(rules)

    def call(name, *args, **kwargs):
        return parts[name].call(params[name], *args, **kwargs)

    def embed(name, axis, ids):
        return lookup(params[name]["embedding"].astype(config.compute_dtype), ids, axis, pin)

    x = embed("embed", "vocab", tokens.ids)
    x = x + embed("position_embed", "positions", tokens.positions + config.first_position())
    if config.type_vocab_size:
        types_BT = jnp.zeros_like(tokens.ids) if tokens.types is None else tokens.types
        x = x + embed("type_embed", "types", types_BT)
    elif tokens.types is not None:
        raise ValueError("the batch has token types, but the model's type_vocab_size is 0")
    x = rows_of(call("embed_norm", x))
    rng, embed_rng = (None, None) if rng is None or not config.dropout else jax.random.split(rng)
    x = dropout(x, config.dropout, embed_rng)
    if "embed_projection" in parts:
        x = call("embed_projection", x)
    x = pin(x, (*ROWS[x.ndim], "act_embed"))
    hidden = run_blocks(config, block.call, params["layers"], x, rng=rng, at=place(tokens), constrain=pin)

    def full(array):
        return array.reshape(*tokens.ids.shape, *array.shape[hidden.ndim - 1 :])

    found = {"hidden": full(hidden)}
    if "mlm" in config.heads:
        matrix, bias = params["embed"]["embedding"], params["mlm"]["bias"]
        found["lm"] = lazy_logits(full(call("mlm", hidden)), matrix, bias=bias, table=True, rules=rules)
    if "pooler" in parts:
        pooled = call("pooler", hidden)
        found["pooled"] = full(pooled)
    if "nsp" in config.heads:
        found["next_sentence"] = full(call("next_sentence", pooled))
    if "discriminator" in config.heads:
        found["replaced"] = full(call("discriminator", hidden))
    return Outputs(**found)
