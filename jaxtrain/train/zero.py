"""ZeRO (1910.02054): what of a training state is split over ``fsdp`` while a step runs.

Between steps the whole state is split, at every level, so that checkpoints are the same; the levels say what a step
makes whole, and thereby what it holds and sends:

    3   nothing: a layer's parameters are gathered when the layer is computed, and again in the backward pass
    2   parameters, once a step, in the type that the model computes in; each microbatch's gradients are split at once
    1   those, and the sum of the gradients, which is split when the last microbatch is done

With ``MeshConfig.zero_data`` the state is split over ``data`` as well.  A step gathers a layer's parameters over it
where the layer is computed, in two steps, ``data`` and then ``fsdp``: over all devices at once some compilers make an
all-reduce of an all-gather.  Gradients come back the same way, so that no device holds or sends more of them than its
rows' part.  Where a layer is computed several times in a step (levels 1 and 2, whose copies stay whole; microbatches;
a pipeline), and where ``data`` joins slices over a slow network, parameters are made whole over it once, as level 2
does over ``fsdp``.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtrain.models import Model
from jaxtrain.models.functional import AtUse
from jaxtrain.sharding import MeshConfig, is_names, param_shardings, slices_of, state_rules
from jaxtrain.types import Params


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Gather:
    """What a step makes whole.

    level: of ZeRO.  dtypes: ``Model.dtypes``.  split, whole: shardings of a model's parameters.  in_layers: of each
    stacked parameter, the sharding of one layer's where it is used, None for others; no tree where nothing is gathered
    inside of layers.
    """

    level: int
    dtypes: Params
    split: Params
    whole: Params
    in_layers: Params | None = None

    def params(self, params: Params) -> Params:
        """In the types that they are used in, and whole but for what layers gather: what a step computes with.

        What is used in several types or places (embeddings, heads, norms) stays as it is: it is gathered where it is
        used, which is not inside the loop over layers, and its gradients are added in its own type.  So do the
        matrices of experts, which find their own way to the tokens (``models.moe``).
        """

        def one(param, dtype, sharding):
            return param if not dtype else jax.lax.with_sharding_constraint(param.astype(dtype), sharding)

        return jax.tree.map(one, params, self.dtypes, self.whole if self.in_layers is None else self.split)

    def at_use(self, params: Params) -> Params:
        """The parameters as the model takes them: of layers, with what is gathered where they are called."""
        if self.in_layers is None:
            return params

        def one(param, dtype, sharding):
            return param if sharding is None or not dtype else AtUse(param, sharding)

        return jax.tree.map(one, params, self.dtypes, self.in_layers)

    def microbatch(self, grads: Params) -> Params:
        """A microbatch's gradients where they are added up."""
        return jax.lax.with_sharding_constraint(grads, self.whole if self.level == 1 else self.split)

    def sums(self, grads: Params) -> Params:
        """Gradients of all microbatches where the optimizer reads them."""
        return jax.lax.with_sharding_constraint(grads, self.split)


def gather(model: Model, mesh: Mesh, config: MeshConfig, accumulate: int = 1) -> Gather | None:
    """What ``make_train_step`` makes whole on ``mesh``, a mesh of ``config``; None for nothing."""
    axes = ("fsdp",) * (config.zero < 3) + ("data",) * config.zero_data
    if not any(mesh.shape[axis] > 1 for axis in axes):
        return None
    split = param_shardings(model.axes, model.shapes(), mesh, state_rules(model.rules, config))
    whole = jax.tree.map(lambda sharding: _without(axes, sharding), split)
    in_layers = None
    if data_in_layers(config.zero, config.zero_data, mesh, accumulate):
        in_layers = jax.tree.map(_of_layer, model.axes, whole, is_leaf=is_names)
    return Gather(level=config.zero, dtypes=model.dtypes, split=split, whole=whole, in_layers=in_layers)


def data_in_layers(zero: int, zero_data: bool, mesh: Mesh, accumulate: int) -> bool:
    """Whether parameters are gathered over ``data`` where layers are computed."""
    # An abstract mesh does not say whether its data axis joins slices; nothing runs on one.
    slow = isinstance(mesh, Mesh) and slices_of(mesh.devices.flat) > 1
    return zero_data and zero == 3 and accumulate == 1 and mesh.shape["stage"] == 1 and not slow


def _of_layer(names: tuple[str, ...], sharding: NamedSharding) -> NamedSharding | None:
    if names[0] not in ("layers", "pipeline"):
        return None
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))


def _without(axes: tuple[str, ...], sharding: NamedSharding) -> NamedSharding:
    def left(entry: Any) -> Any:
        own = (entry,) if isinstance(entry, str) else entry or ()
        return tuple(axis for axis in own if axis not in axes) or None

    return NamedSharding(sharding.mesh, PartitionSpec(*map(left, sharding.spec)))
