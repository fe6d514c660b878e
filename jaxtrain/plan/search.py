"""The fastest way to run a stage on a slice: every mesh, level of ZeRO, remat and number of microbatches by hand, and
the best few by the compiler.  The batch stays what it is: it is the experiment.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

from jaxtrain.config import Recipe
from jaxtrain.plan.chips import Slice
from jaxtrain.plan.estimate import StagePlan, plan_by_hand, plan_stage, seconds_by_hand
from jaxtrain.plan.moments import Traces
from jaxtrain.plan.programs import abstract_mesh, programs
from jaxtrain.plan.variants import MODEL_FIELDS, meshes, microbatches, on_mesh, remats, rows_ways, schedules, vary
from jaxtrain.sharding import AXES

# Times this close count as the same, and less memory goes first: a count by hand knows no better.
SAME = 1.01


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """stage: with its changes.  plan: by hand, or by the compiler.  own: it is the recipe's."""

    stage: Any
    plan: StagePlan
    own: bool = False

    @property
    def compiled(self) -> bool:
        return self.plan.compiler_bytes_per_chip is not None

    @property
    def bytes(self) -> int:
        """A chip's: the compiler's where it was asked."""
        return self.plan.compiler_bytes_per_chip or self.plan.hbm_bytes_per_chip

    @property
    def seconds(self) -> float:
        return self.plan.seconds_per_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """ranked: the best first; of each mesh, remat and number of microbatches the best level of ZeRO alone, and the
    recipe's own in any case.  Pipelines only where they are faster than what fits without one: their memory takes
    longer to count than all else.  counted, refused: how many were counted, and how many meshes the stage cannot have.
    """

    ranked: tuple[Candidate, ...]
    counted: int
    refused: int
    seconds: float


def search(stage: Any, recipe: Recipe, where: Slice) -> Found:
    """By hand.  Raises ValueError where no mesh at all can be had, with what the last one lacked."""
    began = time.perf_counter()
    traces = Traces()
    found, refused, slower, complaint = [], 0, 0, None
    own = dataclasses.replace(stage.mesh, **stage.mesh.sizes(where.devices))
    for mesh in sorted(dict.fromkeys((own, *meshes(stage, where))), key=lambda mesh: mesh.stage > 1):
        if mesh.zero != 3 and mesh != own:
            continue  # with the one of level 3, whose parameters lie alike
        limit = math.inf
        if mesh.stage > 1 and mesh != own:
            limit = min((one.seconds for one in found if one.plan.fits), default=math.inf)
        try:
            more, too_slow = _on_mesh(on_mesh(stage, mesh), recipe, where, traces, own, limit)
        except (ValueError, NotImplementedError) as error:
            refused, complaint = refused + 1, error
            continue
        found += more
        slower += too_slow
    if not found:
        raise ValueError(f"stage {stage.name}: no mesh of {where.name} can run it; the last one tried: {complaint}")
    found = [dataclasses.replace(one, own=_alike(one.stage, stage, own)) for one in found]
    return Found(
        ranked=tuple(_distinct(rank(found))),
        counted=len(found) + slower,
        refused=refused,
        seconds=time.perf_counter() - began,
    )


def _on_mesh(
    stage: Any, recipe: Recipe, where: Slice, traces: Traces, own: Any, limit: float
) -> tuple[list[Candidate], int]:
    """All of one mesh's, whose programs are built once, and the number of those that take longer than ``limit``."""
    base = dataclasses.replace(stage, accumulate=1)
    mesh = abstract_mesh(stage.mesh, where)
    built = programs(base, recipe, mesh)
    levels = (3, 2, 1) if stage.mesh.fsdp > 1 else (3,)
    if stage.mesh == own:
        levels = tuple(dict.fromkeys((own.zero, *levels)))
    found, slower = [], 0
    for other in (scheduled for one in remats(stage) for scheduled in schedules(one)):
        for count in microbatches(stage, rows_ways(stage.mesh)):
            for zero in levels:
                changed = dataclasses.replace(other, accumulate=count, mesh=dataclasses.replace(stage.mesh, zero=zero))
                own_programs = [vary(program, base, changed) for program in built]
                if limit < math.inf and seconds_by_hand(own_programs, where, mesh) > limit:
                    slower += 1
                    continue
                plan = plan_by_hand(changed, own_programs, where, mesh, traces)
                found.append(Candidate(stage=changed, plan=plan))
    return found, slower


def _alike(changed: Any, stage: Any, own: Any) -> bool:
    return changed == dataclasses.replace(stage, mesh=own)


def rank(found: list[Candidate]) -> list[Candidate]:
    """What fits before what does not, what was compiled before what was not, then by time, then by memory."""
    fastest = min((one.seconds for one in found if one.plan.fits), default=1.0)

    def key(one: Candidate) -> tuple:
        slower = math.floor(math.log(max(one.seconds / fastest, 1.0)) / math.log(SAME))
        # Of what does not fit, the smallest is nearest to fitting.
        return (not one.plan.fits, not one.compiled, *((slower, one.bytes) if one.plan.fits else (one.bytes, slower)))

    return sorted(found, key=key)


def _distinct(ranked: list[Candidate]) -> Iterator[Candidate]:
    seen = set()
    for one in ranked:
        stage, mesh = one.stage, one.stage.mesh
        sizes = tuple(mesh.sizes(one.plan.where.devices).values())
        key = (sizes, stage.accumulate, *(getattr(stage.model, name, None) for name in MODEL_FIELDS))
        if key not in seen or one.own:
            yield one
        seen.add(key)


def compile_best(
    found: Found, recipe: Recipe, where: Slice, count: int, say: Callable[[str], None]
) -> tuple[Candidate, ...]:
    """The ranking with the best ``count`` that fit as the compiler sees them; what it refuses is passed over, for at
    most as many more."""
    ranked = list(found.ranked)
    fit = 0
    for number, one in enumerate(ranked[: 2 * count]):
        if fit == count or not one.plan.fits:
            break
        say(f"{one.stage.name}: compiling {number + 1}: {describe_choice(one)} ...")
        plan = plan_stage(one.stage, recipe, where, compiler=True)
        ranked[number] = dataclasses.replace(one, plan=plan)
        fit += plan.fits
    return tuple(rank(ranked))


def describe_choice(one: Candidate) -> str:
    """Its mesh, remat and microbatches in a few words."""
    return ", ".join((mesh_text(one.stage), remat_text(one.stage.model), f"accumulate={one.stage.accumulate}"))


def mesh_text(stage: Any) -> str:
    """Axes of more than one device, how often a microbatch passes a pipeline, and the level of ZeRO."""
    mesh = stage.mesh
    sizes = " ".join(f"{axis}={getattr(mesh, axis)}" for axis in AXES if getattr(mesh, axis) != 1) or "one device"
    times = f" rounds={stage.model.pipeline_rounds}" if mesh.stage != 1 and stage.model.pipeline_rounds > 1 else ""
    return f"{sizes}{times} zero={mesh.zero}{' zero_data' if mesh.zero_data else ''}"


def remat_text(model: Any) -> str:
    """``full + query, key`` is full but for these names."""
    kept = (*getattr(model, "remat_save", ()), *(f"{name} (host)" for name in getattr(model, "remat_offload", ())))
    return " + ".join((getattr(model, "remat", "none"), ", ".join(kept))) if kept else getattr(model, "remat", "none")
