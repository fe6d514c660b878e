"""What encoder-decoder families share: their configuration's common part, and the trunk that runs both stacks.

Letters: B rows, T tokens of the decoder, S of the encoder (or cache slots), D model width, N heads, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxtrain.models.attention import AttentionSpec
from jaxtrain.models.blocks import (
    Block,
    BlockSpec,
    Place,
    check_config,
    check_rows,
    place,
    run_blocks,
)
from jaxtrain.models.encoder_heads import Bias, Matrix, Table
from jaxtrain.models.functional import Functional, Model, functionalize, stack
from jaxtrain.models.heads import lazy_logits
from jaxtrain.models.layers import ACTIVATIONS, ROWS, MLPSpec, NormSpec, dropout, rows_of
from jaxtrain.models.lookup import lookup
from jaxtrain.models.relative import Relative
from jaxtrain.models.seq2seq_cache import Seq2SeqCache
from jaxtrain.sharding import DEFAULT_RULES, Constrain, ShardingRules
from jaxtrain.types import Array, Outputs, Params, Seq2Seq, Tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seq2SeqSpec:
    """What a config means.

    block: every layer of the encoder; the decoder's differ by what ``BlockSpec`` calls causal and cross.
    relative: positions as T5 reads them; None: a table for either side, whose row ``first_position`` is a segment's
        first token's.
    embed_norm: embeddings are normalised.  final_norm: so is what the last layer leaves.
    embed_scale, output_scale: multiply the embeddings, and what the logits are read from.
    tied: the embeddings are the output matrix too.  logits_bias: a constant is added to the logits.
    """

    block: BlockSpec
    relative: Relative | None = None
    first_position: int = 0
    embed_norm: bool = False
    final_norm: bool = False
    embed_scale: float = 1.0
    output_scale: float = 1.0
    tied: bool = True
    logits_bias: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seq2SeqConfig:
    """Sizes and choices of an encoder-decoder; families say the rest in ``spec``.

    num_layers: of the encoder.  num_decoder_layers: 0 means as many.  head_dim: 0 means ``d_model / num_heads``.
    max_positions: the longest segment, of either side.  heads: ("lm",) or none.
    The rest as in ``encoder.EncoderConfig``.
    """

    vocab_size: int
    num_layers: int
    d_model: int
    num_heads: int
    d_ff: int
    max_positions: int
    num_decoder_layers: int = 0
    head_dim: int = 0
    activation: str = "gelu"
    dropout: float = 0.0
    norm_eps: float = 1e-5
    init_std: float = 0.02
    heads: tuple[str, ...] = ("lm",)
    remat: str = "none"
    scan_unroll: int = 1
    attention: str = "auto"
    compute_dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self):
        if self.num_decoder_layers == 0:
            object.__setattr__(self, "num_decoder_layers", self.num_layers)
        sizes = ("vocab_size", "num_layers", "num_decoder_layers", "d_model", "num_heads", "d_ff", "max_positions")
        check_config(self, sizes, ("lm",))
        if self.head_dim == 0:
            if self.d_model % self.num_heads:
                raise ValueError(f"d_model={self.d_model} is not a multiple of num_heads={self.num_heads}")
            object.__setattr__(self, "head_dim", self.d_model // self.num_heads)
        if self.head_dim < 0:
            raise ValueError(f"head_dim must be at least 0, found {self.head_dim}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation={self.activation!r}; one of {tuple(ACTIVATIONS)}")

    def spec(self) -> Seq2SeqSpec:
        """What the layers are and what surrounds them."""
        raise NotImplementedError

    def block_spec(
        self, norm: NormSpec, *, bias: bool, gated: bool, post_norm: bool, scale: float | None = None
    ) -> BlockSpec:
        """A layer of the config's sizes; ``bias`` everywhere or nowhere."""
        heads = {"num_heads": self.num_heads, "num_kv_heads": self.num_heads, "head_dim": self.head_dim}
        return BlockSpec(
            attention=AttentionSpec(**heads, bias=bias, out_bias=bias, scale=scale),
            mlp=MLPSpec(d_ff=self.d_ff, activation=self.activation, gated=gated, bias=bias),
            norm=norm,
            post_norm=post_norm,
        )


