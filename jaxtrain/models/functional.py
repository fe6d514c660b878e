"""Flax NNX used functionally: the only file that splits and merges modules.

A module class describes parameters and computation; ``functionalize`` turns it into pure functions over a plain
nested dict, and ``stack`` into the same over a leading ``layers`` axis, to be run under ``jax.lax.scan``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from jaxtrain.sharding import ShardingRules
from jaxtrain.types import Apply, Array, Params

# Our own metadata key on nnx.Param: Flax's sharding metadata would apply itself behind our back.
LOGICAL = "logical"
COMPUTE = "compute"


def param(value: Array, *names: str, compute: str | None = None) -> nnx.Param:
    """A parameter whose dimensions carry logical names.  compute: the one type that its one use casts it to."""
    assert value.ndim == len(names), f"{value.shape} named {names}"
    return nnx.Param(value, **{LOGICAL: names, COMPUTE: compute or ""})


@partial(jax.tree_util.register_dataclass, data_fields=("value",), meta_fields=("sharding",))
@dataclasses.dataclass(frozen=True)
class AtUse:
    """In the place of a layer's parameter, or of a stack of them: it is gathered where the layer is called, and so
    inside of a loop over layers, forward and, where layers are computed again, backward.

    sharding: that it then has, of one layer.
    """

    value: Array
    sharding: NamedSharding

    def gathered(self) -> Array:
        return jax.lax.with_sharding_constraint(self.value, self.sharding)


def _is_at_use(x: Any) -> bool:
    return isinstance(x, AtUse)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Functional:
    """A module as functions: ``init(key) -> Params``, ``call(params, *args)``, and its parameters' ``axes`` and
    ``dtypes``, see ``Model``."""

    init: Callable[[Array], Params]
    call: Callable[..., Any]
    axes: Params
    dtypes: Params


def functionalize(build: Callable[[nnx.Rngs], nnx.Module]) -> Functional:
    """Makes pure functions of the module that ``build`` returns."""
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: build(nnx.Rngs(params=jax.random.key(0)))))
    axes: Params = {}
    dtypes: Params = {}
    for path, variable in nnx.to_flat_state(abstract):
        for tree, name in ((axes, LOGICAL), (dtypes, COMPUTE)):
            node = tree
            for key in path[:-1]:
                node = node.setdefault(key, {})
            node[path[-1]] = variable.get_metadata()[name]

    def init(key: Array) -> Params:
        return nnx.to_pure_dict(nnx.split(build(nnx.Rngs(params=key)))[1])

    def call(params: Params, *args: Any, **kwargs: Any) -> Any:
        params = jax.tree.map(lambda x: x.gathered() if _is_at_use(x) else x, params, is_leaf=_is_at_use)
        return nnx.merge(graphdef, params)(*args, **kwargs)

    return Functional(init=init, call=call, axes=axes, dtypes=dtypes)


def stack(one: Functional, count: int, name: str = "layers") -> Functional:
    """``count`` copies with parameters stacked on a leading axis; ``call`` still takes one layer's.

    name: the axis' logical name: "pipeline" of layers that pipeline stages share out, else "layers".
    """
    axes = jax.tree.map(lambda names: (name, *names), one.axes, is_leaf=lambda x: isinstance(x, tuple))

    def init(key: Array) -> Params:
        return jax.vmap(one.init)(jax.random.split(key, count))

    return Functional(init=init, call=one.call, axes=axes, dtypes=one.dtypes)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Model:
    """A model without its parameters: static, shared by everything that computes with it.

    init: key -> Params, a plain nested dict.  apply: see ``types.Apply``.
    axes: the tree of ``init`` with tuples of logical names for leaves.
    dtypes: the same tree with the type that a parameter's one use casts it to, "" where there is no such thing.
    balance: (old params, new params, ``Auxiliary.counts`` of a whole batch) -> new params whose routers' biases moved
        from the old ones by how unevenly experts were used; None of models that have no such biases.
    logits: of a decoder, ``(params, hidden [..., D]) -> float32 [..., V]``: what ``apply`` does to its hidden states,
        for those who want it of some of them.
    """

    config: Any
    rules: ShardingRules
    init: Callable[[Array], Params]
    apply: Apply
    axes: Params
    dtypes: Params
    balance: Callable[[Params, Params, Mapping[str, Array]], Params] | None = None
    logits: Callable[[Params, Array], Array] | None = None

    def shapes(self) -> Params:
        """The parameter tree as ShapeDtypeStructs, without computing anything."""
        return jax.eval_shape(self.init, jax.random.key(0))

    def num_params(self) -> int:
        """How many numbers the parameters hold."""
        return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(self.shapes()))
