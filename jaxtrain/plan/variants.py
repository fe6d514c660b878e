"""Other ways to run a stage: the same batch, model and objective with another mesh, remat or number of microbatches,
and the gin bindings that say so.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

from jaxtrain.config import PPOStage, Recipe, trained_models
from jaxtrain.models import build_model
from jaxtrain.models.pipeline import bubble, divides, most_microbatches
from jaxtrain.plan.chips import Slice
from jaxtrain.plan.programs import Program
from jaxtrain.sharding import DEFAULT_RULES, MeshConfig

# What the backward pass finds done, from the least that is computed again to the most.
_ATTENTION = ("query", "key", "value", "attention")
REMATS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("none", ()),
    ("dots", ()),
    ("full", (*_ATTENTION, "mlp_gate", "mlp_up")),
    ("full", _ATTENTION),
    ("full", ("attention",)),
    ("full", ()),
)
# From where on a search splits sequences: shorter ones fill devices by rows, at less that is sent.
LONG = 32_768
# How often a microbatch passes the stages of a pipeline, and the part of a step that these may idle at most.
ROUNDS = (1, 2, 4)
MOST_IDLE = 1 / 4
# What a variant may change in a model's config.
MODEL_FIELDS = ("remat", "remat_save", "remat_offload", "pipeline_rounds", "pipeline_microbatches")


def rows_of(stage: Any) -> int:
    """Of the batch that microbatches are cut from."""
    return stage.ppo.minibatch_size if isinstance(stage, PPOStage) else stage.batch_size


def length_of(stage: Any) -> int:
    """Of a row, in tokens."""
    if isinstance(stage, PPOStage):
        return stage.data.max_prompt_len + stage.ppo.max_new_tokens
    return stage.data.seq_len


def with_model(stage: Any, **changes: Any) -> Any:
    """With these fields of every trained model."""
    models = {name: dataclasses.replace(getattr(stage, name), **changes) for name in trained_models(stage)}
    return dataclasses.replace(stage, **models)


def with_remat(stage: Any, remat: str, save: tuple[str, ...]) -> Any:
    """Names in the order that the stage has, where it has the same."""
    had = stage.model.remat_save
    return with_model(stage, remat=remat, remat_save=had if set(had) == set(save) else save, remat_offload=())


def meshes(stage: Any, where: Slice) -> Iterator[MeshConfig]:
    """All that fill the slice with axes that the stage can use, at every level of ZeRO that makes a difference.

    Tensor parallelism stays within a host's GPUs or one dimension of a torus; expert parallelism is of mixtures;
    sequences are split from ``LONG`` tokens on; several slices are joined by ``data`` or by pipeline stages, which are
    tried where they idle for at most ``MOST_IDLE`` of the time.
    """
    experts = max((getattr(layer.mlp, "num_experts", 1) for layer in stage.model.spec().layers()), default=1)
    chip = where.chip
    near = (max(where.shape) if chip.is_tpu else chip.chips_per_host) * chip.devices
    for tensor in _divisors(where.devices, near):
        for expert in _divisors(where.devices // tensor, experts):
            if experts % expert:
                continue
            rest = where.devices // tensor // expert
            for context in _divisors(rest, length_of(stage) // (LONG // 4)) if length_of(stage) >= LONG else (1,):
                ways = rest // context * expert
                for stages in _divisors(rest // context, rest):
                    if stages > 1 and not rounds(_free(stage), stages, ways):
                        continue
                    for data in _divisors(rest // context // stages, rest):
                        if stages % (where.slices // math.gcd(data, where.slices)):
                            continue
                        fsdp = rest // context // stages // data
                        sizes = {"data": data, "fsdp": fsdp, "tensor": tensor, "context": context, "stage": stages}
                        for zero, zero_data in _levels(sizes):
                            yield MeshConfig(**sizes, expert=expert, zero=zero, zero_data=zero_data)


def rounds(stage: Any, stages: int, ways: int, most_idle: float = MOST_IDLE) -> list[int]:
    """Those of ``ROUNDS``, and the stage's own, that a pipeline of so many stages can have, rows being split over
    ``ways`` devices, without idling too long.  None for models without a pipeline."""
    models = [getattr(stage, name) for name in trained_models(stage)]
    rows = rows_of(stage) // ways  # of a device, in a step without microbatches of its own
    if not rows or not all(hasattr(model, "pipeline_rounds") for model in models):
        return []
    stacks = [spec.stacks[spec.pipelined] for spec in (model.spec() for model in models)]
    microbatches = stage.model.pipeline_microbatches or most_microbatches(stages, rows)
    return [
        count
        for count in sorted({*ROUNDS, stage.model.pipeline_rounds})
        if bubble(stages, microbatches, count) <= most_idle
        and all(divides(layers, stages * count) for layers in stacks)
    ]


def schedules(stage: Any) -> Iterator[Any]:
    """The stage with every number of rounds that its mesh's pipeline can have, its own first; as it is without one."""
    if stage.mesh.stage == 1:
        yield stage
        return
    count, ways, own = stage.mesh.stage, rows_ways(stage.mesh), stage.model.pipeline_rounds
    if own in rounds(stage, count, ways, most_idle=1):
        yield stage
    yield from (with_model(stage, pipeline_rounds=n) for n in rounds(stage, count, ways) if n != own)