SIDES = ("encoder", "decoder")


def _parts(config: Seq2SeqConfig) -> tuple[dict[str, Any], dict[str, Functional]]:
    """The parts of the model by their names in the parameters (those of a side in a dict of their own), and one layer
    of either side."""
    spec, dtype = config.spec(), config.param_dtype
    D, V = config.d_model, config.vocab_size

    def table(size, width, names, std):
        return functionalize(lambda rngs: Table(size, width, names, rngs, std=std, dtype=dtype))

    def norm():
        return functionalize(lambda rngs: spec.block.norm.build(D, dtype))

    kinds = {"encoder": spec.block, "decoder": dataclasses.replace(spec.block, causal=True, cross=True)}
    blocks = {side: functionalize(lambda rngs, kind=kind: Block(kind, config, rngs)) for side, kind in kinds.items()}
    parts: dict[str, Any] = {"embed": table(V, D, ("vocab", "embed"), config.init_std)}
    for side, count in zip(SIDES, (config.num_layers, config.num_decoder_layers), strict=True):
        mine = {"layers": stack(blocks[side], count)}
        if spec.relative is None:
            rows = config.max_positions + spec.first_position
            mine["position_embed"] = table(rows, D, ("positions", "embed"), config.init_std)
        else:
            names = ("buckets", "q_heads")
            mine["relative_bias"] = table(spec.relative.buckets, config.num_heads, names, D**-0.5)
        if spec.embed_norm:
            mine["embed_norm"] = norm()
        if spec.final_norm:
            mine["final_norm"] = norm()
        parts[side] = mine
    if "lm" in config.heads:
        if not spec.tied:
            parts["lm_head"] = functionalize(lambda rngs: Matrix(D, V, rngs, dtype=dtype))
        if spec.logits_bias:
            parts["logits_bias"] = functionalize(lambda rngs: Bias(V, dtype=dtype))
    return parts, blocks


# A part's key depends on its place here alone, so that another head does not change the trunk.
ORDER = ("embed", *SIDES, "layers", "position_embed", "relative_bias", "embed_norm", "final_norm", "lm_head")
ORDER = (*ORDER, "logits_bias")


