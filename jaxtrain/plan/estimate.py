"""A stage's plan: memory, time and money, by hand and by the compiler."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxtrain.config import Recipe
from jaxtrain.plan.analytic import executed_flops, items_of
from jaxtrain.plan.chips import Slice
from jaxtrain.plan.compile import Compiled, compile_program, topology_mesh
from jaxtrain.plan.hlo import Item, priced
from jaxtrain.plan.memory import Peak, placed_bytes, stage_memory
from jaxtrain.plan.moments import Traces
from jaxtrain.plan.programs import Program, abstract_mesh, programs
from jaxtrain.plan.roofline import Network, Times, table_of_collectives, walk_times


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """One program of a stage.  Figures are of one call; bytes and flops per device.

    memory: by hand.  compiled: the compiler's answer, None where it was not asked.  beside: bytes of arrays that lie on
        the device and are no argument of the program.
    flops: of matrix products and kernels, as they run.  items: what it does, in order, and network: over what.
    """

    program: Program
    memory: Peak
    compiled: Compiled | None
    beside: int
    flops: float
    times: Times
    items: tuple[Item, ...]
    network: Network

    @property
    def collectives(self) -> list[dict]:
        """What is sent, see ``table_of_collectives``."""
        return table_of_collectives(self.items, self.network)

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


def plan_stage(
    stage: Any, recipe: Recipe, where: Slice, *, compiler: bool, by_hand: StagePlan | None = None
) -> StagePlan:
    """Plans one stage.  Raises ValueError where mesh, batch or parameters do not fit the slice's shape.

    by_hand: the stage's plan without the compiler, where there is one.
    """
    if by_hand is None:
        abstract = abstract_mesh(stage.mesh, where)
        by_hand = plan_by_hand(stage, programs(stage, recipe, abstract), where, abstract)
    if not compiler:
        return by_hand
    mesh = topology_mesh(stage.mesh, where)
    parts = [
        _compiled(part, compile_program(program, mesh), mesh)
        for part, program in zip(by_hand.parts, programs(stage, recipe, mesh), strict=True)
    ]
    return dataclasses.replace(by_hand, parts=tuple(parts))


def plan_by_hand(stage: Any, found: list[Program], where: Slice, mesh: Any, traces: Traces | None = None) -> StagePlan:
    """Without the compiler.  found: the stage's programs on ``mesh``, the abstract one.  traces: of other plans."""
    network = Network(where, dict(mesh.shape))
    parts = []
    for program, peak in zip(found, stage_memory(found, mesh, traces), strict=True):
        items = items_of(program, mesh)
        parts.append(
            Part(
                program=program,
                memory=peak,
                compiled=None,
                beside=peak.parts.get("reference and critic", 0) + placed_bytes((program.held, program.slots)),
                flops=sum(executed_flops(program, mesh)),
                times=walk_times(items, network),
                items=items,
                network=network,
            )
        )
    return StagePlan(name=stage.name, steps=stage.steps, where=where, parts=tuple(parts))


def seconds_by_hand(found: list[Program], where: Slice, mesh: Any) -> float:
    """A step's, as ``plan_by_hand`` says, without its memory."""
    network = Network(where, dict(mesh.shape))
    return sum(program.calls * walk_times(items_of(program, mesh), network).seconds for program in found)


def _compiled(part: Part, answer: Compiled, mesh: Any) -> Part:
    """With the compiler's answer; what it refused has none but for its size.  mesh: what it compiled for."""
    if answer.program is None:
        return dataclasses.replace(part, compiled=answer)
    if not part.network.where.chip.is_tpu:
        kernels = executed_flops(part.program, mesh)[1]
        answer = dataclasses.replace(answer, program=priced(answer.program, kernels))
    totals = answer.program.totals()
    return dataclasses.replace(
        part,
        compiled=answer,
        flops=totals.flops + totals.kernel_flops,
        times=walk_times(answer.program.items, part.network),
        items=answer.program.items,
    )
