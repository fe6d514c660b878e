"""What decoder families share: one block, and the trunk that runs the layers.

A family is a config whose ``spec()`` says what every layer does; parameters of equal layers are stacked on a leading
axis and scanned.

Letters: B rows, T tokens, D model width, L layers.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxtrain.models.balance import auxiliary, join, move_biases
from jaxtrain.models.cache import Cache
from jaxtrain.models.decoder_config import DecoderConfig, LayerSpec, remat_policy
from jaxtrain.models.functional import Functional, Model, functionalize, param, stack
from jaxtrain.models.heads import LazyLogits, ScalarHead, lazy_logits
from jaxtrain.models.layers import ROWS, dropout, into_stream, normal, out_of_stream, rows_of, stream
from jaxtrain.models.lookup import lookup
from jaxtrain.models.moe import MoESpec
from jaxtrain.models.mtp import MTP, look_ahead
from jaxtrain.models.pipeline import Pipeline, run_pipeline, stages
from jaxtrain.models.rope import rope_tables
from jaxtrain.sharding import DEFAULT_RULES, Constrain, ShardingRules
from jaxtrain.types import Array, Outputs, Params, Tokens


class Embed(nnx.Module):
    """A table of one vector per token id (or position)."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs, size: int, name: str):
        self.embedding = param(normal(rngs, (size, config.d_model), config.init_std, config.param_dtype), name, "embed")


