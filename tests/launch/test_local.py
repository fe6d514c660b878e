"""The supervisor, with children that crash, fail, are killed, or are asked to stop; and one real run."""

from __future__ import annotations

import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxtrain.data.stdlib import StdlibText

ROOT = Path(__file__).resolve().parents[2]
LOCAL = ROOT / "launch" / "local.py"
# Appends a line to the file that is its first argument, so that tests can count starts.
COUNT = """
import os, signal, sys, time
with open(sys.argv[1], "a+") as file:
    file.write("start\\n")
    file.seek(0)
    n = len(file.readlines())
"""


def command(code: str, starts: Path, *options: str) -> list[str]:
    program = shlex.join([sys.executable, "-c", COUNT + code])
    options = ("--backoff", "0.01", *options, "--program", program)
    return [sys.executable, str(LOCAL), *options, "--", str(starts)]


def launch(code: str, tmp_path: Path, *options: str, env: dict[str, str] | None = None):
    """(exit code, starts, the supervisor's lines, stdout).  The child runs ``code``; n counts its starts."""
    starts = tmp_path / "starts"
    env = os.environ | (env or {})
    done = subprocess.run(command(code, starts, *options), capture_output=True, text=True, env=env, timeout=120)
    return done.returncode, len(starts.read_text().split()), done.stderr.splitlines(), done.stdout


def test_a_child_that_crashes_twice_is_started_three_times(tmp_path):
    code, starts, log, _ = launch("sys.exit(0 if n == 3 else 70)", tmp_path)
    assert (code, starts, len(log)) == (0, 3, 3)
    assert log[0].startswith("launch: start: ") and log[0].endswith(str(tmp_path / "starts"))
    assert log[1].startswith("launch: restart 1 of 3 in 0.01 s: exit code 70 after ")
    assert log[2].startswith("launch: restart 2 of 3 in 0.02 s: exit code 70 after ")


@pytest.mark.parametrize("code", [1, 2, 130])
def test_what_would_happen_again_is_not_retried(code, tmp_path):
    found, starts, log, _ = launch(f"sys.exit({code})", tmp_path)
    assert (found, starts) == (code, 1)
    assert f"not retried: exit code {code}" in log[-1]


def test_death_by_a_signal_is_retried_then_given_up(tmp_path):
    code, starts, log, _ = launch("os.kill(os.getpid(), signal.SIGKILL)", tmp_path, "--retries", "1")
    assert (code, starts) == (128 + signal.SIGKILL, 2)
    assert "restart 1 of 1 in 0.01 s: killed by SIGKILL" in log[1]
    assert "given up after 1 restarts: killed by SIGKILL" in log[2]


def test_no_retries_means_one_start(tmp_path):
    code, starts, *_ = launch("sys.exit(70)", tmp_path, "--retries", "0")
    assert (code, starts) == (70, 1)


def test_the_waits_double_up_to_a_minute(monkeypatch):
    sys.path.insert(0, str(LOCAL.parent))
    try:
        import local
    finally:
        sys.path.remove(str(LOCAL.parent))
    waits = []
    supervisor = local.Supervisor(["x"], {}, retries=8, backoff=1.0)
    monkeypatch.setattr(supervisor, "once", lambda: -9)
    monkeypatch.setattr(supervisor, "rest", lambda seconds: waits.append(seconds) or True)
    monkeypatch.setattr(local.signal, "signal", lambda *_: None)
    assert supervisor.run() == 137
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("answer", ["exits 5", "dies"])
def test_a_signal_is_handed_on_once_and_ends_the_run(signum, answer, tmp_path):
    got = tmp_path / "got"
    code = f"""
def answer(s, frame):
    with open({str(got)!r}, "a") as file:
        file.write(f"{{s}} ")
    if {answer!r} == "exits 5":
        os._exit(5)
    signal.signal(s, signal.SIG_DFL)
    os.kill(os.getpid(), s)
signal.signal(signal.SIGINT, answer)
signal.signal(signal.SIGTERM, answer)
with open({str(tmp_path / "writing")!r}, "w") as file:
    file.write(str(os.getpgrp()))
os.rename({str(tmp_path / "writing")!r}, {str(tmp_path / "ready")!r})
time.sleep(60)
"""
    argv = command(code, tmp_path / "starts")
    process = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True, process_group=0)
    wait_for(tmp_path / "ready")
    # A terminal's Ctrl-C goes to the whole group: to the child as well, if that were in it.
    assert int((tmp_path / "ready").read_text()) != process.pid
    os.killpg(process.pid, signum)
    _, log = process.communicate(timeout=60)
    assert process.returncode == (5 if answer == "exits 5" else 128 + signum)
    assert got.read_text().split() == [str(int(signum))]
    assert (tmp_path / "starts").read_text().split() == ["start"]
    assert f"stopped by {signal.Signals(signum).name}" in log


