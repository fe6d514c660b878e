"""A whole recipe on two processes under the supervisor, taken away and killed on its way, beside one left in peace."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("lm", "sft", "reward", "dpo", "ppo")
# Eight devices, which are those of one process or of two; held-out rows are read on the way too.
PLACED = """
Stage.mesh = @MeshConfig()
PPOStage.mesh = @MeshConfig()
MeshConfig.data = 4
MeshConfig.fsdp = 2
sft/Stage.evaluate_every = 2
"""
WALL = ("seconds", "tokens_per_second")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """The five stages of tests/recipe."""
    spec = importlib.util.spec_from_file_location("five_stages", ROOT / "tests" / "recipe" / "conftest.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look there
    spec.loader.exec_module(module)
    folder = tmp_path_factory.mktemp("recipe")
    module.write_data(folder / "data")
    file = folder / "recipe.gin"
    file.write_text(module.RECIPE.replace("DATA", str(folder / "data")) + PLACED, encoding="utf-8")
    return file


def rows(out: Path, stage: str) -> list[dict]:
    """The log without what a clock decides."""
    lines = (out / "stages" / stage / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in WALL} for line in lines]


def read(out: Path, stage: str, name: str):
    return json.loads((out / "stages" / stage / name).read_text())


class Launched:
    """launch/local.py with two processes of four devices."""

    def __init__(self, recipe: Path, out: Path, log: Path, env: dict[str, str]):
        words = ["--processes", "2", "--devices", "4", "--backoff", "0.1", "--", "run", recipe, "--out", out]
        self.log = log
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, ROOT / "launch" / "local.py", *map(str, words)],
                env=os.environ | env,
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    def worker(self, number: int) -> int:
        """The process id of a worker that runs now."""
        for pid in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split():
            if f"JAXTRAIN_PROCESS_ID={number}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                return int(pid)
        raise AssertionError(f"no worker {number}: {self.log.read_text()[-3000:]}")

    def wait_for(self, file: Path, seconds: float = 400) -> None:
        until = time.monotonic() + seconds
        while not (file.exists() and file.stat().st_size):
            assert self.process.poll() is None, f"the run ended without {file}: {self.log.read_text()[-3000:]}"
            assert time.monotonic() < until, f"no {file} after {seconds} s: {self.log.read_text()[-3000:]}"
            time.sleep(0.02)


@pytest.mark.slow
def test_two_processes_preempted_and_killed_end_as_one_left_in_peace(recipe, start, environment, tmp_path):
    # The same floats in the same order: a single process adds as several do when it is started like them.
    peaceful, troubled = tmp_path / "peaceful", tmp_path / "troubled"
    one = start(["-m", "jaxtrain.main", "run", recipe, "--out", peaceful], processes=1, devices=8)
    assert one.wait(600) == [0], one.logs[0][-3000:]

    two = Launched(recipe, troubled, tmp_path / "log", environment | {"JAXTRAIN_PEER_TIMEOUT": "20"})
    try:
        # While the stage's programs are compiled, so that the signal comes before its last step.
        for stage, name, number, signum in (
            ("sft", "before.json", 1, signal.SIGTERM),
            ("dpo", "metrics.jsonl", 1, signal.SIGKILL),
            ("ppo", "before.json", 0, signal.SIGTERM),
        ):
            two.wait_for(troubled / "stages" / stage / name)
            os.kill(two.worker(number), signum)
        assert two.process.wait(600) == 0, two.log.read_text()[-3000:]
    finally:
        two.process.kill()
        two.process.wait()

    log = two.log.read_text()
    assert len(re.findall(r"preempted \(", log)) == 2 * 2, log  # twice, by both processes
    assert "sft: continuing after step " in log and "ppo: continuing after iteration 1" in log
    for stage in STAGES:
        assert rows(troubled, stage) == rows(peaceful, stage), stage
        assert rows(troubled, stage)
        for name in ("before.json", "samples.json"):
            assert read(troubled, stage, name) == read(peaceful, stage, name), (stage, name)
        ours, theirs = (read(out, stage, "result.json") for out in (troubled, peaceful))
        assert ours["evaluation"] == theirs["evaluation"] and ours["checkpoint"] == theirs["checkpoint"]
        assert ours["environment"]["devices"].endswith("in 2 processes")
    assert (troubled / "report.html").is_file()


def test_a_single_process_is_preempted_and_continues(recipe, environment, tmp_path):
    """Without any of the variables: a laptop, a machine of its own."""
    out, log = tmp_path / "out", tmp_path / "log"
    words = ["run", recipe, "--out", out, "--gin", "lm/Stage.steps = 400"]
    env = (
        os.environ | environment | {"XLA_FLAGS": f"{environment['XLA_FLAGS']} --xla_force_host_platform_device_count=8"}
    )
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "jaxtrain.main", *map(str, words)], env=env, stdout=file, stderr=file
        )
        try:
            metrics = out / "stages" / "lm" / "metrics.jsonl"
            while not (metrics.exists() and metrics.stat().st_size):  # a step has been made
                assert process.poll() is None, log.read_text()
                time.sleep(0.02)
            process.terminate()
            assert process.wait(120) == 42, log.read_text()
        finally:
            process.kill()
            process.wait()
    assert "jaxtrain: preempted (step " in log.read_text()
    saved = max(int(path.name) for path in (out / "stages" / "lm" / "checkpoints").iterdir() if path.name.isdigit())
    assert f"step {saved} of 400 is saved" in log.read_text()
    assert [row["step"] for row in rows(out, "lm")] == list(range(1, saved + 1))
