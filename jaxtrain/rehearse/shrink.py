"""A recipe in miniature: sizes, steps and data shrink; meshes, objectives, optimizers and choices stay."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

from jaxtrain.config import PPOStage, Recipe, Samples, Stage, trained_models
from jaxtrain.data.datasets import PairDataset, TextDataset
from jaxtrain.data.tokenizer import SentencePieceBPE
from jaxtrain.objectives import LM, RewardModel
from jaxtrain.optim import AdamW, Constant
from jaxtrain.optim.schedules import Schedule
from jaxtrain.plan.variants import rows_ways
from jaxtrain.rehearse.models import VOCABULARY, Sizes, shrink_model
from jaxtrain.rehearse.sources import MadeUp, Sample, cut, is_here
from jaxtrain.sharding import AXES, MeshConfig

STEPS = 4  # of a stage: two before it is stopped, two after
SAMPLED = 8  # tokens of a completion
SAMPLED_BYTES = 16  # of a prompt that samples are taken of
# The fields that name a stage or a folder.  A folder of several roles must have what the first of them needs.
ROLES = ("reward_model", "init", "reference", "critic_init")
VOCABULARY_BYTES = 100_000  # of each source of the tokenizer's


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shrunk:
    """recipe: to run; its first stages stand in for the folders that the real one starts from.

    stand_ins: the names of these stages, by the folder that each stands in for.
    changes: every field that is another than in the full recipe, as lines.
    made_up: what is not read, and what is read in its place, as lines.
    """

    recipe: Recipe
    stand_ins: dict[str, str]
    changes: tuple[str, ...]
    made_up: tuple[str, ...]


def shrink(recipe: Recipe, devices: int, here: Callable[[Any], bool] = is_here) -> Shrunk:
    """``recipe`` for ``devices`` virtual devices.  A pure function but for ``here``: whether a source can be read.

    Raises ValueError where the devices are too few for the axes of a mesh.
    """
    meshes = {stage.name: shrink_mesh(stage.mesh, devices, stage.name) for stage in recipe.stages}
    small = _Shrinker(recipe, meshes, here)
    stand_ins = small.stand_ins()
    stages = [*(stage for _, stage in stand_ins.values()), *(small.stage(stage, stand_ins) for stage in recipe.stages)]
    miniature = Recipe(
        tokenizer=small.tokenizer(),
        stages=tuple(stages),
        samples=_samples(recipe.samples),
        seed=recipe.seed,
        title=f"{recipe.title} (rehearsal)",
    )
    return Shrunk(
        recipe=miniature,
        stand_ins={folder: stage.name for folder, (_, stage) in stand_ins.items()},
        changes=tuple(differences(recipe, miniature)),
        made_up=tuple(small.made_up),
    )


def shrink_mesh(mesh: MeshConfig, devices: int, stage: str) -> MeshConfig:
    """Every axis that is split stays split, those that are split most the more, and none more than it was.

    Raises ValueError where ``devices`` are too few to split every axis in two.
    """
    wanted = {axis: math.inf if getattr(mesh, axis) == -1 else getattr(mesh, axis) for axis in AXES}
    if math.prod(wanted.values()) <= devices:
        return mesh
    split = [axis for axis, size in wanted.items() if size > 1]
    if 2 ** len(split) > devices:
        raise ValueError(
            f"stage {stage}: its mesh splits {len(split)} axes ({', '.join(split)}), each at least in two, which takes "
            f"{2 ** len(split)} virtual devices and not {devices}: give --devices {2 ** len(split)}"
        )
    found = {axis: min(2, size) for axis, size in wanted.items()}
    while True:
        free = [axis for axis in split if 2 * found[axis] <= wanted[axis]]
        if not free or 2 * math.prod(found.values()) > devices:
            return dataclasses.replace(mesh, **found)
        found[max(free, key=lambda axis: wanted[axis] / found[axis])] *= 2


def shrink_schedule(schedule: Schedule, before: int, after: int) -> Schedule:
    """A warm-up that takes the same part of the run, but an update at least where there is room for one."""
    if not schedule.warmup_steps:
        return schedule
    scaled = dataclasses.replace(schedule, warmup_steps=schedule.warmup_steps * after // max(before, 1))
    for one in (dataclasses.replace(scaled, warmup_steps=max(scaled.warmup_steps, 1)), scaled):
        try:
            one.build(after)
        except ValueError:  # it and the decay are longer than the run
            continue
        return one
    return scaled


class _Shrinker:
    """What the parts of one recipe share."""

    def __init__(self, recipe: Recipe, meshes: dict[str, MeshConfig], here: Callable[[Any], bool]):
        self.recipe, self.meshes, self.here = recipe, meshes, here
        self.made_up: dict[str, None] = {}
        sizes = [{axis: getattr(mesh, axis) for axis in AXES} for mesh in meshes.values()]
        self.sizes = Sizes(
            unit=math.lcm(*(math.prod(one.values()) for one in sizes)),
            **{axis: math.lcm(*(one[axis] for one in sizes)) for axis in ("tensor", "expert", "stage")},
            longest=max(_longest(stage) for stage in recipe.stages),
        )

    def tokenizer(self) -> SentencePieceBPE:
        old = self.recipe.tokenizer
        sources = getattr(old, "sources", None)
        size = self.sizes.width(VOCABULARY)
        if sources is not None and all(not hasattr(source, "pattern") for source in sources):
            own = tuple(Sample(source=source) for source in sources)
            return dataclasses.replace(old, vocab_size=size, sources=own, max_bytes=VOCABULARY_BYTES)
        # Any few rows of other text may be too short, or have too many characters, for so few ids.
        self.made_up[f"the {type(old).__name__}: a SentencePieceBPE trained on made-up text"] = None
        return SentencePieceBPE(vocab_size=size, sources=(MadeUp(size=2000),))

    @functools.cached_property
    def _ids(self) -> int | None:
        """Ids of the real tokenizer, where it is known."""
        try:
            return self.recipe.tokenizer.vocab_size
        except ValueError:
            return None

    def model(self, config: Any) -> Any:
        return shrink_model(config, self.sizes, padded=self._ids is not None and config.vocab_size > self._ids)

    def stand_ins(self) -> dict[str, tuple[str, Stage]]:
        """A stage of one step for every folder that a stage starts from; as its ``init`` or its reward model."""
        own, found = {stage.name for stage in self.recipe.stages}, {}
        for stage in self.recipe.stages:
            for role in ROLES:
                folder = getattr(stage, role, None)
                if folder is None or folder in own or folder in found:
                    continue
                name = f"stand-in-{len(found) + 1}"
                while name in own:
                    name += "-"
                heads = ("reward",) if role == "reward_model" else ("lm",)
                critic = folder == getattr(stage, "critic_init", None) and stage.critic
                config = dataclasses.replace(critic or stage.model, heads=heads)
                found[folder] = (role, self._one_step(name, config, stage))
                self.made_up[f"{folder}, the {role} of {stage.name}: fresh parameters, one step from random"] = None
        return found

    def _one_step(self, name: str, config: Any, stage: Any) -> Stage:
        mesh, length = self.meshes[stage.name], self.sizes.length(self.sizes.longest)
        if "reward" in config.heads:
            objective, data = RewardModel(), PairDataset(source=MadeUp(size=length // 2 - 6), seq_len=length)
        else:
            objective, data = LM(), TextDataset(source=MadeUp(size=4 * length), seq_len=length)
        return Stage(
            name=name,
            model=self.model(config),
            data=data,
            objective=objective,
            optimizer=AdamW(schedule=Constant(peak=1e-3)),
            steps=1,
            batch_size=self._rows(config, mesh),
            mesh=mesh,
        )

    def _rows(self, config: Any, mesh: MeshConfig) -> int:
        """Of a microbatch: two a device where one would leave a pipeline, or a single device, without company."""
        ways = rows_ways(mesh)
        return 2 * ways if ways == 1 or mesh.stage > 1 else ways

    def stage(self, stage: Any, stand_ins: dict[str, tuple[str, Stage]]) -> Any:
        mesh = self.meshes[stage.name]
        accumulate = min(stage.accumulate, 2)
        new: dict[str, Any] = {name: self.model(config) for name, config in trained_models(stage).items()}
        new |= {"mesh": mesh, "data": self.data(stage.data), "accumulate": accumulate}
        for role in ROLES:
            if getattr(stage, role, None) in stand_ins:
                new[role] = stand_ins[getattr(stage, role)][1].name
        # A checkpoint between the stop and the end, where the recipe asks for some between.
        new["checkpoint_every"] = min(stage.checkpoint_every, 3)
        rows = self._rows(stage.model, mesh) * accumulate
        if isinstance(stage, PPOStage):
            return dataclasses.replace(stage, **new, **self._ppo(stage, rows))
        steps = min(stage.steps, STEPS)
        return dataclasses.replace(
            stage,
            **new,
            optimizer=_optimizer(stage.optimizer, stage.steps, steps),
            steps=steps,
            batch_size=rows,
            evaluate_every=min(stage.evaluate_every, 2),
            evaluation=tuple(map(self.evaluation, stage.evaluation)),
        )

    def evaluation(self, one: Any) -> Any:
        """Of two batches at most."""
        return dataclasses.replace(one, max_batches=min(one.max_batches or 2, 2), data=one.data and self.data(one.data))

    def _ppo(self, stage: PPOStage, rows: int) -> dict[str, Any]:
        old = stage.ppo
        several = -(-old.prompts_per_iteration // old.minibatch_size) > 1
        ppo = dataclasses.replace(
            old,
            iterations=min(old.iterations, 2),
            prompts_per_iteration=rows * (2 if several else 1),
            minibatch_size=rows,
            max_new_tokens=min(old.max_new_tokens, SAMPLED),
            sampler_slots=rows if old.sampler_slots else 0,
            epochs=min(old.epochs, 2),
            normalise_batches=min(old.normalise_batches, 1),
        )
        optimizers = {
            name: getattr(stage, name) and _optimizer(getattr(stage, name), old.updates, ppo.updates)
            for name in ("optimizer", "critic_optimizer")
        }
        return {"ppo": ppo, "evaluation_prompts": min(stage.evaluation_prompts, 8), **optimizers}

    def data(self, dataset: Any) -> Any:
        """Of a few rows, cut so that whole ones fit: no id of the miniature's tokenizer is less than a byte of text."""
        name = "seq_len" if hasattr(dataset, "seq_len") else "max_prompt_len"
        length = self.sizes.length(getattr(dataset, name))
        size = 4 * length if isinstance(dataset, TextDataset) else max(length // 2 - 6, 8)
        source: Any = Sample(source=dataset.source, size=size)
        if not self.here(dataset.source):
            source = MadeUp(size=size)
            self.made_up[f"{dataset.source}: made-up rows"] = None
        return dataclasses.replace(dataset, source=source, **{name: length})


def _longest(stage: Any) -> int:
    if isinstance(stage, PPOStage):
        return stage.data.max_prompt_len + stage.ppo.max_new_tokens
    return max(stage.data.seq_len, *(one.data.seq_len for one in stage.evaluation if one.data is not None), 0)


def _optimizer(optimizer: Any, before: int, after: int) -> Any:
    new = {"schedule": shrink_schedule(optimizer.schedule, before, after)}
    if hasattr(optimizer, "min_size_to_factor"):
        new["min_size_to_factor"] = min(optimizer.min_size_to_factor, 8)
    return dataclasses.replace(optimizer, **new)


def _samples(samples: Samples) -> Samples:
    def few(prompts: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(cut(prompt, SAMPLED_BYTES) for prompt in prompts[:2])

    return dataclasses.replace(
        samples,
        prompts=few(samples.prompts),
        next_token_prompts=few(samples.next_token_prompts),
        max_new_tokens=min(samples.max_new_tokens, SAMPLED),
    )


def differences(full: Recipe, small: Recipe) -> list[str]:
    """``Class.field: old -> new``, every number and choice once; sources and stages' folders apart."""
    found: dict[str, dict[str, None]] = {}

    def walk(old: Any, new: Any) -> None:
        if type(old) is not type(new) or not dataclasses.is_dataclass(old):
            return
        for field in dataclasses.fields(old):
            a, b = getattr(old, field.name), getattr(new, field.name)
            if isinstance(a, tuple) and len(a) == len(b):
                for pair in zip(a, b, strict=True):
                    walk(*pair)
            if a != b and not dataclasses.is_dataclass(a) and not any(map(dataclasses.is_dataclass, _tuple(a))):
                changes = found.setdefault(f"{type(old).__name__}.{field.name}", {})
                changes[f"{_short(a)} -> {_short(b)}"] = None
            walk(a, b)

    by_name = {stage.name: stage for stage in small.stages}
    for stage in full.stages:
        walk(stage, by_name[stage.name])
    walk(full.tokenizer, small.tokenizer)
    walk(full.samples, small.samples)
    return [f"{name}: {', '.join(changes)}" for name, changes in found.items() if name not in UNTOLD]


UNTOLD = {f"{kind}.{name}" for kind in ("Stage", "PPOStage") for name in ROLES}  # told as what is made up


def _tuple(value: Any) -> tuple:
    return value if isinstance(value, tuple) else ()


def _short(value: Any) -> str:
    text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
