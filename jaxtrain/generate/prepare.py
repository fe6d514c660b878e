"""Parameters as decoding reads them: made once after every update of the weights."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax

from jaxtrain.models.decoder import unstack
from jaxtrain.models.int8 import quantize
from jaxtrain.sharding import constrain, is_names
from jaxtrain.types import Array, Params, path_name

# Matrices that models multiply in the compute type.  Norms, routers and scalar heads are read in float32.
MATRICES = ("kernel", "embedding")
KEPT = ("router", "reward_head", "value_head")
# Below these a kernel is a Linear's.  What stands elsewhere (experts, latents) is used in other ways.
LINEAR = {"query": 1, "key": 1, "value": 1, "out": 2, "gate": 1, "up": 1, "down": 1, "lm_head": 1}


def prepare(model: Any, params: Params, *, int8: bool = False) -> Params:
    """What ``Engine.generate`` takes: layers one by one, matrices in the compute type, sharded as ``params`` are.

    int8: the matrices of attention, dense feed-forward layers and the head in 8 bits with a scale an output; the
        embedding stays as it is, and where the head is tied to it, the head becomes a copy.

    What needs no change is shared with ``params``: donate those only when generation is over.
    """
    config = model.config
    params = unstack(config, params)
    axes = prepared_axes(model)

    def pin(names: tuple[str, ...], leaf: Array) -> Array:
        return constrain(leaf, names, model.rules)

    def convert(path: tuple[Any, ...], names: tuple[str, ...], leaf: Array) -> Any:
        *parents, last = path_name(path).split("/")
        if last not in MATRICES or set(parents) & set(KEPT):
            return pin(names, leaf)
        inputs = LINEAR.get(parents[-1])
        if int8 and inputs and last == "kernel" and "experts" not in names:
            quantized = quantize(leaf, inputs)
            return type(quantized)(values=pin(names, quantized.values), scales=pin(names[inputs:], quantized.scales))
        return pin(names, leaf.astype(config.compute_dtype))

    prepared = jax.tree_util.tree_map_with_path(convert, axes, params, is_leaf=is_names)
    if int8 and "lm" in config.heads and "lm_head" not in params:
        head = quantize(params["embed"]["embedding"].T, 1)
        prepared |= {"lm_head": {"kernel": head}}
    return prepared


def prepared_axes(model: Any) -> Any:
    """Logical names of the dimensions of prepared parameters, without int8."""
    stacks = model.config.spec().stacks
    one = partial(jax.tree.map, lambda names: names[1:], is_leaf=is_names)
    return model.axes | {name: (one(model.axes[name]),) * len(layers) for name, layers in stacks.items()}


def abstract_prepared(model: Any, mesh: Any) -> Params:
    """What ``prepare`` returns, without int8, as ShapeDtypeStructs with shardings."""
    shapes = jax.eval_shape(partial(prepare, model), model.shapes())

    def one(names: tuple[str, ...], leaf: Any) -> jax.ShapeDtypeStruct:
        sharding = jax.sharding.NamedSharding(mesh, model.rules.spec(names))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(one, prepared_axes(model), shapes, is_leaf=is_names)
