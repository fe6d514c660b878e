"""What generation computes on the device, as jitted functions over slots.

Letters: B slots, b prompts read together, P prompt positions, V vocabulary, K steps of one call, N likeliest ids.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxtrain.generate.prepare import prepare
from jaxtrain.generate.sampling import Sampling, likeliest, sample
from jaxtrain.models.cache import Cache, init_cache, insert
from jaxtrain.sharding import ShardingRules, ways
from jaxtrain.types import Array, Params, Tokens, record

CHUNK = 64  # the most steps between two looks at what has finished


@record
class Slots:
    """What the device holds between calls.  Every array's first axis is B.

    cache: of everything read.  ids: int32, each row's last token, which is still to be read.
    counts, limits: int32, tokens sampled so far, and at most.  going: bool, whether a row is still being written.
    keys: uint32 ``[B, *]``, each sequence's PRNG key.  seen: bool ``[B, V]``, ids so far; ``[B, 0]`` without a penalty.
    """

    cache: Cache
    ids: Array
    counts: Array
    limits: Array
    going: Array
    keys: Array
    seen: Array


@record
class Sampled:
    """One token a row: ids int32, logps float32, ``[*]``; and, where wanted, what ``likeliest`` says."""

    ids: Array
    logps: Array
    probs: Array | None = None
    top_ids: Array | None = None
    top_probs: Array | None = None


def slot_names(ndim: int) -> tuple[str | None, ...]:
    """Of an array of ``Slots``: those of four dimensions are a cache's."""
    return ("batch", "kv_heads", None, None) if ndim == 4 else ("batch", *(None,) * (ndim - 1))


def fitting_spec(
    rules: ShardingRules, mesh: Any, shape: tuple[int, ...], names: tuple[str | None, ...]
) -> PartitionSpec:
    """Of the table's, what divides: other dimensions are not split."""
    spec = rules.spec(names)
    return PartitionSpec(
        *(None if size % ways(mesh, entry) else entry for size, entry in zip(shape, spec, strict=True))
    )


def abstract_slots(model: Any, sampling: Sampling, mesh: Any, B: int, length: int) -> Slots:
    """What ``new`` returns, as ShapeDtypeStructs with shardings."""
    shapes = jax.eval_shape(lambda: programs(model, sampling, 0)["new"](B, length))

    def one(x: Any) -> jax.ShapeDtypeStruct:
        spec = fitting_spec(model.rules, mesh, x.shape, slot_names(x.ndim))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.sharding.NamedSharding(mesh, spec))

    return jax.tree.map(one, shapes)