def test_a_signal_between_restarts_ends_the_wait(tmp_path):
    argv = command("sys.exit(70)", tmp_path / "starts", "--backoff", "50")
    process = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True)
    assert "start:" in process.stderr.readline()
    assert "restart 1 of 3 in 50 s" in process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGTERM
    assert (tmp_path / "starts").read_text().split() == ["start"]


def test_devices_become_flags_of_the_child(tmp_path):
    show = "print(os.environ['XLA_FLAGS'], os.environ.get('JAX_PLATFORMS'))"
    before = {"XLA_FLAGS": "--a=1 --xla_force_host_platform_device_count=2 --b=2", "JAX_PLATFORMS": "cuda"}
    assert launch(show, tmp_path, env=before)[3] == f"{before['XLA_FLAGS']} cuda\n"
    found = launch(show, tmp_path, "--devices", "4", env=before)[3]
    assert found == "--a=1 --b=2 --xla_force_host_platform_device_count=4 cpu\n"


@pytest.mark.parametrize("options", [["--devices", "0"], ["--retries", "-1"], ["--backoff", "-1"]])
def test_wrong_options_are_refused(options, tmp_path):
    done = subprocess.run([sys.executable, str(LOCAL), *options, "--", "x"], capture_output=True, text=True)
    assert done.returncode == 2
    assert options[0] in done.stderr


# jaxtrain, but the first time that update 3 is logged and checkpoint 2 is written, the process is killed.
KILLED_ONCE = """
import os, signal, sys, time
from pathlib import Path
from jaxtrain import main
from jaxtrain.train.metrics import MetricLog
mark, saved = Path("killed"), Path("run/stages/pretrain/checkpoints/2/meta")
write = MetricLog.write
def killing(self, step, values, **more):
    write(self, step, values, **more)
    if step == 3 and not mark.exists():
        end = time.monotonic() + 60
        while not saved.exists() and time.monotonic() < end:
            time.sleep(0.05)
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
MetricLog.write = killing
sys.exit(main.main())
"""


@pytest.mark.slow
def test_a_real_run_killed_once_ends_as_if_it_had_not_been(tmp_path):
    for number, text in enumerate(itertools.islice(StdlibText(domain="prose").documents("train"), 120)):
        (tmp_path / f"{number}.txt").write_text(text, encoding="utf-8")
    bindings = ["TextFiles.pattern='*.txt'", "vocab_size=400", "TextDataset.seq_len=64"]
    bindings += ["DecoderConfig.num_layers=1", "DecoderConfig.scan_unroll=1", "DecoderConfig.d_model=16"]
    bindings += ["DecoderConfig.d_ff=32", "Stage.steps=5", "Stage.checkpoint_every=2", "Stage.batch_size=8"]
    arguments = ["run", "recipes/own_text.gin", *(part for b in bindings for part in ("--gin", b))]
    program = shlex.join([sys.executable, "-c", KILLED_ONCE])
    losses = {}
    for out in ("run", "whole"):
        options = ["--devices", "2", "--backoff", "0.1", "--program", program]
        done = subprocess.run(
            [sys.executable, str(LOCAL), *options, "--", *arguments, "--out", out],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        assert ("restart 1 of 3 in 0.1 s: killed by SIGKILL" in done.stderr) == (out == "run")
        assert ("pretrain: continuing after step 2" in done.stderr) == (out == "run"), done.stderr
        stage = tmp_path / out / "stages" / "pretrain"
        rows = (stage / "metrics.jsonl").read_text().splitlines()
        losses[out] = [(row["step"], row["loss"]) for row in map(json.loads, rows)]
        environment = json.loads((stage / "result.json").read_text())["environment"]
        assert environment["devices"].startswith("2 ")
    assert [step for step, _ in losses["run"]] == [1, 2, 3, 4, 5]
    assert losses["run"] == losses["whole"]


def wait_for(path: Path, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"no {path} after {seconds} s"
        time.sleep(0.02)
