"""The supervisor, with children that crash, fail, hang, are killed, or are asked to stop; and one real run."""

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
import supervise

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


def test_a_fault_of_configuration_or_data_is_not_retried(tmp_path):
    found, starts, log, _ = launch("sys.exit(43)", tmp_path)
    assert (found, starts) == (43, 1)
    assert "not retried: exit code 43" in log[-1]


@pytest.mark.parametrize("code", [1, 2, 130])
def test_any_other_code_is_a_failure(code, tmp_path):
    found, starts, log, _ = launch(f"sys.exit({code})", tmp_path, "--retries", "1")
    assert (found, starts) == (code, 2)
    assert f"given up after 1 restarts: exit code {code}" in log[-1]


def test_a_preempted_run_is_started_again_for_free(tmp_path):
    code, starts, log, _ = launch("sys.exit({1: 42, 2: 42, 3: 70, 4: 42}.get(n, 0))", tmp_path, "--retries", "1")
    assert (code, starts) == (0, 5)
    reasons = [line.split(": exit")[0] for line in log[1:]]
    free = "launch: restart in 0.01 s, preempted"
    assert reasons == [free, free, "launch: restart 1 of 1 in 0.01 s", free]


def test_death_by_a_signal_is_retried_then_given_up(tmp_path):
    code, starts, log, _ = launch("os.kill(os.getpid(), signal.SIGKILL)", tmp_path, "--retries", "1")
    assert (code, starts) == (128 + signal.SIGKILL, 2)
    assert "restart 1 of 1 in 0.01 s: killed by SIGKILL" in log[1]
    assert "given up after 1 restarts: killed by SIGKILL" in log[2]


def test_no_retries_means_one_start(tmp_path):
    code, starts, *_ = launch("sys.exit(70)", tmp_path, "--retries", "0")
    assert (code, starts) == (70, 1)


def test_the_waits_double_up_to_a_minute(monkeypatch):
    waits = []
    supervisor = supervise.Supervisor(lambda attempt: [], supervise.Policy(retries=8, backoff=1.0))
    monkeypatch.setattr(supervisor, "once", lambda attempt: -9)
    monkeypatch.setattr(supervisor, "rest", lambda seconds: waits.append(seconds) or True)
    monkeypatch.setattr(supervise.signal, "signal", lambda *_: None)
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


@pytest.mark.parametrize(
    "options", [["--devices", "0"], ["--retries", "-1"], ["--backoff", "-1"], ["--processes", "0"]]
)
def test_wrong_options_are_refused(options, tmp_path):
    done = subprocess.run([sys.executable, str(LOCAL), *options, "--", "x"], capture_output=True, text=True)
    assert done.returncode == 43
    assert options[0] in done.stderr


# Each process: number i of count, in its attempt n (its own file of starts).
SEVERAL = """
i, count = int(os.environ["JAXTRAIN_PROCESS_ID"]), int(os.environ["JAXTRAIN_NUM_PROCESSES"])
out = sys.argv[1]
with open(f"{out}.{i}", "a+") as file:
    file.write(os.environ["JAXTRAIN_COORDINATOR"] + "\\n")
    file.seek(0)
    n = len(file.readlines())
while not all(os.path.exists(f"{out}.{j}") for j in range(count)):
    time.sleep(0.01)
def beat():
    open(os.environ["JAXTRAIN_HEARTBEAT"], "w").close()
"""


