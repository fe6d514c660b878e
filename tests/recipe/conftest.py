"""A whole recipe in miniature, from files written by the test, run through the command line."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from jaxtrain import main as command_line

COLOURS = ("red", "green", "blue", "black", "white", "brown", "grey", "pink", "gold", "teal")
THINGS = ("cat", "dog", "house", "tree", "river", "stone", "bird", "lamp", "door", "cloud")

RECIPE = """
Recipe.tokenizer = @SentencePieceBPE()
Recipe.stages = (@lm/Stage(), @sft/Stage(), @reward/Stage(), @dpo/Stage(), @ppo/PPOStage())
Recipe.seed = 1
Recipe.samples = @Samples()
Samples.prompts = ('Which colour is the cat?',)
Samples.next_token_prompts = ('The ca',)
Samples.max_new_tokens = 4

SentencePieceBPE.vocab_size = 300
SentencePieceBPE.sources = (@TextFiles(),)
TextFiles.pattern = 'DATA/*.txt'
TextFiles.max_document_chars = 120

DecoderConfig.vocab_size = 300
DecoderConfig.num_layers = 1
DecoderConfig.d_model = 16
DecoderConfig.num_heads = 2
DecoderConfig.num_kv_heads = 1
DecoderConfig.d_ff = 32
DecoderConfig.max_positions = 40

Stage.model = @DecoderConfig()
Stage.optimizer = @AdamW()
Stage.steps = 3
Stage.batch_size = 8
Stage.checkpoint_every = 2
Stage.evaluation = (@HeldOut(),)
HeldOut.measures = (@Measure(),)
HeldOut.max_batches = 2
Measure.metric = 'loss'
Measure.label = 'held-out loss'
Measure.better = 'lower'
AdamW.schedule = @Constant()
Constant.peak = 1e-2

lm/Stage.name = 'lm'
lm/Stage.data = @TextDataset()
lm/Stage.objective = @LM()
lm/Stage.evaluation = (@BitsPerByte(),)
BitsPerByte.label = 'held-out bits per byte'
BitsPerByte.max_batches = 2
TextDataset.source = @TextFiles()
TextDataset.seq_len = 32

sft/Stage.name = 'sft'
sft/Stage.init = 'lm'
sft/Stage.data = @InstructionDataset()
sft/Stage.objective = @SFT()
sft/DecoderConfig.dropout = 0.1
InstructionDataset.source = @JsonLines()
InstructionDataset.seq_len = 32
JsonLines.pattern = 'DATA/rows.jsonl'

reward/Stage.name = 'reward'
reward/Stage.init = 'sft'
reward/Stage.data = @PairDataset()
reward/Stage.objective = @RewardModel()
reward/DecoderConfig.heads = ('reward',)
PairDataset.source = @JsonLines()
PairDataset.seq_len = 32

dpo/Stage.name = 'dpo'
dpo/Stage.init = 'sft'
dpo/Stage.data = @PairDataset()
dpo/Stage.objective = @DPO()

PPOStage.name = 'ppo'
PPOStage.init = 'sft'
PPOStage.reward_model = 'reward'
PPOStage.critic_init = 'reward'
PPOStage.model = @DecoderConfig()
PPOStage.data = @PromptDataset()
PPOStage.ppo = @PPOConfig()
PPOStage.objective = @PPOPolicy()
PPOStage.optimizer = @AdamW()
PPOStage.critic = @critic/DecoderConfig()
PPOStage.critic_objective = @PPOCritic()
PPOStage.critic_optimizer = @AdamW()
PPOStage.rewards = (@WeightedReward(),)
PPOStage.checkpoint_every = 1
PPOStage.evaluation_prompts = 8
critic/DecoderConfig.heads = ('value',)
WeightedReward.reward = @LengthReward()
LengthReward.maximum = 4
PromptDataset.source = @JsonLines()
PromptDataset.max_prompt_len = 28
PPOConfig.iterations = 2
PPOConfig.prompts_per_iteration = 8
PPOConfig.max_new_tokens = 6
PPOConfig.minibatch_size = 8
PPOConfig.epochs = 1
"""


def write_data(folder: Path) -> None:
    """Text files, and rows with every standard column."""
    folder.mkdir(parents=True)
    rows = []
    for number, thing in enumerate(THINGS):
        lines = []
        for other, colour in enumerate(COLOURS):
            lines.append(f"The {colour} {thing} stood near the {THINGS[(number + other) % 10]}, number {other}.\n")
            rows.append(
                {
                    "prompt": f"Is the {thing} {colour}?",
                    "completion": f"Yes, {colour}.",
                    "chosen": f"Yes, {colour}.",
                    "rejected": f"No {COLOURS[other - 1]}.",
                }
            )
        (folder / f"{thing}.txt").write_text("\n".join(lines), encoding="utf-8")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@dataclasses.dataclass(frozen=True)
class Result:
    """What one command did."""

    code: int
    out: str
    err: str


def call(*argv: object) -> Result:
    """``jaxtrain ARGV`` in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = command_line.main([str(word) for word in argv])
    return Result(code, out.getvalue(), err.getvalue())


@dataclasses.dataclass(frozen=True)
class Chain:
    """A folder with data, a gin file, and the finished run of its five stages."""

    folder: Path
    recipe: Path
    out: Path
    first: Result

    def stage(self, name: str) -> Path:
        return self.out / "stages" / name


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory):
    """Most of these tests compile the same programs again."""
    folder = tmp_path_factory.mktemp("xla")
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    environment = dict(os.environ)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)
    yield folder
    for name, value in before.items():
        jax.config.update(name, value)
    os.environ.clear()
    os.environ.update(environment)


@pytest.fixture(scope="session")
def chain(tmp_path_factory) -> Chain:
    """The recipe, run once from nothing.  Tests that change the folder work on a copy."""
    folder = tmp_path_factory.mktemp("chain")
    write_data(folder / "data")
    recipe = folder / "recipe.gin"
    recipe.write_text(RECIPE.replace("DATA", str(folder / "data")), encoding="utf-8")
    first = call("run", recipe, "--out", folder / "out")
    assert first.code == 0, first.err
    return Chain(folder, recipe, folder / "out", first)


@pytest.fixture(scope="session")
def recipe_text() -> str:
    """The gin file, with DATA where the folder of its data belongs."""
    return RECIPE


@pytest.fixture(scope="session")
def jaxtrain():
    """``jaxtrain(*argv)`` in this process."""
    return call


@pytest.fixture
def start():
    """Starts ``python -m jaxtrain.main ARGV`` as a process of its own, on ``devices`` CPU devices."""
    running = []

    def popen(*argv: object, devices: int = 8, log: Path):
        env = os.environ | {
            "JAX_DEFAULT_MATMUL_PRECISION": "highest",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "PYTHONPATH": os.pathsep.join(p for p in [str(Path(command_line.__file__).parents[1]), *sys.path] if p),
        }
        with log.open("w") as file:
            words = [sys.executable, "-m", "jaxtrain.main", *map(str, argv)]
            running.append(subprocess.Popen(words, env=env, stdout=file, stderr=subprocess.STDOUT))
        return running[-1]

    yield popen
    for process in running:
        process.kill()
        process.wait()
