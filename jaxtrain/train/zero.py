"""ZeRO (1910.02054): what of a training state is split over ``fsdp`` while a step runs.

Between steps the whole state is split, at every level, so that checkpoints are the same; the levels say what a step
makes whole, and thereby what it holds and sends:

    3   nothing: a layer's parameters are gathered when the layer is computed, and again in the backward pass
    2   parameters, once a step, in the type that the model computes in; each microbatch's gradients are split at once
    1   those, and the sum of the gradients, which is split when the last microbatch is done
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtrain.models import Model
from jaxtrain.sharding import param_shardings
from jaxtrain.types import Params

LEVELS = (1, 2, 3)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Gather:
    """Levels 1 and 2 of a model on a mesh.  split, whole: shardings of its parameters.  dtypes: ``Model.dtypes``."""

    level: int
    dtypes: Params
    split: Params
    whole: Params

    def params(self, params: Params) -> Params:
        """Whole over ``fsdp``, in the types that they are used in: what a step computes with.

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


def gather(model: Model, mesh: Mesh, level: int) -> Gather | None:
    """What ``make_train_step`` does at a level of ``MeshConfig.zero``; None where that is what it does anyway."""
    assert level in LEVELS, level
    if level == 3 or mesh.shape["fsdp"] == 1:
        return None
    split = param_shardings(model.axes, model.shapes(), mesh, model.rules)
    return Gather(level=level, dtypes=model.dtypes, split=split, whole=jax.tree.map(_without_fsdp, split))


def _without_fsdp(sharding: NamedSharding) -> NamedSharding:
    def left(entry: Any) -> Any:
        axes = (entry,) if isinstance(entry, str) else entry or ()
        return tuple(axis for axis in axes if axis != "fsdp") or None

    return NamedSharding(sharding.mesh, PartitionSpec(*map(left, sharding.spec)))
