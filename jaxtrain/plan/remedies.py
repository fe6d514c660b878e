"""What would make a stage fit: changes that keep its batch, each counted by hand, the cheapest first."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

from jaxtrain.config import Recipe
from jaxtrain.plan.chips import Slice
from jaxtrain.plan.estimate import StagePlan, plan_by_hand
from jaxtrain.plan.moments import Traces
from jaxtrain.plan.programs import abstract_mesh, programs
from jaxtrain.plan.variants import REMATS, Binding, bindings, meshes, microbatches, rows_ways, with_remat

SHOWN = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Remedy:
    """stage: changed, where that is what it takes.  where: on which slice.  bytes: a chip's, by hand, scaled by what
    the compiler said of the stage as it was.  seconds: of a step, by hand."""

    stage: Any
    where: Slice
    bytes: float
    seconds: float

    @property
    def chip_seconds(self) -> float:
        return self.seconds * self.where.chips

    def bindings(self, stage: Any) -> list[Binding]:
        """What makes it of ``stage``."""
        return bindings(stage, self.stage)


def remedies(stage: Any, recipe: Recipe, found: StagePlan) -> list[Remedy]:
    """Those that fit, by the chip-seconds of a step: one change where one is enough, two where it is not, and the next
    larger slice."""
    where = found.where
    scale = (found.compiler_bytes_per_chip or found.hbm_bytes_per_chip) / found.hbm_bytes_per_chip
    traces = Traces()

    def count(changed: Any, slice_: Slice) -> Remedy | None:
        """None where it cannot be had, or does not fit."""
        try:
            mesh = abstract_mesh(changed.mesh, slice_)
            plan = plan_by_hand(changed, programs(changed, recipe, mesh), slice_, mesh, traces)
        except (ValueError, NotImplementedError):
            return None
        size = scale * plan.hbm_bytes_per_chip
        if size > slice_.chip.usable_bytes:
            return None
        if changed.mesh == own:  # with its -1 where it has one
            changed = dataclasses.replace(changed, mesh=written)
        return Remedy(stage=changed, where=slice_, bytes=size, seconds=plan.seconds_per_step)

    written = stage.mesh
    own = dataclasses.replace(stage.mesh, **stage.mesh.sizes(where.devices))
    stage = dataclasses.replace(stage, mesh=own)
    fitting: list[Remedy] = []
    tried: list[Any] = []
    for change in (_remats, _microbatches, _states, _meshes):
        alone = list(change(stage, where))
        tried += alone
        fitting += _cheapest((count(changed, where) for changed in alone), most=2)
    if not fitting:
        least = [changed for changed in tried if changed.mesh == own]
        pairs = (second for first in least for change in (_microbatches, _states) for second in change(first, where))
        fitting += _cheapest((count(changed, where) for changed in pairs), most=3)
    for times in (2, 4, 8):
        larger = dataclasses.replace(where, shape=(*where.shape[:-1], where.shape[-1] * times))
        wider = dataclasses.replace(own, data=-1, fsdp=own.fsdp), dataclasses.replace(own, fsdp=-1, data=own.data)
        if on_larger := _cheapest(count(dataclasses.replace(stage, mesh=mesh), larger) for mesh in wider):
            fitting += on_larger
            break
    return sorted(fitting, key=lambda one: one.chip_seconds)[:SHOWN]


def _cheapest(found: Iterator[Remedy | None], most: int = 1) -> list[Remedy]:
    return sorted((one for one in found if one is not None), key=lambda one: one.chip_seconds)[:most]


def _remats(stage: Any, _: Slice) -> Iterator[Any]:
    if hasattr(stage.model, "remat"):
        yield from (with_remat(stage, remat, save) for remat, save in REMATS)


def _microbatches(stage: Any, _: Slice) -> Iterator[Any]:
    for count in microbatches(stage, rows_ways(stage.mesh)):
        if count > stage.accumulate:
            yield dataclasses.replace(stage, accumulate=count)


def _states(stage: Any, _: Slice) -> Iterator[Any]:
    """Where the state lies, and in what types: levels of ZeRO, moments in bfloat16, the host's memory."""
    mesh = stage.mesh
    for zero, zero_data in ((3, mesh.zero_data), (3, mesh.data > 1)):
        if (zero, zero_data) != (mesh.zero, mesh.zero_data):
            yield dataclasses.replace(stage, mesh=dataclasses.replace(mesh, zero=zero, zero_data=zero_data))
    optimizers = [name for name in ("optimizer", "critic_optimizer") if getattr(stage, name, None) is not None]
    for changes in ({"mu_dtype": "bfloat16"}, {"mu_dtype": "bfloat16", "nu_dtype": "bfloat16"}, {"offload": True}):
        with contextlib.suppress(ValueError, TypeError):  # refused by the optimizer, or no field of it
            changed = {name: dataclasses.replace(getattr(stage, name), **changes) for name in optimizers}
            yield dataclasses.replace(stage, **changed)


def _meshes(stage: Any, where: Slice) -> Iterator[Any]:
    """Of the same level of ZeRO or of 3; the search knows more."""
    for mesh in meshes(stage, where):
        if mesh.zero == 3 and mesh != stage.mesh and mesh.context == stage.mesh.context:
            yield dataclasses.replace(stage, mesh=mesh)
