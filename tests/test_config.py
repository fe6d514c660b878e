"""The checks of a recipe: what contradicts itself is refused when it is read, naming both sides."""

from __future__ import annotations

import dataclasses

import pytest

from jaxtrain.config import CONFIGURABLES, PPOStage, Recipe, Samples, Stage, WeightedReward
from jaxtrain.config_json import from_json, to_json
from jaxtrain.data.datasets import InstructionDataset, PairDataset, PromptDataset, TextDataset
from jaxtrain.data.sources import JsonLines, TextFiles
from jaxtrain.data.tokenizer import SentencePieceBPE
from jaxtrain.models import DecoderConfig
from jaxtrain.objectives import DPO, LM, SFT, PPOCritic, PPOPolicy, PPOShared, RewardModel
from jaxtrain.optim import OPTIMIZERS, SCHEDULES
from jaxtrain.rl.config import PPOConfig
from jaxtrain.rl.rewards import LengthReward

MODEL = DecoderConfig(vocab_size=300, num_layers=1, d_model=16, num_heads=2, num_kv_heads=1, d_ff=32, max_positions=64)
CRITIC = dataclasses.replace(MODEL, heads=("value",))
TEXT, ROWS = TextFiles(pattern="*.txt"), JsonLines(pattern="*.jsonl")
OPTIMIZER = OPTIMIZERS["AdamW"](schedule=SCHEDULES["Constant"](peak=1e-3))
PPO = PPOConfig(iterations=3, prompts_per_iteration=8, max_new_tokens=8, minibatch_size=4, epochs=2)


def stage(**changes):
    settings = {
        "name": "lm", "model": MODEL, "data": TextDataset(source=TEXT, seq_len=32), "objective": LM(),
        "optimizer": OPTIMIZER, "steps": 2, "batch_size": 4,
    }  # fmt: skip
    return Stage(**settings | changes)


def ppo_stage(**changes):
    settings = {
        "name": "ppo", "model": MODEL, "data": PromptDataset(source=ROWS, max_prompt_len=16), "ppo": PPO,
        "objective": PPOPolicy(), "optimizer": OPTIMIZER, "init": "lm", "critic": CRITIC,
        "critic_objective": PPOCritic(), "critic_optimizer": OPTIMIZER,
        "rewards": (WeightedReward(reward=LengthReward(maximum=4)),),
    }  # fmt: skip
    return PPOStage(**settings | changes)


def recipe(*stages, vocab_size=300, **settings):
    return Recipe(tokenizer=SentencePieceBPE(vocab_size=vocab_size, sources=(TEXT,)), stages=stages, **settings)


@pytest.mark.smoke
def test_a_chain_knows_its_parents():
    chain = recipe(
        stage(),
        stage(name="rm", init="lm", data=PairDataset(source=ROWS, seq_len=32), objective=RewardModel(),
              model=dataclasses.replace(MODEL, heads=("reward",))),
        ppo_stage(reward_model="rm", critic_init="rm"),
    )  # fmt: skip
    assert [s.parents() for s in chain.stages] == [(), ("lm",), ("lm", "rm")]
    assert chain.stages[-1].steps == 3 and PPO.updates == 3 * 2 * 2
    assert from_json(to_json(chain), {cls.__name__: cls for cls in CONFIGURABLES}) == chain


PAIRS, INSTRUCTIONS = PairDataset(source=ROWS, seq_len=32), InstructionDataset(source=ROWS, seq_len=32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "a/b"}, "a stage's name must be letters, digits, '-' and '_', .* found 'a/b'"),
        ({"name": ""}, "found ''"),
        ({"name": "untrained"}, "not 'untrained'"),
        ({"steps": -1}, "Stage.steps is -1; it must be at least 0"),
        ({"batch_size": 0}, "Stage.batch_size is 0; it must be at least 1"),
        ({"keep": 0}, "Stage.keep is 0"),
        ({"max_skipped": 0}, "Stage.max_skipped is 0"),
        ({"accumulate": 3}, "stage lm: batch_size=4 is not divisible by accumulate=3"),
        (
            {"data": PAIRS},
            "stage lm: the objective LM reads the batches of TextDataset or Instruction.*PairDataset",
        ),
        ({"objective": SFT()}, "SFT reads the batches of InstructionDataset, but data is TextDataset"),
        ({"objective": DPO()}, "DPO reads the batches of PairDataset, but data is TextDataset"),
        (
            {"data": TextDataset(source=TEXT, seq_len=65)},
            "sequences of up to 65 tokens, .* max_positions is 64; raise",
        ),
        ({"reference": "x"}, "reference='x', but LM has no reference"),
    ],
    ids=str,
)
def test_stages_that_contradict_themselves(changes, message):
    with pytest.raises(ValueError, match=message):
        stage(**changes)
    assert stage(objective=LM(), data=INSTRUCTIONS).parents() == ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"critic": None}, "a separate critic needs critic, critic_objective and critic_optimizer"),
        (
            {"ppo": dataclasses.replace(PPO, critic="shared"), "objective": PPOShared()},
            "ppo.critic is 'shared', so critic and its settings must be None",
        ),
        ({"rewards": ()}, "stage ppo: there is neither a reward_model nor any rewards"),
        (
            {"ppo": dataclasses.replace(PPO, max_new_tokens=49)},
            "up to 65 tokens, but the model's max_positions is 64",
        ),
        (
            {"critic": dataclasses.replace(CRITIC, max_positions=16)},
            "up to 24 tokens, .* max_positions is 16",
        ),
        ({"objective": PPOShared()}, "needs the objective PPOPolicy; found PPOShared"),
        ({"evaluation_prompts": -1}, "PPOStage.evaluation_prompts is -1"),
    ],
    ids=str,
)
def test_ppo_stages_that_contradict_themselves(changes, message):
    with pytest.raises(ValueError, match=message):
        ppo_stage(**changes)


def test_recipes_that_contradict_themselves(tmp_path):
    for stages, settings, message in [
        ((), {}, "Recipe.stages is empty"),
        ((MODEL,), {}, "Recipe.stages holds a DecoderConfig; only Stage and PPOStage are stages"),
        ((stage(), stage()), {}, "two stages are called 'lm'"),
        ((stage(),), {"vocab_size": 301}, "the model's vocab_size=300 is smaller than the tokenizer's 301"),
        (
            (stage(), ppo_stage(critic=dataclasses.replace(CRITIC, vocab_size=290))),
            {},
            "the critic's vocab_size=290",
        ),
        (
            (stage(init="b"),),
            {},
            r"stage lm starts from 'b', which is neither an earlier stage \(there is none\)",
        ),
        ((stage(init="b"), stage(name="b")), {}, "it comes later in the chain"),
        (
            (stage(), ppo_stage(reward_model="lm")),
            {},
            r"reward_model='lm' has the heads \('lm',\), no 'reward'",
        ),
        ((stage(),), {"seed": -1}, "Recipe.seed is -1"),
    ]:
        with pytest.raises(ValueError, match=message):
            recipe(*stages, **settings).check_folders()
    recipe(stage(init=str(tmp_path))).check_folders()  # the folder of another run's stage
    recipe(stage(init="not/yet/there"))  # which a plan does not need
    with pytest.raises(ValueError, match=r"Samples\.top is 0"):
        Samples(top=0)