@functools.cache  # as many as there are ways to sample, like build_model's
def programs(model: Any, sampling: Sampling, top: int) -> dict[str, Any]:
    """The jitted functions, shared by all engines of a model and a way of sampling."""
    config = model.config
    stop_ids = jnp.asarray(sampling.stop_ids, jnp.int32)
    penalised = sampling.repetition_penalty != 1
    V = config.vocab_size

    def pin(x: Array, *names: str | None) -> Array:
        """Constrains ``x`` as far as its dimensions divide."""
        mesh = jax.sharding.get_abstract_mesh()
        return x if mesh.empty else jax.lax.with_sharding_constraint(x, fitting_spec(model.rules, mesh, x.shape, names))

    def pin_slots(slots: Slots) -> Slots:
        return jax.tree.map(lambda x: pin(x, *slot_names(x.ndim)), slots)

    def everywhere(tree: Any) -> Any:
        """On every device, so that every host can read it."""
        return jax.tree.map(lambda x: pin(x, *(None,) * x.ndim), tree)

    def firsts_everywhere(sampled: Sampled) -> Sampled:
        """The same of one token a row.

        Ids and log-probabilities travel as one array ``[2, b]``: TPUs' compiler has no all-gather of a vector, and
        would add up parts among zeros.
        """
        logps = jax.lax.bitcast_convert_type(sampled.logps, sampled.ids.dtype)
        ids, logps = everywhere(pin(jnp.stack([sampled.ids, logps]), None, "batch"))
        logps = jax.lax.bitcast_convert_type(logps, sampled.logps.dtype)
        return dataclasses.replace(everywhere(dataclasses.replace(sampled, ids=None, logps=None)), ids=ids, logps=logps)

    def choose(keys: Array, counts: Array, logits: Array, seen: Array) -> tuple[Sampled, Array]:
        """The next token of each row, and ``seen`` with it."""
        step_keys = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(keys), counts)
        ids, logps = sample(step_keys, logits, sampling, seen)
        if penalised:
            seen = seen.at[jnp.arange(len(ids)), ids].set(True)
        if not top:
            return Sampled(ids=ids, logps=logps), seen
        probs, top_ids, top_probs = likeliest(logits, ids, top)
        return Sampled(ids=ids, logps=logps, probs=probs, top_ids=top_ids, top_probs=top_probs), seen

    def forward(params: Params, cache: Cache, ids: Array, segments: Array) -> tuple[Array, Cache]:
        """Reads ids ``[b, T]`` after what the cache holds; logits ``[b, V]`` after each row's last."""
        shape = ids.shape
        read = jnp.sum(segments, axis=1)
        outputs = model.apply(
            params,
            Tokens(
                ids=ids,
                targets=jnp.zeros_like(ids),
                weights=jnp.zeros(shape, jnp.float32),
                positions=(cache.lengths[:, None] + jnp.arange(shape[1], dtype=jnp.int32)) * segments,
                segments=segments,
            ),
            cache=cache,
        )
        last = jnp.maximum(read - 1, 0)[:, None, None]
        hidden = jnp.take_along_axis(outputs.hidden, last, axis=1)[:, 0]
        return model.logits(params, hidden), outputs.cache

    def going(sampled: Sampled, counts: Array, limits: Array) -> Array:
        return ~jnp.isin(sampled.ids, stop_ids) & (counts < limits)

    def new(B: int, length: int) -> Slots:
        keys = jax.random.key_data(jax.random.split(jax.random.key(0), B))
        zeros = jnp.zeros((B,), jnp.int32)
        return pin_slots(
            Slots(
                cache=init_cache(config, B, length),
                ids=zeros,
                counts=zeros,
                limits=zeros,
                going=zeros > 0,
                keys=jnp.zeros_like(keys),
                seen=jnp.zeros((B, V if penalised else 0), bool),
            )
        )

    def begin(params: Params, cache: Cache, ids: Array, lengths: Array, limits: Array, keys: Array, seen: Array):
        segments = (jnp.arange(ids.shape[1]) < lengths[:, None]).astype(jnp.int32)
        logits, cache = forward(params, cache, ids, segments)
        sampled, seen = choose(keys, jnp.zeros_like(lengths), logits, seen)
        counts = jnp.ones_like(lengths)
        slots = Slots(
            cache=cache,
            ids=sampled.ids,
            counts=counts,
            limits=limits,
            going=going(sampled, counts, limits),
            keys=keys,
            seen=seen,
        )
        return pin_slots(slots), firsts_everywhere(sampled)

    def read(params: Params, ids: Array, *rest: Array) -> tuple[Slots, Sampled]:
        """Reads prompts ``[b, P]``, padded on the right, and samples their first tokens: b slots of their own.

        rest: lengths, limits, keys and seen, as in ``Slots``.
        """
        return begin(params, init_cache(config, len(ids), 0), ids, *rest)

    def extend(params: Params, slots: Slots, kept: Array, ids: Array, *rest: Array) -> tuple[Slots, Sampled]:
        """The same with ids ``[B, P]`` that follow the first ``kept`` tokens of each row."""
        return begin(params, dataclasses.replace(slots.cache, lengths=kept), ids, *rest)

    def put(slots: Slots, rows: Array, fresh: Slots) -> Slots:
        """Puts ``fresh`` into ``rows`` (int32 ``[b]``; a row past the end goes nowhere)."""
        rest = {
            field.name: getattr(slots, field.name).at[rows].set(getattr(fresh, field.name), mode="drop")
            for field in dataclasses.fields(Slots)
            if field.name != "cache"
        }
        return pin_slots(Slots(cache=insert(slots.cache, rows, fresh.cache), **rest))

    def decode(params: Params, slots: Slots, budget: Array, free: Array) -> tuple[Slots, Sampled, Array]:
        """At most ``budget`` steps, while a row is going and fewer than ``free`` rows are not.

        Returns what was sampled, ``[K, B]``, of which a row's first entries count, up to its end, and the number of
        steps.
        """
        B = len(slots.ids)
        shapes = jax.eval_shape(lambda s: choose(s.keys, s.counts, jnp.zeros((B, V)), s.seen)[0], slots)
        out = jax.tree.map(lambda x: jnp.zeros((CHUNK, *x.shape), x.dtype), shapes)

        def unfinished(carry):
            t, slots, _ = carry
            idle = jnp.sum(~slots.going)
            return (t < budget) & (idle < free)

        def step(carry):
            t, slots, out = carry
            live = slots.going
            logits, cache = forward(params, slots.cache, slots.ids[:, None], live[:, None].astype(jnp.int32))
            sampled, seen = choose(slots.keys, slots.counts, logits, slots.seen)
            counts = slots.counts + live
            slots = Slots(
                cache=cache,
                ids=jnp.where(live, sampled.ids, slots.ids),
                counts=counts,
                limits=slots.limits,
                going=live & going(sampled, counts, slots.limits),
                keys=slots.keys,
                seen=seen,
            )
            out = jax.tree.map(lambda whole, one: whole.at[t].set(one), out, sampled)
            return t + 1, pin_slots(slots), out

        steps, slots, out = jax.lax.while_loop(unfinished, step, (jnp.int32(0), slots, out))
        return slots, everywhere(out), everywhere(steps)

    return {
        "prepare": jax.jit(lambda params, int8: prepare(model, params, int8=int8), static_argnums=1),
        "new": jax.jit(new, static_argnums=(0, 1)),
        "read": jax.jit(read),
        "put": jax.jit(put, donate_argnums=0),
        "extend": jax.jit(extend, donate_argnums=1),
        "decode": jax.jit(decode, donate_argnums=1),
    }