def coordinators(tmp_path: Path, number: int) -> list[str]:
    return (tmp_path / f"starts.{number}").read_text().split()


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("sys.exit(70) if i == 1 else time.sleep(60)", "process 1 of 3: exit code 70"),
        ("os.kill(os.getpid(), 9) if i == 2 else time.sleep(60)", "process 2 of 3: killed by SIGKILL"),
        ("[beat() or time.sleep(0.1) for _ in range(600 if i else 1)]; time.sleep(60)", "process 0 of 3: no heartbeat"),
        (
            "signal.signal(15, signal.SIG_IGN); sys.exit(70) if i == 1 else time.sleep(60)",
            "process 1 of 3: exit code 70",
        ),
        ("time.sleep(0 if i == 1 else 60)", "2 of 3 processes run 1 s longer: killed"),
        ("sys.exit(42) if i == 1 else time.sleep(60)", "2 of 3 processes run 1 s longer: killed"),
    ],
)
def test_when_one_dies_or_hangs_all_end_and_start_again(code, reason, tmp_path):
    """Within the bounds, whatever the others do about SIGTERM; the second attempt ends well."""
    bounds = ["--processes", "3", "--hang_after", "3", "--grace", "0.5", "--linger", "1"]
    began = time.monotonic()
    found, _, log, _ = launch(f"{SEVERAL}\nif n == 1: {code}", tmp_path, *bounds)
    assert found == 0 and time.monotonic() - began < 30
    assert any(reason in line for line in log), log
    addresses = [coordinators(tmp_path, number) for number in range(3)]
    assert addresses[0] == addresses[1] == addresses[2]
    assert len(set(addresses[0])) == 2, "the second attempt needs a port of its own"


def test_the_others_are_asked_before_they_are_killed(tmp_path):
    code = f"""{SEVERAL}
def last(*_):
    open(f"{{out}}.last.{{i}}", "w").close()
    sys.exit(42)
if i == 0:
    signal.signal(signal.SIGTERM, last)
    open(f"{{out}}.ready", "w").close()
    time.sleep(60)
while not os.path.exists(f"{{out}}.ready"):
    time.sleep(0.01)
sys.exit(70)
"""
    found, *_ = launch(code, tmp_path, "--processes", "2", "--retries", "0")
    assert found == 70 and (tmp_path / "starts.last.0").exists()


def test_a_fault_in_one_process_is_the_fault_of_all(tmp_path):
    code = "time.sleep(1.5 if i else 0); sys.exit(43 if i == 0 else 134)"
    found, _, log, _ = launch(f"{SEVERAL}\n{code}", tmp_path, "--processes", "2")
    assert found == 43 and "not retried" in log[-1]
    assert len(coordinators(tmp_path, 0)) == 1


def test_a_slow_start_without_heartbeats_is_no_hang(tmp_path):
    found, *_ = launch(f"{SEVERAL}\ntime.sleep(1)", tmp_path, "--processes", "2", "--hang_after", "0.2")
    assert found == 0 and len(coordinators(tmp_path, 0)) == 1


def test_sigterm_reaches_all_and_their_42_is_passed_on(tmp_path):
    code = f"""{SEVERAL}
def save(*_):
    open(f"{{out}}.saved.{{i}}", "w").close()
    sys.exit(42)
signal.signal(signal.SIGTERM, save)
open(f"{{out}}.ready.{{i}}", "w").close()
time.sleep(60)
"""
    argv = command(code, tmp_path / "starts", "--processes", "2")
    process = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True)
    for number in range(2):
        wait_for(tmp_path / f"starts.ready.{number}")
    process.send_signal(signal.SIGTERM)
    _, log = process.communicate(timeout=60)
    assert process.returncode == 42 and "stopped by SIGTERM: exit code 42" in log
    assert [(tmp_path / f"starts.saved.{number}").exists() for number in range(2)] == [True, True]


def test_no_process_outlives_a_killed_supervisor(tmp_path):
    code = "open(sys.argv[1] + '.pid', 'w').write(str(os.getpid())); time.sleep(60)"
    process = subprocess.Popen(command(code, tmp_path / "starts"), stderr=subprocess.DEVNULL)
    wait_for(tmp_path / "starts.pid")
    end = time.monotonic() + 20
    while not (pid := (tmp_path / "starts.pid").read_text()):
        assert time.monotonic() < end
    process.kill()
    process.wait(20)
    while Path(f"/proc/{pid}").exists() and "(zombie)" not in Path(f"/proc/{pid}/status").read_text():
        assert time.monotonic() < end, "the child lives on"
        time.sleep(0.05)


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