class LMHead(nnx.Module):
    """An output matrix of its own, where embeddings are not tied."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        shape = (config.d_model, config.vocab_size)
        self.kernel = param(normal(rngs, shape, config.d_model**-0.5, config.param_dtype), "embed", "vocab")


class Block(nnx.Module):
    """See ``LayerSpec``."""

    def __init__(self, spec: LayerSpec, config: DecoderConfig, rngs: nnx.Rngs):
        self.attention = spec.attention.build(config, rngs)
        self.mlp = spec.mlp.build(config, rngs)
        for place in spec.norms:
            names = {"pre": ("attention_norm", "mlp_norm"), "post": ("attention_post_norm", "mlp_post_norm")}[place]
            for name in names:
                setattr(self, name, spec.norm.build(config.d_model, config.param_dtype))
        self.norms = spec.norms
        self.dropout = config.dropout

    def __call__(self, x, *, ropes, positions, segments, constrain, rng=None, cache=None):
        """``x``: ``[B, T, D]`` or ``[B * T, D]``.  Returns the new x, the layer's new cache, and what its feed-forward
        part has to say about its balance (None for a dense one)."""
        first, second = (None, None) if rng is None else jax.random.split(rng)
        pre, post = "pre" in self.norms, "post" in self.norms
        x = checkpoint_name(stream(x, constrain), "stream")
        added, entry = self.attention(
            out_of_stream(self.attention_norm(x) if pre else x, constrain),
            ropes=ropes,
            positions=positions,
            segments=segments,
            constrain=constrain,
            cache=cache,
        )
        added = checkpoint_name(into_stream(added, constrain), "attention_out")
        x = x + dropout(self.attention_post_norm(added) if post else added, self.dropout, first)
        added, balance = self.mlp(
            out_of_stream(self.mlp_norm(x) if pre else x, constrain),
            segments=segments,
            constrain=constrain,
            decoding=cache is not None,
        )
        added = checkpoint_name(into_stream(added, constrain), "mlp_out")
        x = x + dropout(self.mlp_post_norm(added) if post else added, self.dropout, second)
        return stream(x, constrain), entry, balance


def build_decoder(config: DecoderConfig, rules: ShardingRules = DEFAULT_RULES) -> Model:
    """The model of ``config``, sharded by ``rules``."""
    spec = config.spec()
    parts = {"embed": functionalize(lambda rngs: Embed(config, rngs, config.vocab_size, "vocab"))}
    if spec.learned_positions:
        parts["position_embed"] = functionalize(lambda rngs: Embed(config, rngs, config.max_positions, "positions"))
    blocks: dict[LayerSpec, Functional] = {}
    for layer in spec.layers():
        if layer not in blocks:
            blocks[layer] = functionalize(lambda rngs, layer=layer: Block(layer, config, rngs))
    for name, layers in spec.stacks.items():
        assert all(blocks[layer].axes == blocks[layers[0]].axes for layer in layers), f"{name}: layers differ"
        axis = "pipeline" if name == spec.pipelined else "layers"
        parts[name] = stack(blocks[layers[0]], len(layers), axis)
    parts["final_norm"] = functionalize(lambda rngs: spec.norm.build(config.d_model, config.param_dtype))
    if spec.mtp is not None and "lm" in config.heads:
        last = spec.layers()[-1]
        parts["mtp"] = stack(
            functionalize(lambda rngs: MTP(partial(Block, last, config), spec.norm, config, rngs)), spec.mtp.depth
        )
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
        order = (*order, *sorted({"position_embed", *spec.stacks} - set(order)), "mtp")
        return {name: part.init(jax.random.fold_in(key, order.index(name))) for name, part in parts.items()}

    return Model(
        config=config,
        rules=rules,
        init=init,
        apply=partial(_forward, config, rules, parts, {layer: block.call for layer, block in blocks.items()}),
        axes={name: part.axes for name, part in parts.items()},
        dtypes={name: part.dtypes for name, part in parts.items()},
        logits=partial(_logits, config, rules) if "lm" in config.heads else None,
        balance=partial(move_biases, spec.balance.bias_rate) if any(map(_has_router_bias, spec.layers())) else None,
    )


def _has_router_bias(layer: LayerSpec) -> bool:
    return isinstance(layer.mlp, MoESpec) and layer.mlp.bias


def unstack(config: DecoderConfig, params: Params) -> Params:
    """Parameters with a tuple of layers in the place of each stack: ``apply`` takes both.

    Decoding reads every weight once a token; a slice of a stack would first be copied.
    """
    stacks = config.spec().stacks
    return params | {name: tuple(_layer(params[name], i) for i in range(len(stacks[name]))) for name in stacks}


def _layer(layers: Any, number: int) -> Params:
    return layers[number] if isinstance(layers, tuple) else jax.tree.map(lambda leaf: leaf[number], layers)


def _forward(
    config: DecoderConfig,
    rules: ShardingRules,
    parts: dict[str, Functional],
    blocks: dict[LayerSpec, Any],
    params: Params,
    tokens: Tokens,
    *,
    cache: Cache | None = None,
    rng: Array | None = None,
) -> Outputs:
    spec = config.spec()
    positions, segments = tokens.positions, tokens.segments
    T = tokens.ids.shape[1]
    if config.max_positions < T:
        raise ValueError(f"{T} tokens in a row, but the model's max_positions is {config.max_positions}")
    pin = Constrain(rules)
    if config.dropout == 0.0:
        rng = None

    embedding = params["embed"]["embedding"].astype(config.compute_dtype)

    def embed(ids: Array) -> Array:
        x = lookup(embedding, ids, "vocab", pin)
        return x if spec.embed_scale == 1.0 else x * jnp.asarray(spec.embed_scale, x.dtype)

    x = embed(tokens.ids)
    if spec.learned_positions:
        x = x + lookup(params["position_embed"]["embedding"].astype(config.compute_dtype), positions, "positions", pin)
    x = rows_of(x)
    x = pin(x, (*ROWS[x.ndim], "act_embed"))
    if rng is not None:
        rng, embed_rng = jax.random.split(rng)
        x = dropout(x, config.dropout, embed_rng)
    tables = {layer.attention.rope_table() for layer in spec.layers()} - {None}

    def surroundings(positions: Array, segments: Array, constrain: Constrain) -> dict[str, Any]:
        ropes = {table: rope_tables(table[0], positions, table[1]) for table in tables}
        return {"ropes": ropes, "positions": positions, "segments": segments, "constrain": constrain}

    shared = surroundings(positions, segments, pin)
    keys = None if rng is None else jax.random.split(rng, config.num_layers)
    start, entries, balance = 0, [], {}
    for name, layers in spec.stacks.items():
        mine = None if keys is None else keys[start : start + len(layers)]
        if cache is None and name == spec.pipelined and stages() > 1:
            x, balance[name] = _run_stages(config, layers, blocks, params[name], x, mine, tokens, surroundings, pin)
        elif cache is None:
            x, balance[name] = _run_layers(config, layers, blocks, params[name], x, keys=mine, shared=shared)
        else:
            x, new = _run_cached(layers, blocks, params[name], x, shared, cache, start)
            entries += new
        start += len(layers)
    if cache is not None:
        read = jnp.sum(segments > 0, axis=1, dtype=jnp.int32)
        cache = Cache(layers=tuple(entries), lengths=cache.lengths + read)
    hidden = out_of_stream(parts["final_norm"].call(params["final_norm"], x), pin)
    hidden_BTD = hidden.reshape(*tokens.ids.shape, -1)

    lm = rewards = values = None
    if "lm" in config.heads:
        lm = _lazy_logits(config, rules, params, hidden_BTD)
    if "reward" in config.heads:
        rewards = parts["reward_head"].call(params["reward_head"], hidden_BTD)
    if "value" in config.heads:
        values = parts["value_head"].call(params["value_head"], hidden_BTD)
    extra = auxiliary(spec.balance, balance)
    if "mtp" in parts and cache is None:
        extra = join(
            extra,
            look_ahead(
                spec.mtp,
                _with_remat(config, parts["mtp"].call),
                params["mtp"],
                hidden,
                tokens,
                embed=lambda ids: pin(embed(ids).reshape(hidden.shape), (*ROWS[hidden.ndim], "act_embed")),
                head=lambda x: _lazy_logits(config, rules, params, x.reshape(hidden_BTD.shape)),
                rng=rng,
                shared=shared,
            ),
        )
    return Outputs(hidden=hidden_BTD, lm=lm, rewards=rewards, values=values, cache=cache, auxiliary=extra)


def _with_remat(config: DecoderConfig, call: Any) -> Any:
    """``MTP`` as a function of (layer, hidden, embedded, rng, its other arguments), as ``config.remat`` wants it."""

    def whole(static, layer, hidden, embedded, rng, arrays):
        return call(layer, hidden, embedded, rng=rng, **arrays, **dict(static))

    if config.remat != "none":
        whole = jax.checkpoint(whole, policy=remat_policy(config), prevent_cse=False, static_argnums=0)

    def split(layer, hidden, embedded, rng, kwargs):
        static = (("constrain", kwargs["constrain"]),)
        return whole(static, layer, hidden, embedded, rng, {k: v for k, v in kwargs.items() if k != "constrain"})

    return split


def _lazy_logits(config: DecoderConfig, rules: ShardingRules, params: Params, hidden: Array) -> LazyLogits:
    """What next-token logits of ``hidden [..., D]`` are made of."""
    own = "lm_head" in params  # also where embeddings are tied, if decoding has made a copy of its own
    matrix = params["lm_head"]["kernel"] if own else params["embed"]["embedding"]
    kinds = {"softcap": config.spec().final_softcap, "backend": config.cross_entropy}
    return lazy_logits(hidden, matrix, table=not own, rules=rules, **kinds)


def _logits(config: DecoderConfig, rules: ShardingRules, params: Params, hidden: Array) -> Array:
    """``[..., D] -> float32 [..., V]``."""
    return _lazy_logits(config, rules, params, hidden).dense()


def _period(layers: tuple[LayerSpec, ...]) -> int:
    """After how many layers their kinds repeat."""
    return next(p for p in range(1, len(layers) + 1) if all(a == b for a, b in zip(layers, layers[p:], strict=False)))


def _run_layers(config, layers, blocks, params, x, *, keys, shared):
    """Scans over turns of ``_period`` layers; a last, incomplete turn is run in line.

    Returns x and what the layers say about their balance, stacked over layers (None for dense ones).
    """

    def call(spec, layer, x, key):
        x, _, balance = blocks[spec](layer, x, rng=key, **shared)
        return x, balance

    if config.remat != "none":
        call = jax.checkpoint(call, policy=remat_policy(config), prevent_cse=False, static_argnums=0)
    period = _period(layers)
    turns, rest = divmod(len(layers), period)
    if isinstance(params, tuple):
        turns, rest = 0, len(layers)
    stacked, scanned = (params, keys), turns * period
    balances = []
    if turns:
        if period == 1:

            def body(x, scanned):
                return call(layers[0], scanned[0], x, scanned[1])

            x, balance = jax.lax.scan(body, x, stacked, unroll=min(config.scan_unroll, turns))
        else:

            def body(x, scanned):
                said = []
                for i, spec in enumerate(layers[:period]):
                    layer, key = jax.tree.map(lambda leaf, i=i: leaf[i], scanned)
                    x, balance = call(spec, layer, x, key)
                    said.append(balance)
                return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *said)

            grouped = jax.tree.map(lambda a: a[:scanned].reshape(turns, period, *a.shape[1:]), stacked)
            x, balance = jax.lax.scan(body, x, grouped)
            balance = jax.tree.map(lambda a: a.reshape(scanned, *a.shape[2:]), balance)
        balances.append(balance)
    last = []
    for i in range(len(layers) - rest, len(layers)):
        x, balance = call(layers[i], _layer(params, i), x, None if keys is None else keys[i])
        last.append(balance)
    if last:
        balances.append(jax.tree.map(lambda *leaves: jnp.stack(leaves), *last))
    return x, jax.tree.map(lambda *parts: jnp.concatenate(parts), *balances)


def _run_stages(config, layers, blocks, params, x, keys, tokens, surroundings, pin):
    """``_run_layers`` as a pipeline: x and what the layers say about their balance."""
    B, T = tokens.ids.shape
    pipe = Pipeline.of(config, layers, B, pin)
    each = len(layers) // (pipe.stages * pipe.rounds)

    def run(params, of_round, rows_BTD, marks, rng, constrain):
        rows = rows_BTD.reshape(-1, config.d_model) if x.ndim == 2 else rows_BTD
        keys = None if rng is None else jax.random.split(rng, each)
        shared = surroundings(marks["positions"], marks["segments"], constrain)
        rows = stream(rows, constrain)
        mine = {
            spec: lambda layer, *args, block=block, **kw: block(of_round(layer), *args, **kw)
            for spec, block in blocks.items()
        }
        rows, balance = _run_layers(config, layers[:each], mine, params, rows, keys=keys, shared=shared)
        return rows.reshape(rows_BTD.shape), balance

    marks = {"positions": tokens.positions, "segments": tokens.segments}
    rng = None if keys is None else keys[0]
    y, balance = run_pipeline(run, pipe, params, x.reshape(B, T, -1), marks, rng, pin)
    return pin(y.reshape(x.shape), (*ROWS[x.ndim], "act_embed")), balance


def _run_cached(layers, blocks, params, x, shared, cache, start):
    """Layers in line, each with a cache of its own size."""
    entries = []
    for i, spec in enumerate(layers):
        mine = (cache.layers[start + i], cache.lengths)
        x, entry, _ = blocks[spec](_layer(params, i), x, cache=mine, **shared)
        entries.append(entry)
    return x, entries
