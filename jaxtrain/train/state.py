"""Building a TrainState where it will live: each array is created already split over the mesh."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtrain.models import Model
from jaxtrain.optim import state_axes
from jaxtrain.sharding import ShardingRules, is_names, param_shardings
from jaxtrain.train.offload import on_host
from jaxtrain.types import Params, TrainState


def new_state(params: Params, tx: optax.GradientTransformation, seed: int) -> TrainState:
    """A state before its first update.  ``rng`` holds raw key data, so that checkpoints are plain arrays."""

    def zero():
        return jnp.zeros((), jnp.int32)

    # One buffer each: a donated state must not name the same buffer twice.
    return TrainState(
        step=zero(),
        skipped=zero(),
        streak=zero(),
        params=params,
        opt_state=tx.init(params),
        rng=jax.random.key_data(jax.random.key(seed)),
    )


def state_shardings(
    model: Model, shapes: TrainState, mesh: Mesh, rules: ShardingRules | None = None, offload: bool = False
) -> TrainState:
    """Where each array of a state lives: parameters by the model's rules, optimizer moments with their parameter.

    ``shapes``: the state's ShapeDtypeStructs.  rules: the model's, or others (``state_rules``).  What has no
    parameter's shape (counters, factored moments) is replicated.  offload: what has is in the host's memory.
    """
    replicated = NamedSharding(mesh, PartitionSpec())
    rules = rules or model.rules

    def place(names: tuple[str | None, ...]) -> NamedSharding:
        return NamedSharding(mesh, rules.spec(names))

    moments = state_axes(shapes.opt_state, shapes.params, model.axes)
    opt_state = jax.tree.map(place, moments, is_leaf=is_names)
    return TrainState(
        step=replicated,
        skipped=replicated,
        streak=replicated,
        params=param_shardings(model.axes, shapes.params, mesh, rules),
        opt_state=on_host(opt_state, shapes.opt_state, shapes.params) if offload else opt_state,
        rng=replicated,
    )


def abstract_state(
    model: Model,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    rules: ShardingRules | None = None,
    offload: bool = False,
) -> TrainState:
    """The state as ShapeDtypeStructs with shardings: what a checkpoint is restored into."""
    shapes = jax.eval_shape(lambda params: new_state(params, tx, 0), model.shapes())
    shardings = state_shardings(model, shapes, mesh, rules, offload)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def abstract_params(model: Model, mesh: Mesh) -> Params:
    """The parameters as ShapeDtypeStructs with shardings: what they are loaded into."""
    shapes = model.shapes()
    shardings = param_shardings(model.axes, shapes, mesh, model.rules)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def init_params(model: Model, mesh: Mesh, seed: int) -> Params:
    """Fresh parameters, each made where it belongs.  The values do not depend on the mesh."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract_params(model, mesh))
    with jax.set_mesh(mesh):
        return jax.jit(model.init, out_shardings=shardings)(jax.random.key(seed))


def init_state(
    model: Model,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    seed: int,
    params: Params | None = None,
    rules: ShardingRules | None = None,
    offload: bool = False,
) -> TrainState:
    """A fresh state on the mesh, as ``abstract_state`` says; ``params`` (copied) instead of new ones when given."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(model, tx, mesh, rules, offload))
    with jax.set_mesh(mesh):
        if params is None:
            params = init_params(model, mesh, seed)
        return jax.jit(lambda p: new_state(p, tx, seed), out_shardings=shardings)(params)


def state_bytes(state: Any) -> int:
    """Bytes of all arrays (or ShapeDtypeStructs) of a tree, over all devices."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
