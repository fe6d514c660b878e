"""The supervisor of a worker: begun from a shell that ends, asked from others, stopped, and found dead."""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from supervise import DONE, FAULT, PREEMPTED, worst

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "supervise.py"
WAITING = (
    "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(42)); print('waits', flush=True); time.sleep(60)"
)


def supervise(verb: str, folder: Path, *options: str, code: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [] if code is None else ["--", sys.executable, "-S", "-c", code]
    argv = [sys.executable, "-S", str(SCRIPT), verb, "--folder", str(folder), *options, *command]
    return subprocess.run(argv, capture_output=True, text=True, timeout=60)


def status(folder: Path, *options: str) -> dict:
    return json.loads(supervise("status", folder, *options).stdout)


def wait_for(folder: Path, **wanted) -> dict:
    end = time.monotonic() + 30
    while not wanted.items() <= (found := status(folder)).items():
        assert time.monotonic() < end, (wanted, found)
        time.sleep(0.05)
    return found


@pytest.fixture
def folder(tmp_path):
    yield tmp_path / "a job"
    supervise("stop", tmp_path / "a job", "--grace", "1")


def test_it_outlives_the_shell_that_began_it(folder):
    """The shell's session gets SIGHUP, as when an ssh connection breaks."""
    argv = [sys.executable, str(SCRIPT), "start", "--folder", str(folder), "--", sys.executable, "-c", WAITING]
    shell = subprocess.Popen(["sh", "-c", 'trap "" HUP; "$@"; sleep 60', "sh", *argv], start_new_session=True)
    wait_for(folder, state="running", last_line="waits")
    os.killpg(shell.pid, signal.SIGHUP)
    os.killpg(shell.pid, signal.SIGKILL)
    shell.wait()
    time.sleep(0.3)
    found = wait_for(folder, state="running", generation=1, attempt=0)
    assert found["code"] is None and 0 <= found["beat_age"] < 30 and found["heartbeat_age"] is None


def test_a_generation_begins_once(folder):
    code = "import sys; print('hello', flush=True); sys.exit(42)"
    for _ in range(2):
        assert (
            supervise("start", folder, "--generation", "3", "--failures", "2", "--job", "j", code=code).returncode == 0
        )
        found = wait_for(folder, state="ended", code=42)
    assert (found["generation"], found["failures"], found["job"]) == (3, 2, "j")
    assert found["ended_for"] >= 0 and found["last_line"].startswith("launch: preempted: exit code 42 after")
    assert supervise("log", folder).stdout.count("hello") == 1
    assert supervise("start", folder, "--generation", "4", code="print('again')").returncode == 0
    assert wait_for(folder, state="ended", generation=4)["code"] == 0
    assert supervise("log", folder).stdout == "[4, 0]\nagain\n"
    assert supervise("log", folder, "--generation", "4", "--offset", "3").stdout == "[4, 3]\nin\n"
    assert supervise("log", folder, "--generation", "3", "--offset", "3").stdout == "[4, 0]\nagain\n"


def test_what_has_not_begun(folder, tmp_path):
    found = status(folder, "--worker", "w 0", "--ready", str(tmp_path), "--ready", str(tmp_path / "none"))
    assert (found["state"], found["generation"], found["worker"]) == ("none", 0, "w 0")
    assert found["ready"] == [str(tmp_path)]
    assert supervise("log", folder).stdout == "[0, 0]\n"
    assert supervise("stop", folder).returncode == 0


def test_stop_is_sigterm_and_then_sigkill(folder):
    supervise("start", folder, code=WAITING)
    wait_for(folder, last_line="waits")
    assert supervise("start", folder, "--generation", "2", code=WAITING).returncode == 1, "the first still runs"
    assert supervise("stop", folder).returncode == 0
    assert status(folder)["code"] == 42
    deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"
    supervise("start", folder, "--generation", "2", code=deaf)
    wait_for(folder, last_line="deaf")
    assert supervise("stop", folder, "--grace", "0.5").returncode == 0
    assert status(folder)["state"] == "lost"


def test_a_supervisor_that_was_killed_is_lost(folder):
    supervise("start", folder, code=WAITING)
    wait_for(folder, last_line="waits")
    os.kill(int((folder / "lock").read_text()), signal.SIGKILL)
    found = wait_for(folder, state="lost")
    assert found["ended_for"] >= 0 and found["code"] is None


def test_environment_and_folder_of_the_command(folder, tmp_path):
    show = "import json, os, sys; print(json.dumps([os.environ['A'], os.getcwd(), sys.argv[1:]]))"
    awkward = 'it\'s $HOME="x"\n'
    argv = [sys.executable, str(SCRIPT), "start", "--folder", str(folder), "--env", f"A={awkward}"]
    argv += ["--cwd", str(tmp_path), "--", sys.executable, "-c", show, "--", awkward, "--env"]
    subprocess.run(argv, check=True)
    wait_for(folder, state="ended")
    assert json.loads(supervise("log", folder).stdout.split("\n", 1)[1]) == [
        awkward,
        str(tmp_path),
        ["--", awkward, "--env"],
    ]


def test_a_command_that_cannot_be_started_is_a_fault(folder):
    argv = [sys.executable, str(SCRIPT), "start", "--folder", str(folder), "--", "/no/such/program"]
    subprocess.run(argv, check=True)
    found = wait_for(folder, state="ended")
    assert found["code"] == FAULT and "/no/such/program" in found["last_line"]
    assert supervise("run", folder).returncode == FAULT  # no command at all


def test_failures_are_retried_on_the_worker_42_is_not(folder, tmp_path):
    mark = tmp_path / "mark"
    code = f"import os, sys; n = os.path.exists({str(mark)!r}); open({str(mark)!r}, 'w'); sys.exit(42 if n else 70)"
    supervise("start", folder, "--retries", "1", "--backoff", "0.01", code=code)
    assert wait_for(folder, state="ended")["code"] == 42
    assert "restart 1 of 1 in 0.01 s: exit code 70" in supervise("log", folder).stdout


def test_the_worst_code_stands_for_all():
    assert worst([0, 42, 70, 43]) == FAULT and worst([42, -9, 0]) == -9
    assert worst([0, 42]) == PREEMPTED and worst([0, 0]) == DONE


def test_an_old_python_can_read_it():
    """Images of TPU VMs bring Python 3.8 or 3.10.  Syntax only: names newer than that would be found there first."""
    ast.parse(SCRIPT.read_text(), feature_version=(3, 8))