def on_mesh(stage: Any, mesh: MeshConfig) -> Any:
    """The stage on another mesh; how a pipeline of other stages cuts its batch is left to the model."""
    return dataclasses.replace(stage if mesh.stage == stage.mesh.stage else _free(stage), mesh=mesh)


def _free(stage: Any) -> Any:
    """Without a number of the pipeline's microbatches, which is of its number of stages."""
    had = getattr(stage.model, "pipeline_microbatches", 0)
    return with_model(stage, pipeline_microbatches=0) if had else stage


def _levels(sizes: dict[str, int]) -> Iterator[tuple[int, bool]]:
    for zero in (3, 2, 1) if sizes["fsdp"] > 1 else (3,):
        yield from ((zero, split) for split in ((False, True) if sizes["data"] > 1 else (False,)))


def _divisors(number: int, most: int) -> list[int]:
    return [n for n in range(1, min(number, most) + 1) if number % n == 0]


def remats(stage: Any) -> Iterator[Any]:
    """The stage with every kind of remat, its own first."""
    yield stage
    if not hasattr(stage.model, "remat"):
        return
    own = (stage.model.remat, frozenset(stage.model.remat_save), ())
    for remat, save in REMATS:
        if (remat, frozenset(save), tuple(stage.model.remat_offload)) != own:
            yield with_remat(stage, remat, save)


def microbatches(stage: Any, ways: int) -> list[int]:
    """Numbers of microbatches with a row for each of ``ways`` devices: powers of two, and the stage's own."""
    rows = rows_of(stage)
    counts = {2**n for n in range(rows.bit_length())} | {stage.accumulate}
    return sorted(n for n in counts if rows % (n * ways) == 0)


def vary(program: Program, base: Any, stage: Any) -> Program:
    """A program of ``base`` as ``stage`` has it: fit for counting by hand, with what differs in remat, microbatches
    and the level of ZeRO, none of which moves its parameters."""
    configs = {getattr(base, name): getattr(stage, name) for name in trained_models(base)}
    config = configs.get(program.model.config, program.model.config)
    changes: dict[str, Any] = {"model": build_model(config)}
    if program.kind == "train":
        changes |= {"accumulate": stage.accumulate, "zero": stage.mesh.zero}
    return dataclasses.replace(program, **changes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Binding:
    """``kind.field = value`` in gin."""

    kind: str
    field: str
    value: Any

    def gin(self, scope: str = "") -> str:
        return f"{scope}{'/' if scope else ''}{self.kind}.{self.field} = {self.value!r}"


def bindings(stage: Any, changed: Any) -> list[Binding]:
    """What makes ``changed`` of a stage."""
    found = []

    def compare(old: Any, new: Any, names: list[str]) -> None:
        for name in names:
            if getattr(old, name) != getattr(new, name):
                binding = Binding(kind=type(new).__name__, field=name, value=getattr(new, name))
                if binding not in found:
                    found.append(binding)

    def fields(config: Any) -> list[str]:
        return [field.name for field in dataclasses.fields(config)]

    compare(stage.mesh, changed.mesh, fields(stage.mesh))
    for name in trained_models(stage):
        # What a family derives (head_dim, RoPE) is no business of a binding.
        model = getattr(stage, name)
        compare(model, getattr(changed, name), [field for field in MODEL_FIELDS if hasattr(model, field)])
    compare(stage.optimizer, changed.optimizer, fields(stage.optimizer))
    if getattr(stage, "critic_optimizer", None) is not None:
        compare(stage.critic_optimizer, changed.critic_optimizer, fields(stage.critic_optimizer))
    compare(stage, changed, ["accumulate"])
    return found


# Bindings on top of a recipe's files -> the recipe.
Load = Callable[[list[str]], Recipe]


def gin_lines(found: list[Binding], stage: Any, changed: Any, recipe: Recipe, load: Load | None) -> list[str]:
    """The bindings as lines for the recipe's file, under the stage's scope where that is what it takes.

    They are tried: the recipe is loaded with them.  Where neither scope gives the changed stage (its file names
    further scopes of its own), the plain lines come with a comment that says so.
    """
    number = next(i for i, one in enumerate(recipe.stages) if one.name == stage.name)
    plain = [one.gin() for one in found]
    if load is None:
        return plain
    best: list[str] | None = None
    for scope in ("", stage.name):
        lines = [one.gin(scope) for one in found]
        try:
            loaded = load(lines)
        except ValueError:  # such as a batch of another stage that does not divide
            continue
        if loaded.stages[number] != changed:
            continue
        if all(a == b for i, (a, b) in enumerate(zip(loaded.stages, recipe.stages, strict=True)) if i != number):
            return lines
        best = best or lines
    if best is None:
        return [f"# for the stage {stage.name}, under the scopes that its file gives it:", *plain]
    return ["# These bind other stages too:", *best] if len(recipe.stages) > 1 else best


def rows_ways(mesh: MeshConfig) -> int:
    """Over how many devices a mesh without a -1 splits rows."""
    return math.prod(getattr(mesh, axis) for axis in DEFAULT_RULES.spec(("batch",))[0])
