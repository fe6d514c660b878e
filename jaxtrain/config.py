"""The configuration of a run: stages, the recipe that chains them, and the checks that cross their borders."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from jaxtrain.config_model import SavedModel, resolve
from jaxtrain.data.datasets import InstructionDataset, PairDataset, PromptDataset, TextDataset
from jaxtrain.data.sources import JsonLines, JsonLinesText, TextFiles
from jaxtrain.data.stdlib import StdlibInstructions, StdlibPairs, StdlibPrompts, StdlibText
from jaxtrain.data.tokenizer import SavedTokenizer, SentencePieceBPE
from jaxtrain.evaluate.heldout import BitsPerByte, HeldOut, Measure
from jaxtrain.models import FAMILIES, DecoderConfig, Rope
from jaxtrain.objectives import DPO, LM, OBJECTIVES, SFT, PPOCritic, PPOPolicy, PPOShared, RewardModel
from jaxtrain.optim import OPTIMIZERS, SCHEDULES
from jaxtrain.optim.optimizers import Optimizer
from jaxtrain.rl.config import PPOConfig
from jaxtrain.rl.rewards import FormatReward, LengthReward
from jaxtrain.sharding import MeshConfig
from jaxtrain.types import Objective

# An objective reads one kind of batch, a data set makes one: what belongs together.
BATCHES = {
    LM: (TextDataset, InstructionDataset),
    SFT: (InstructionDataset,),
    RewardModel: (PairDataset,),
    DPO: (PairDataset,),
}


def _check_reward_parent(stage: Any, earlier: dict[str, Any]) -> None:
    source = earlier.get(getattr(stage, "reward_model", None))
    if source is not None and "reward" not in source.model.heads:
        raise ValueError(
            f"stage {stage.name}: reward_model={stage.reward_model!r} has the heads {source.model.heads}, no 'reward'"
        )


def trained_models(stage: Any) -> dict[str, Any]:
    """The models that a stage trains, by field."""
    fields = {name: getattr(stage, name, None) for name in ("model", "critic")}
    return {name: model for name, model in fields.items() if model is not None}


def check_vocabulary(stage: Any, tokenizer: Any) -> None:
    """Raises ValueError where a model of the stage has fewer rows than the tokenizer has ids."""
    for what, model in trained_models(stage).items():
        # More rows than ids are fine: released models pad their vocabulary to a round number.
        if model.vocab_size < tokenizer.vocab_size:
            raise ValueError(
                f"stage {stage.name}: the {what}'s vocab_size={model.vocab_size} is smaller than the "
                f"tokenizer's {tokenizer.vocab_size}: it would have no row for some ids"
            )


def _no_parent(stage: Any, name: str, earlier: dict[str, Any]) -> str:
    return (
        f"stage {stage.name} starts from {name!r}, which is neither an earlier stage "
        f"({', '.join(earlier) or 'there is none'}) nor a folder"
    )


def _check_name(name: str) -> None:
    if not name or any(not (c.isalnum() or c in "-_") for c in name) or name in ("untrained", "superseded"):
        raise ValueError(
            f"a stage's name must be letters, digits, '-' and '_', and not 'untrained' or 'superseded', found {name!r}"
        )


def _at_least(config: Any, least: int, *names: str) -> None:
    for name in names:
        if getattr(config, name) < least:
            raise ValueError(f"{type(config).__name__}.{name} is {getattr(config, name)}; it must be at least {least}")


def _check_length(name: str, model: DecoderConfig, length: int) -> None:
    if length > model.max_positions:
        raise ValueError(
            f"stage {name}: its data has sequences of up to {length} tokens, but the model's max_positions is "
            f"{model.max_positions}; raise DecoderConfig.max_positions (and look at Rope.scaling) or shorten the data"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """Model + data + objective + optimizer + mesh: one run of the train step.

    model: sizes and choices, or a SavedModel, which is replaced by what it stands for.
    name: of its folder and of its rows in the tables.
    steps: updates.  batch_size: rows an update, over all devices.  accumulate: microbatches they are split into.
    clip_norm: of the gradient, globally; None does not clip.
    init: where parameters come from: the name of an earlier stage, the folder of a stage of another run, or None
        for fresh ones.  Heads that the source lacks are fresh.
    reference: the frozen model that DPO compares with, likewise; None takes ``init``'s.
    checkpoint_every, evaluate_every: updates between; 0 means only at the end.  keep: checkpoints preserved.
    max_skipped: updates in a row with NaN or Inf after which the run is aborted.
    evaluation: what is measured on held-out data before and after.
    """

    name: str
    model: DecoderConfig | SavedModel
    data: Any
    objective: Objective
    optimizer: Optimizer
    steps: int
    batch_size: int
    accumulate: int = 1
    clip_norm: float | None = 1.0
    mesh: MeshConfig = MeshConfig()
    init: str | None = None
    reference: str | None = None
    checkpoint_every: int = 0
    keep: int = 2
    evaluate_every: int = 0
    max_skipped: int = 10
    evaluation: tuple[Any, ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "model", resolve(self.model))
        _check_name(self.name)
        _at_least(self, 0, "steps", "checkpoint_every", "evaluate_every")
        _at_least(self, 1, "batch_size", "accumulate", "keep", "max_skipped")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"stage {self.name}: batch_size={self.batch_size} is not divisible by accumulate={self.accumulate}"
            )
        wanted = BATCHES.get(type(self.objective))
        if wanted and not isinstance(self.data, wanted):
            names = " or ".join(kind.__name__ for kind in wanted)
            raise ValueError(
                f"stage {self.name}: the objective {type(self.objective).__name__} reads the batches of {names}, but "
                f"data is {type(self.data).__name__}"
            )
        _check_length(self.name, self.model, self.data.seq_len)
        if self.reference is not None and not isinstance(self.objective, DPO):
            raise ValueError(
                f"stage {self.name}: reference={self.reference!r}, but {type(self.objective).__name__} has no reference"
            )

    def parents(self) -> tuple[str, ...]:
        """The stages whose checkpoints this one reads."""
        return tuple(name for name in (self.init, self.reference) if name is not None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightedReward:
    """A rule's reward and its weight in the sum."""

    reward: Any
    weight: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class PPOStage:
    """Reinforcement learning: rollouts of the policy, rewards, advantages, and the same train step over them.

    model, critic: the policy and the separate critic (None with ``ppo.critic='shared'``).
    data: prompts.  ppo: the loop's settings.  objective, critic_objective: of the two train steps.
    init: the policy's first parameters, and the frozen reference; as for Stage.
    critic_init: the critic's; None takes ``init``'s trunk with a head of zeros.
    reward_model: a stage trained by RewardModel, or None; reward_weight: its weight.  rewards: rules.
    checkpoint_every: iterations between checkpoints.
    evaluation_prompts: held-out prompts that mean reward and KL are measured on, before and after; 0 measures nothing.
    """

    name: str
    model: DecoderConfig | SavedModel
    data: PromptDataset
    ppo: PPOConfig
    objective: PPOPolicy | PPOShared
    optimizer: Optimizer
    init: str
    critic: DecoderConfig | SavedModel | None = None
    critic_objective: PPOCritic | None = None
    critic_optimizer: Optimizer | None = None
    critic_init: str | None = None
    reward_model: str | None = None
    reward_weight: float = 1.0
    rewards: tuple[WeightedReward, ...] = ()
    accumulate: int = 1
    clip_norm: float | None = 1.0
    mesh: MeshConfig = MeshConfig()
    checkpoint_every: int = 0
    keep: int = 2
    max_skipped: int = 10
    evaluation_prompts: int = 128

    def __post_init__(self):
        for name in ("model", "critic"):
            object.__setattr__(self, name, resolve(getattr(self, name)))
        _check_name(self.name)
        _at_least(self, 0, "checkpoint_every", "evaluation_prompts")
        _at_least(self, 1, "accumulate", "keep", "max_skipped")
        separate = (self.critic, self.critic_objective, self.critic_optimizer)
        if self.ppo.critic == "separate" and None in separate:
            raise ValueError(
                f"stage {self.name}: a separate critic needs critic, critic_objective and critic_optimizer"
            )
        if self.ppo.critic == "shared" and (separate != (None, None, None) or self.critic_init):
            raise ValueError(f"stage {self.name}: ppo.critic is 'shared', so critic and its settings must be None")
        if self.reward_model is None and not self.rewards:
            raise ValueError(f"stage {self.name}: there is neither a reward_model nor any rewards")
        length = self.data.max_prompt_len + self.ppo.max_new_tokens
        _check_length(self.name, self.model, length)
        if self.critic is not None:
            _check_length(self.name, self.critic, length)
        self.ppo.objective(self.objective)

    @property
    def steps(self) -> int:
        return self.ppo.iterations

    def parents(self) -> tuple[str, ...]:
        """The stages whose checkpoints this one reads."""
        names = (self.init, self.critic_init, self.reward_model)
        return tuple(dict.fromkeys(name for name in names if name is not None))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Samples:
    """What is shown of the model before training and after every stage that can write.

    prompts: completed greedily, up to ``max_new_tokens``; in the chat format once the model has learned it.
    next_token_prompts: whose ``top`` likeliest next tokens are listed.
    """

    prompts: tuple[str, ...] = ()
    next_token_prompts: tuple[str, ...] = ()
    max_new_tokens: int = 40
    top: int = 8

    def __post_init__(self):
        _at_least(self, 1, "max_new_tokens", "top")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """A tokenizer and a chain of stages.

    tokenizer: trained on the sources it names, or saved by another run.
    seed: of parameters, data order, dropout and sampling, in every stage.
    title: at the head of the report.
    """

    tokenizer: SentencePieceBPE | SavedTokenizer
    stages: tuple[Any, ...]
    samples: Samples = Samples()
    seed: int = 0
    title: str = "jaxtrain"

    def __post_init__(self):
        _at_least(self, 0, "seed")
        if not self.stages:
            raise ValueError("Recipe.stages is empty: bind at least one @Stage()")
        earlier: dict[str, Any] = {}
        for stage in self.stages:
            if not isinstance(stage, Stage | PPOStage):
                raise ValueError(f"Recipe.stages holds a {type(stage).__name__}; only Stage and PPOStage are stages")
            if stage.name in earlier:
                raise ValueError(f"two stages are called {stage.name!r}; give every stage a name of its own")
            if not isinstance(self.tokenizer, SavedTokenizer):
                check_vocabulary(stage, self.tokenizer)
            for name in stage.parents():
                if name not in earlier and any(s.name == name for s in self.stages) and not Path(name).is_dir():
                    raise ValueError(_no_parent(stage, name, earlier) + " (it comes later in the chain)")
            _check_reward_parent(stage, earlier)
            earlier[stage.name] = stage

    def check_folders(self) -> None:
        """Raises ValueError where a tokenizer's or a model's folder is missing or does not fit: what running needs and
        planning does not."""
        earlier: dict[str, Any] = {}
        for stage in self.stages:
            check_vocabulary(stage, self.tokenizer)
            for name in stage.parents():
                if name not in earlier and not Path(name).is_dir():
                    raise ValueError(_no_parent(stage, name, earlier))
            earlier[stage.name] = stage


# Everything a gin file may name.
CONFIGURABLES: tuple[type, ...] = (
    *(Recipe, Stage, PPOStage, Samples, WeightedReward),
    *FAMILIES,
    *(SavedModel, Rope, MeshConfig),
    *(objective for objective, _ in OBJECTIVES.values()),
    PPOConfig,
    *OPTIMIZERS.values(),
    *SCHEDULES.values(),
    *(TextDataset, InstructionDataset, PairDataset, PromptDataset),
    *(TextFiles, JsonLinesText, JsonLines, StdlibText, StdlibInstructions, StdlibPairs, StdlibPrompts),
    *(SentencePieceBPE, SavedTokenizer),
    *(FormatReward, LengthReward),
    *(HeldOut, BitsPerByte, Measure),
)
