"""A small recipe of every stage, on no data at all: planning reads none."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os

import pytest

from jaxtrain import gin_edge
from jaxtrain import main as command_line
from jaxtrain.config import CONFIGURABLES, Recipe

RECIPE = """
Recipe.tokenizer = @SentencePieceBPE()
Recipe.stages = (@lm/Stage(), @sft/Stage(), @reward/Stage(), @dpo/Stage(), @ppo/PPOStage())
SentencePieceBPE.vocab_size = 512
SentencePieceBPE.sources = (@TextFiles(),)
TextFiles.pattern = 'there/is/none/*.txt'
JsonLines.pattern = 'there/is/none/*.jsonl'

DecoderConfig.vocab_size = 512
DecoderConfig.num_layers = 4
DecoderConfig.d_model = 256
DecoderConfig.num_heads = 4
DecoderConfig.num_kv_heads = 2
DecoderConfig.head_dim = 128
DecoderConfig.d_ff = 512
DecoderConfig.max_positions = 512
DecoderConfig.compute_dtype = 'bfloat16'
DecoderConfig.remat = 'full'

Stage.model = @DecoderConfig()
Stage.optimizer = @AdamW()
Stage.steps = 1000
Stage.batch_size = 16
Stage.mesh = @MeshConfig()
PPOStage.mesh = @MeshConfig()
MeshConfig.fsdp = -1
AdamW.schedule = @Constant()
Constant.peak = 1e-4

lm/Stage.name = 'lm'
lm/Stage.data = @TextDataset()
lm/Stage.objective = @LM()
TextDataset.source = @TextFiles()
TextDataset.seq_len = 512

sft/Stage.name = 'sft'
sft/Stage.init = 'lm'
sft/Stage.data = @InstructionDataset()
sft/Stage.objective = @SFT()
InstructionDataset.source = @JsonLines()
InstructionDataset.seq_len = 512

reward/Stage.name = 'reward'
reward/Stage.init = 'sft'
reward/Stage.data = @PairDataset()
reward/Stage.objective = @RewardModel()
reward/DecoderConfig.heads = ('reward',)
PairDataset.source = @JsonLines()
PairDataset.seq_len = 512

dpo/Stage.name = 'dpo'
dpo/Stage.init = 'sft'
dpo/Stage.data = @PairDataset()
dpo/Stage.objective = @DPO()

PPOStage.name = 'ppo'
PPOStage.init = 'sft'
PPOStage.reward_model = 'reward'
PPOStage.model = @DecoderConfig()
PPOStage.data = @PromptDataset()
PPOStage.ppo = @PPOConfig()
PPOStage.objective = @PPOPolicy()
PPOStage.optimizer = @AdamW()
PPOStage.critic = @critic/DecoderConfig()
PPOStage.critic_objective = @PPOCritic()
PPOStage.critic_optimizer = @AdamW()
critic/DecoderConfig.heads = ('value',)
PromptDataset.source = @JsonLines()
PromptDataset.max_prompt_len = 256
PPOConfig.iterations = 10
PPOConfig.prompts_per_iteration = 32
PPOConfig.max_new_tokens = 256
PPOConfig.minibatch_size = 16
PPOConfig.epochs = 2
"""


@dataclasses.dataclass(frozen=True)
class Result:
    """What one command did."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def recipe_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("plan") / "recipe.gin"
    file.write_text(RECIPE, encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def recipe(recipe_file):
    """``recipe(*bindings)``: the configuration with changes."""
    return lambda *bindings: gin_edge.load(Recipe, CONFIGURABLES, [recipe_file], bindings).config


@pytest.fixture
def jaxtrain():
    """``jaxtrain(*argv)`` in this process."""

    def call(*argv: object) -> Result:
        out, err = io.StringIO(), io.StringIO()
        before = dict(os.environ)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = command_line.main([str(word) for word in argv])
        os.environ.clear()
        os.environ.update(before)
        return Result(code, out.getvalue(), err.getvalue())

    return call