def build_seq2seq(config: Seq2SeqConfig, rules: ShardingRules = DEFAULT_RULES) -> Model:
    """The model of ``config``, sharded by ``rules``; its ``apply`` reads a ``Seq2Seq``."""
    parts, blocks = _parts(config)

    def init(key: Array) -> Params:
        def start(parts, key):
            return {
                name: start(part, own) if isinstance(part, dict) else part.init(own)
                for name, part in parts.items()
                for own in [jax.random.fold_in(key, ORDER.index(name))]
            }

        return start(parts, key)

    return Model(
        config=config,
        rules=rules,
        init=init,
        apply=partial(_forward, config, rules, parts, blocks),
        axes=jax.tree.map(lambda part: part.axes, parts, is_leaf=lambda part: isinstance(part, Functional)),
        dtypes=jax.tree.map(lambda part: part.dtypes, parts, is_leaf=lambda part: isinstance(part, Functional)),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Side:
    """The encoder or the decoder, with its parameters."""

    config: Seq2SeqConfig
    spec: Seq2SeqSpec
    parts: dict[str, Functional]
    block: Functional
    params: Params
    embedding: Array
    causal: bool
    constrain: Any

    def start(self, tokens: Tokens, rng: Array | None) -> Array:
        """The residual stream before the first layer."""
        check_rows(self.config, tokens)
        x = lookup(self.embedding, tokens.ids, "vocab", self.constrain)
        x = x * jnp.asarray(self.spec.embed_scale, x.dtype)
        if self.spec.relative is None:
            table = self.params["position_embed"]["embedding"].astype(self.config.compute_dtype)
            x = x + lookup(table, tokens.positions + self.spec.first_position, "positions", self.constrain)
        if self.spec.embed_norm:
            x = self.parts["embed_norm"].call(self.params["embed_norm"], x)
        x = rows_of(dropout(x, self.config.dropout, rng))
        return self.constrain(x, (*ROWS[x.ndim], "act_embed"))

    def finish(self, x: Array) -> Array:
        """What the last layer leaves, normalised where the family does so."""
        return self.parts["final_norm"].call(self.params["final_norm"], x) if self.spec.final_norm else x

    def run(self, tokens: Tokens, rng: Array | None, **across: Any) -> Array:
        """Whole rows."""
        rng, embed_rng = (None, None) if rng is None else jax.random.split(rng)
        bias = None
        if self.spec.relative is not None:
            table = self.params["relative_bias"]["embedding"].astype(jnp.float32)
            bias = self.spec.relative.row_bias(table, tokens.ids.shape[1], causal=self.causal)
        shared = {"at": place(tokens), "bias": bias, "constrain": self.constrain, **across}
        x = self.start(tokens, embed_rng)
        return self.finish(run_blocks(self.config, self.block.call, self.params["layers"], x, rng=rng, **shared))

    def run_cached(self, tokens: Tokens, cache: Seq2SeqCache, **across: Any) -> tuple[Array, Seq2SeqCache]:
        """What follows the tokens that the cache holds, layer by layer."""
        bias = None
        if self.spec.relative is not None:
            table = self.params["relative_bias"]["embedding"].astype(jnp.float32)
            bias = partial(self.spec.relative.bias, table, causal=self.causal)
        shared = {"at": place(tokens), "bias": bias, "constrain": self.constrain, **across}
        x, entries = self.start(tokens, None), []
        for i, held in enumerate(cache.layers):
            layer = jax.tree.map(lambda leaf, i=i: leaf[i], self.params["layers"])
            x, entry = self.block.call(layer, x, cache=(held, cache.lengths), **shared)
            entries.append(entry)
        read = jnp.sum(tokens.segments > 0, axis=1, dtype=jnp.int32)
        segments = across["memory_at"].segments
        return self.finish(x), Seq2SeqCache(layers=tuple(entries), lengths=cache.lengths + read, segments=segments)


def _forward(
    config: Seq2SeqConfig,
    rules: ShardingRules,
    parts: dict[str, Any],
    blocks: dict[str, Functional],
    params: Params,
    tokens: Seq2Seq,
    *,
    cache: Seq2SeqCache | None = None,
    rng: Array | None = None,
) -> Outputs:
    spec = config.spec()
    pin = Constrain(rules)
    embedding = params["embed"]["embedding"].astype(config.compute_dtype)
    encoder_rng, decoder_rng = (None, None) if rng is None or not config.dropout else jax.random.split(rng)
    if tokens.encoder is None and (cache is None or cache.segments is None):
        raise ValueError("Seq2Seq.encoder is None, and no cache holds what an encoder has read")

    encoder, decoder = (
        _Side(
            config=config,
            spec=spec,
            parts=parts[name],
            block=blocks[name],
            params=params[name],
            embedding=embedding,
            causal=name == "decoder",
            constrain=pin,
        )
        for name in SIDES
    )
    memory = encoded = memory_at = None
    if tokens.encoder is not None:
        memory = encoder.run(tokens.encoder, encoder_rng)
        memory_at = place(tokens.encoder)
        encoded = memory.reshape(*tokens.encoder.ids.shape, -1)
    else:
        # Across, positions play no part.
        memory_at = Place(positions=jnp.zeros_like(cache.segments), segments=cache.segments)
    across = {"memory": memory, "memory_at": memory_at}
    if cache is None:
        hidden = decoder.run(tokens.decoder, decoder_rng, **across)
    else:
        hidden, cache = decoder.run_cached(tokens.decoder, cache, **across)

    hidden_BTD = hidden.reshape(*tokens.decoder.ids.shape, -1)
    lm = None
    if "lm" in config.heads:
        read_BTD = hidden_BTD * jnp.asarray(spec.output_scale, hidden.dtype)
        own = "lm_head" in parts
        matrix = params["lm_head"]["kernel"] if own else params["embed"]["embedding"]
        # A constant of the model, which is not trained (BART's buffer).
        bias = jax.lax.stop_gradient(params["logits_bias"]["bias"]) if spec.logits_bias else None
        lm = lazy_logits(read_BTD, matrix, bias=bias, table=not own, rules=rules)
    return Outputs(hidden=hidden_BTD, lm=lm, cache=cache, encoded=encoded)
