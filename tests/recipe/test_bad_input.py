"""What a user can get wrong, through the command line: exit code 43 and a message that names the culprit."""

from __future__ import annotations

import json
import re
import shutil
import types

import numpy as np
import pytest

from jaxtrain.recipe.runtime import overlay
from jaxtrain.rl import rewards
from jaxtrain.rl.loop import PPOLoop
from jaxtrain.train.metrics import MetricLog, read_rows


@pytest.fixture
def refused(chain, jaxtrain, tmp_path):
    """Runs the recipe with bindings, on a copy of the finished run, and returns what it is refused with."""

    def run(*bindings, out=None, recipe=chain.recipe):
        out = out or shutil.copytree(chain.out, tmp_path / "out")
        gin = [part for binding in bindings for part in ("--gin", binding)]
        done = jaxtrain("run", recipe, "--out", out, *gin)
        assert done.code == 43 and "Traceback" not in done.err, done.err
        _, found, line = done.err.rpartition("jaxtrain: error: ")
        assert found
        return line

    return run


@pytest.mark.parametrize(
    ("bindings", "named"),
    [
        (["Stage.stepz = 3"], ["Stage", "stepz", "steps"]),
        (["Stagee.steps = 3"], ["unknown name 'Stagee'", "Stage"]),
        (["lm/Stage.steps = 'many'"], ["steps", "int", "'many'"]),
        (["lm/Stage.steps = 2.5"], ["steps", "int", "2.5"]),
        (["Lion.b1 = 0.9"], ["Lion.b1"]),
        (["lmm/Stage.steps = 3"], ["lmm/Stage.steps"]),
        (["lm/TextDataset.seq_len = 64"], ["stage lm", "64 tokens", "max_positions is 40"]),
        (["PPOConfig.max_new_tokens = 30"], ["stage ppo", "58 tokens", "max_positions is 40"]),
        (["DecoderConfig.vocab_size = 200"], ["stage lm", "vocab_size=200", "300"]),
        (["sft/Stage.init = 'ml'"], ["stage sft", "'ml'", "neither an earlier stage"]),
        (["sft/Stage.init = 'dpo'"], ["stage sft", "'dpo'", "it comes later in the chain"]),
        (["dpo/Stage.name = 'sft'"], ["two stages are called 'sft'"]),
        (["sft/Stage.data = @TextDataset()"], ["stage sft", "SFT", "InstructionDataset", "TextDataset"]),
        (["PPOStage.reward_model = 'sft'"], ["stage ppo", "reward_model='sft'", "no 'reward'"]),
        (["lm/Stage.accumulate = 3"], ["stage lm", "batch_size=8", "accumulate=3"]),
        (["TextFiles.pattern = '/nowhere/*.txt'"], ["no file matches", "/nowhere/*.txt"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) and "=" in value[0] else "",
)
def test_mistakes_in_the_configuration(bindings, named, refused, tmp_path):
    line = refused(*bindings, out=tmp_path / "fresh")
    for text in named:
        assert text in line
    assert not (tmp_path / "fresh" / "stages").exists()


def test_mistakes_in_the_data(refused, recipe_text, chain, tmp_path):
    data = shutil.copytree(chain.folder / "data", tmp_path / "data")
    recipe = tmp_path / "recipe.gin"
    recipe.write_text(recipe_text.replace("DATA", str(data)), encoding="utf-8")

    bad = data / "bird.txt"
    good = bad.read_bytes()
    bad.write_bytes(good[:100] + b"\xff\xfe" + good[100:])
    line = refused(recipe=recipe, out=tmp_path / "a")
    assert str(bad) in line and "invalid UTF-8 at byte 100" in line
    for path in data.glob("*.txt"):
        path.write_text("")
    line = refused(recipe=recipe, out=tmp_path / "a")
    assert f"every file that matches the pattern '{data}/*.txt' is empty" in line


def test_an_id_beyond_the_vocabulary(refused, monkeypatch, tmp_path):
    from jaxtrain.data.tokenizer import Tokenizer

    encode = Tokenizer.encode_batch
    monkeypatch.setattr(Tokenizer, "encode_batch", lambda self, texts: [[*ids, 300] for ids in encode(self, texts)])
    line = refused("Samples.prompts = ()", "Samples.next_token_prompts = ()", out=tmp_path / "fresh")
    assert "300" in line and "TextFiles" in line and "vocabulary" in line


@pytest.mark.parametrize(
    ("bindings", "named"),
    [
        (
            ["dpo/Stage.batch_size = 12", "MeshConfig.data = 8"],
            "stage dpo: batch_size=12 is not divisible by the 8",
        ),
        (
            ["MeshConfig.tensor = 2"],
            "parameter layers/attention/key/kernel .* dimension 'kv_heads' of size 1 is not",
        ),
        (["MeshConfig.data = 64"], "needs 64 devices, but only 8 are visible"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused_before_any_training(bindings, named, refused, tmp_path):
    assert re.search(named, refused("Stage.mesh = @MeshConfig()", *bindings, out=tmp_path / "fresh"))
    assert not (tmp_path / "fresh").exists()


def test_ppo_batches_are_checked_too(refused, tmp_path):
    line = refused(
        "PPOStage.mesh = @MeshConfig()",
        "MeshConfig.data = 8",
        "PPOConfig.minibatch_size = 4",
        out=tmp_path / "fresh",
    )
    assert "stage ppo: ppo.minibatch_size=4 is not divisible by the 8 devices" in line and "multiple of 8" in line


def test_a_checkpoint_of_another_model(refused, chain):
    line = refused(f"dpo/Stage.init = '{chain.stage('sft')}'", "dpo/DecoderConfig.d_ff = 48")
    assert str(chain.stage("sft")) in line and "of another model" in line
    assert "layers/mlp/down/kernel" in line and "(1, 32, 16)" in line and "(1, 48, 16)" in line


def test_a_reward_that_is_not_a_number(refused, monkeypatch):
    real = rewards.LengthReward.__call__

    def poisoned(self, prompts, *rest):
        return [float("nan"), *real(self, prompts, *rest)[1:]]

    monkeypatch.setattr(rewards.LengthReward, "__call__", poisoned)
    line = refused("PPOStage.reward_weight = 2.0")
    assert "LengthReward" in line and "nan" in line


def test_a_critic_that_diverges_ends_the_run(refused, monkeypatch):
    real = PPOLoop.iterate

    def diverged(self, *states):
        *new, metrics = real(self, *states)
        return *new, metrics | {"critic/streak": 10.0, "critic/loss": float("nan")}

    monkeypatch.setattr(PPOLoop, "iterate", diverged)
    assert "step 1: 10 updates in a row had a NaN or Inf loss" in refused("PPOStage.reward_weight = 3.0")


def test_a_full_disk_and_the_same_command_again(refused, chain, jaxtrain, monkeypatch, tmp_path):
    out = shutil.copytree(chain.out, tmp_path / "out")
    real, calls = shutil.disk_usage, []

    def usage(path):
        calls.append(path)
        found = real(path)
        return found if len(calls) == 1 else types.SimpleNamespace(total=found.total, used=found.total, free=10)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    line = refused("dpo/Stage.steps = 5", out=out)
    assert str(out / "stages" / "dpo" / "checkpoints") in line and "the disk is full: checkpoint 4" in line
    assert "continue from step 2" in line
    monkeypatch.undo()
    again = jaxtrain("run", chain.recipe, "--out", out, "--gin", "dpo/Stage.steps = 5")
    assert again.code == 0 and "dpo: continuing after step 2" in again.err
    assert [row["step"] for row in read_rows(out / "stages" / "dpo" / "metrics.jsonl")] == [1, 2, 3, 4, 5]


def test_a_checkpoint_that_lacks_or_exceeds_is_named():
    fresh = {"layers": {"a": np.zeros(3)}, "value_head": {"kernel": np.zeros(2)}}
    loaded = {"layers": {"a": np.ones(3)}, "lm_head": {"kernel": np.zeros(5)}}
    merged = overlay(fresh, loaded, "RUN/stages/x")
    assert merged["layers"]["a"].tolist() == [1, 1, 1] and merged["value_head"]["kernel"].tolist() == [0, 0]
    with pytest.raises(ValueError, match=r"RUN/stages/x is of another model: it lacks \['layers/a'\]"):
        overlay(fresh, {"value_head": fresh["value_head"]}, "RUN/stages/x")
    with pytest.raises(ValueError, match=r"has \['extra'\] in excess"):
        overlay(fresh, {**loaded, "extra": np.zeros(1)}, "x")


def test_a_damaged_log_is_named_and_a_cut_line_is_not(tmp_path):
    with MetricLog(tmp_path, start=0, steps=2, title="t") as log:
        log.write(1, {"loss": float("nan")})
        log.write(2, {"loss": 1.0})
    path = tmp_path / "metrics.jsonl"
    assert [json.loads(line)["loss"] for line in path.read_text().splitlines()] == [None, 1.0]
    path.write_text(path.read_text() + '{"step": 3, "lo')
    assert [row["step"] for row in read_rows(path)] == [1, 2]
    with MetricLog(tmp_path, start=1, steps=2, title="t"):
        assert [row["step"] for row in read_rows(path)] == [1]
    path.write_text('{"step": 1\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:1 is not JSON"):
        read_rows(path)
