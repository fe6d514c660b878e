"""A stage's plan: memory, time and money, by hand and by the compiler."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from jaxtrain.config import PPOStage, Recipe
from jaxtrain.plan.analytic import executed_flops, items_of
from jaxtrain.plan.chips import Slice
from jaxtrain.plan.compile import Compiled, compile_program, topology_mesh
from jaxtrain.plan.memory import Peak, resident, stage_memory
from jaxtrain.plan.programs import Program, abstract_mesh, programs
from jaxtrain.plan.roofline import Network, Times, table_of_collectives, walk_times

REMATS = ("none", "dots", "full")  # from the most memory to the least


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """One program of a stage.  Figures are of one call; bytes and flops per device.

    memory: by hand.  compiled: the compiler's answer, None where it was not asked.  beside: bytes of arrays that lie on
        the device and are no argument of the program.
    flops: of matrix products and kernels, as they run.
    """

    program: Program
    memory: Peak
    compiled: Compiled | None
    beside: int
    flops: float
    times: Times
    collectives: list[dict]

    @property
    def bytes_by_compiler(self) -> int | None:
        return None if self.compiled is None else self.compiled.bytes + self.beside


@dataclasses.dataclass(frozen=True, kw_only=True)
class StagePlan:
    """steps: of the whole run (a PPO stage's iterations)."""

    name: str
    steps: int
    where: Slice
    parts: tuple[Part, ...]

    @property
    def hbm_bytes_per_chip(self) -> int:
        """By hand, of the part that needs most."""
        return self.where.chip.devices * max(part.memory.total for part in self.parts)

    @property
    def compiler_bytes_per_chip(self) -> int | None:
        found = [part.bytes_by_compiler for part in self.parts if part.compiled is not None]
        return self.where.chip.devices * max(found) if found else None

    @property
    def fits(self) -> bool:
        """By the compiler where it was asked, by hand elsewhere."""
        usable = self.where.chip.usable_bytes / self.where.chip.devices
        return all(
            (part.memory.total if part.compiled is None else part.bytes_by_compiler) <= usable
            and (part.compiled is None or part.compiled.fits)
            for part in self.parts
        )

    @property
    def seconds_per_step(self) -> float:
        return sum(part.program.calls * part.times.seconds for part in self.parts)

    @property
    def flops_per_step(self) -> float:
        """Of all chips, as they run."""
        return self.where.devices * sum(part.program.calls * part.flops for part in self.parts)

    @property
    def tokens_per_step(self) -> int:
        """Positions that are trained on once; of PPO, those of the iteration's rollouts."""
        trained = next(part.program for part in self.parts if part.program.kind == "train")
        rollouts = [part.program for part in self.parts if part.program.kind == "decode"]
        if rollouts:
            return rollouts[0].calls * rollouts[0].rows * rollouts[0].length
        return trained.rows * trained.length

    def mfu(self, causal: bool = True) -> float:
        """Model FLOPs of all parts over what the chips could do in the step's time (2204.02311)."""
        flops = sum(
            part.program.calls * (part.program.model_flops if causal else part.program.model_flops_non_causal)
            for part in self.parts
        )
        return flops / self.seconds_per_step / (self.where.chips * self.where.chip.flops)

    @property
    def tokens_per_second_per_chip(self) -> float:
        return self.tokens_per_step / self.seconds_per_step / self.where.chips

    @property
    def days(self) -> float:
        return self.steps * self.seconds_per_step / 86_400

    def price(self, per_chip_hour: float) -> float:
        """Of the whole run."""
        return self.days * 24 * self.where.chips * per_chip_hour


def plan_stage(stage: Any, recipe: Recipe, where: Slice, *, compiler: bool) -> StagePlan:
    """Plans one stage.  Raises ValueError where mesh, batch or parameters do not fit the slice's shape."""
    abstract = abstract_mesh(stage.mesh, where)
    by_hand = programs(stage, recipe, abstract)
    peaks = stage_memory(by_hand, abstract)
    network = Network(where, dict(abstract.shape))
    answers: list[Compiled | None] = [None] * len(by_hand)
    if compiler:
        mesh = topology_mesh(stage.mesh, where)
        answers = [
            None if program.jitted is None else compile_program(program, mesh)
            for program in programs(stage, recipe, mesh)
        ]
    kept = resident(by_hand)
    parts = []
    for program, peak, answer in zip(by_hand, peaks, answers, strict=True):
        walked = answer.program if answer is not None else None
        items = walked.items if walked is not None else items_of(program, abstract)
        totals = walked.totals() if walked is not None else None
        flops = sum(executed_flops(program, abstract)) if totals is None else totals.flops + totals.kernel_flops
        parts.append(
            Part(
                program=program,
                memory=peak,
                compiled=answer,
                beside=peak.parts.get("reference and critic", 0) if kept else 0,
                flops=flops,
                times=walk_times(items, network),
                collectives=table_of_collectives(items, network),
            )
        )
    return StagePlan(name=stage.name, steps=stage.steps, where=where, parts=tuple(parts))


def remedies(stage: Any, recipe: Recipe, found: StagePlan) -> Iterator[str]:
    """Changes of the stage that would make it fit, each alone, as far as counting by hand tells: the estimate is scaled
    by what the compiler said of the stage as it is."""
    where = found.where
    scale = (found.compiler_bytes_per_chip or found.hbm_bytes_per_chip) / found.hbm_bytes_per_chip

    def needs(changed: Any, slice_: Slice = where) -> float:
        try:
            mesh = abstract_mesh(changed.mesh, slice_)
            own = programs(changed, recipe, mesh)
        except ValueError:
            return math.inf
        return scale * max(peak.total for peak in stage_memory(own, mesh)) * slice_.chip.devices

    usable = where.chip.usable_bytes
    changes: list[tuple[str, Any]] = []
    name = type(stage.model).__name__
    if stage.model.remat in REMATS:
        for remat in REMATS[REMATS.index(stage.model.remat) + 1 :]:
            changes.append((f"{name}.remat = {remat!r}", _with_model(stage, remat=remat)))
    least = _with_model(stage, remat="full") if stage.model.remat in REMATS else stage
    rows = stage.ppo.minibatch_size if isinstance(stage, PPOStage) else stage.batch_size
    devices = found.parts[0].program.split(abstract_mesh(stage.mesh, where), "batch")
    for times in (2, 4, 8, 16):
        if rows % (stage.accumulate * times * devices) == 0:  # a row for every device in each microbatch
            text = f"{type(stage).__name__}.accumulate = {stage.accumulate * times}"
            changes.append((text, dataclasses.replace(stage, accumulate=stage.accumulate * times)))
            if least is not stage:
                both = dataclasses.replace(least, accumulate=stage.accumulate * times)
                changes.append((f"{text} and {name}.remat = 'full'", both))
    if stage.mesh.data > 1 or stage.mesh.data == -1:
        sizes = stage.mesh.sizes(where.devices)
        mesh = dataclasses.replace(stage.mesh, data=1, fsdp=sizes["data"] * sizes["fsdp"])
        changes.append(
            (f"MeshConfig.fsdp = {mesh.fsdp} and MeshConfig.data = 1", dataclasses.replace(stage, mesh=mesh))
        )
    for text, changed in changes:
        if (size := needs(changed)) <= usable:
            yield f"{text} ({size / 2**30:.1f} GiB a chip)"
    for times in (2, 4, 8):
        larger = dataclasses.replace(where, shape=(*where.shape[:-1], where.shape[-1] * times))
        if (size := needs(stage, larger)) <= usable:
            yield f"--topology {larger.name} ({size / 2**30:.1f} GiB a chip)"
            break


def _with_model(stage: Any, **changes: Any) -> Any:
    changed = {"model": dataclasses.replace(stage.model, **changes)}
    if getattr(stage, "critic", None) is not None:
        changed["critic"] = dataclasses.replace(stage.critic, **changes)
    return dataclasses.replace(stage, **changed)
