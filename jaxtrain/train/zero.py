"""ZeRO (1910.02054): what of a training state is split over ``fsdp`` while a step runs.

Between steps the whole state is split, at every level, so that checkpoints are the same; the levels say what a step
makes whole, and thereby what it holds and sends:

    3   nothing: a layer's parameters are gathered when the layer is computed, and again in the backward pass
    2   parameters, once a step, in the type that the model computes in; each microbatch's gradients are split at once
    1   those, and the sum of the gradients, which is split when the last microbatch is done

With ``MeshConfig.zero_data`` the state is split over ``data`` as well, and a step makes it whole over that axis as
level 2 does over ``fsdp``: as many bytes are sent as by the sum of gradients over ``data`` otherwise, and its devices
are spared a copy each of parameters and optimizer.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtrain.models import Model
from jaxtrain.sharding import MeshConfig, param_shardings, state_rules
from jaxtrain.types import Params


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Gather:
    """What a step makes whole.  split, whole: shardings of a model's parameters.  dtypes: ``Model.dtypes``."""

    level: int
    dtypes: Params
    split: Params
    whole: Params

    def params(self, params: Params) -> Params:
        """Whole, in the types that they are used in: what a step computes with.

        What is used in several types or places (embeddings, heads, norms) stays as it is: it is gathered where it is
        used, which is not inside the loop over layers, and its gradients are added in its own type.  So do the
        matrices of experts, which find their own way to the tokens (``models.moe``).
        """

        def one(param, dtype, sharding):
            return param if not dtype else jax.lax.with_sharding_constraint(param.astype(dtype), sharding)

        return jax.tree.map(one, params, self.dtypes, self.whole)

    def microbatch(self, grads: Params) -> Params:
        """A microbatch's gradients where they are added up."""
        return jax.lax.with_sharding_constraint(grads, self.whole if self.level == 1 else self.split)

    def sums(self, grads: Params) -> Params:
        """Gradients of all microbatches where the optimizer reads them."""
        return jax.lax.with_sharding_constraint(grads, self.split)


def gather(model: Model, mesh: Mesh, config: MeshConfig) -> Gather | None:
    """What ``make_train_step`` makes whole on ``mesh``, a mesh of ``config``; None for nothing."""
    axes = ("fsdp",) * (config.zero < 3) + ("data",) * config.zero_data
    if not any(mesh.shape[axis] > 1 for axis in axes):
        return None
    split = param_shardings(model.axes, model.shapes(), mesh, state_rules(model.rules, config))
    whole = jax.tree.map(lambda sharding: _without(axes, sharding), split)
    return Gather(level=config.zero, dtypes=model.dtypes, split=split, whole=whole)


def _without(axes: tuple[str, ...], sharding: NamedSharding) -> NamedSharding:
    def left(entry: Any) -> Any:
        own = (entry,) if isinstance(entry, str) else entry or ()
        return tuple(axis for axis in own if axis not in axes) or None

    return NamedSharding(sharding.mesh, PartitionSpec(*map(left, sharding.spec)))
