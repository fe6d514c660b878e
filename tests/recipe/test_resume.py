"""``kill -9`` at a random moment, then the same command: the log is an uninterrupted run's, bit for bit."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time

import pytest

from jaxtrain.checkpoint import saved_steps

WALL = ("seconds", "tokens_per_second")
# Saving takes most of the time of these runs, so a kill often falls into a save.
LONG = [
    "Stage.steps = 40",
    "Stage.checkpoint_every = 3",
    "Stage.evaluate_every = 10",
    "PPOConfig.iterations = 12",
]
STAGES = {"lm": "lm/Stage", "sft": "sft/Stage", "ppo": "ppo/PPOStage"}


def arguments(chain, name, out, *bindings):
    """Runs the stage ``name`` alone, from the finished stages of ``chain``."""
    parents = [f"sft/Stage.init = '{chain.stage('lm')}'"] if name == "sft" else []
    if name == "ppo":
        fields = {"init": "sft", "reward_model": "reward", "critic_init": "reward"}
        parents = [f"PPOStage.{field} = '{chain.stage(parent)}'" for field, parent in fields.items()]
    words = [f"Recipe.stages = (@{STAGES[name]}(),)", *LONG, *parents, *bindings]
    # A binding that nothing reads is an error: leave out those of the other kind of stage.
    words = [word for word in words if not word.startswith("Stage." if name == "ppo" else "PPO")]
    gin = [part for word in words for part in ("--gin", word)]
    return ["run", only(chain, name), "--out", out, *gin]


def only(chain, name):
    """The recipe without the bindings of other stages."""
    path = chain.folder / f"{name}.gin"
    keep = {
        "lm": ("lm/", "Stage.", "BitsPerByte.", "TextDataset."),
        "sft": ("sft/", "Stage.", "HeldOut.", "Measure.", "InstructionDataset.", "JsonLines."),
        "ppo": ("PPO", "critic/", "WeightedReward.", "LengthReward.", "PromptDataset.", "JsonLines."),
    }[name] + (
        "Recipe.",
        "Samples.",
        "SentencePieceBPE.",
        "TextFiles.",
        "DecoderConfig.",
        "AdamW.",
        "Constant.",
    )
    lines = [line for line in chain.recipe.read_text().splitlines() if line.startswith(keep)]
    if name == "lm":
        lines = [line for line in lines if not line.startswith("Stage.evaluation")]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def logged(out, name):
    """Every row of the log without what a clock decides."""
    lines = (out / "stages" / name / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in WALL} for line in lines]


def wait_for(condition, process, log, seconds=180):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"the run ended by itself:\n{log.read_text()[-2000:]}"
        assert time.monotonic() < deadline, f"nothing to kill after {seconds} s:\n{log.read_text()[-2000:]}"
        time.sleep(0.02)


def kill_midway(chain, name, out, start, log, *, devices=8):
    """Starts the stage as a process and kills it at a random moment after its first checkpoint."""
    process = start(*arguments(chain, name, out), devices=devices, log=log)
    folder = out / "stages" / name
    wait_for(lambda: saved_steps(folder / "checkpoints"), process, log)
    time.sleep(random.uniform(0.0, 0.4))
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (folder / "result.json").exists()
    return out


@pytest.fixture(scope="module")
def uninterrupted(chain, jaxtrain):
    done = {}

    def run(name):
        if name not in done:
            out = chain.folder / f"whole-{name}"
            result = jaxtrain(*arguments(chain, name, out))
            assert result.code == 0, result.err
            done[name] = logged(out, name)
        return done[name]

    return run


@pytest.fixture
def killed_lm(chain, tmp_path, start):
    """A run of the LM stage on a machine with one device, killed."""
    return kill_midway(chain, "lm", tmp_path / "out", start, tmp_path / "log", devices=1)


@pytest.mark.parametrize("name", STAGES)
def test_a_killed_run_logs_what_an_uninterrupted_one_does(name, chain, uninterrupted, start, jaxtrain, tmp_path):
    whole = uninterrupted(name)
    out = kill_midway(chain, name, tmp_path / "out", start, tmp_path / "log")
    again = jaxtrain(*arguments(chain, name, out))
    assert again.code == 0, again.err
    assert f"{name}: continuing after" in again.err
    assert logged(out, name) == whole
    assert len([row for row in whole if "loss" in row or "objective/scores" in row]) == (12 if name == "ppo" else 40)


def test_a_run_of_one_device_continues_on_one_and_on_eight(chain, killed_lm, uninterrupted, jaxtrain, tmp_path):
    whole = uninterrupted("lm")
    wide = shutil.copytree(killed_lm, tmp_path / "wide")
    one = jaxtrain(*arguments(chain, "lm", killed_lm))
    eight = jaxtrain(
        *arguments(chain, "lm", wide, "Stage.mesh = @MeshConfig()", "MeshConfig.data = 4", "MeshConfig.fsdp = 2")
    )
    for result, out in ((one, killed_lm), (eight, wide)):
        assert result.code == 0, result.err
        assert "lm: continuing after step" in result.err
        found = logged(out, "lm")
        assert [row["step"] for row in found] == [row["step"] for row in whole]
        for row, expected in zip(found, whole, strict=True):
            assert row == pytest.approx(expected, rel=1e-5, abs=1e-6)
