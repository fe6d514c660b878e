"""How processes agree, share rows and files, and end together, each for a reason of its own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time

import pytest

from jaxtrain import distributed


def told(log: str) -> dict:
    """The last JSON line of a log."""
    return json.loads([line for line in log.splitlines() if line.startswith("{")][-1])


def metrics(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second")} for row in rows]


def test_processes_agree_and_hold_their_rows(worker, tmp_path):
    job = worker("agree", tmp_path / "out", devices=2)
    assert job.wait() == [0, 0], job.logs
    first, second = map(told, job.logs)
    assert [first["number"], second["number"]] == [0, 1] and first["count"] == second["count"] == 2
    assert first["seen"] == second["seen"] == [0, True, True]  # JSON, NaN and float64 included
    assert (first["read"], second["read"]) == (len("ready"), "ready")
    assert first["gathered"] and second["gathered"]
    # By process; by turns, since every second device is a process's; and whole, where rows are not split.
    low, high = list(range(8)), list(range(8, 16))
    even, odd = [0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]
    assert first["held"] == [low, even, list(range(16))]
    assert second["held"] == [high, odd, list(range(16))]
    assert first["same"] == second["same"] == [True, True, True]


@pytest.mark.slow
def test_losses_and_checkpoints_do_not_depend_on_the_processes(worker, tmp_path):
    """2 x 4 without a break; then 2 x 4 to step 2, 1 x 8 to step 4, 4 x 2 to step 6, each from the last one's files."""
    whole = worker("train", tmp_path / "whole", 0, 6, processes=2, devices=4)
    assert whole.wait() == [0, 0], whole.logs
    out = tmp_path / "parts"
    shutil.copytree(tmp_path / "whole" / "checkpoints" / "2", out / "checkpoints" / "2")
    shutil.copy(tmp_path / "whole" / "metrics.jsonl", out / "metrics.jsonl")
    for start, processes in ((2, 1), (4, 4)):
        job = worker("train", out, start, start + 2, processes=processes, devices=8 // processes)
        assert job.wait() == [0] * processes, job.logs
    assert metrics(out) == metrics(tmp_path / "whole")
    assert [row["step"] for row in metrics(out)] == [1, 2, 3, 4, 5, 6]
    ended = [told(log) for log in job.logs]
    assert ended[0]["digests"] == told(whole.logs[0])["digests"]
    # Each has read its own rows of steps 4 and 5 and no others: together all 32, in the order of one host.
    assert [one["rows"] for one in ended] == [[4 * i, 4 * i + 1, 4 * i + 2, 4 * i + 3] for i in range(4)]
    assert all(len(one["read"]) == 8 for one in ended)
    halves = [told(log)["read"] for log in whole.logs]  # six steps of eight rows a process
    for step in (4, 5):
        quarters = [index for one in ended for index in one["read"][4 * (step - 4) :][:4]]
        assert quarters == [index for half in halves for index in half[8 * step :][:8]]


@pytest.mark.parametrize(
    ("scenario", "code", "message"),
    [
        (("differ",), 43, "process 1 has another configuration than process 0"),
        (("unshared",), 43, "does not see in OUT/1 what process 0 has written there"),
        (("raises", "the sixth sheikh's sick"), 43, "error: the sixth sheikh's sick"),
        (("raises", "UNKNOWN: Gloo failed"), 70, "ValueError: UNKNOWN: Gloo failed"),  # XLA's, and no user's mistake
    ],
    ids=["configuration", "folder", "mistake", "crash"],
)
def test_an_error_in_one_process_ends_all_with_its_message(worker, tmp_path, scenario, code, message):
    job = worker(scenario[0], tmp_path / "out", *scenario[1:])
    assert job.wait(60) == [code, code], job.logs
    for log in job.logs:
        assert message.replace("OUT", str(tmp_path / "out")) in log, job.logs
    assert "jaxtrain: process 1: " in job.logs[1]
    assert "jaxtrain: process 1 has ended the run: " in job.logs[0]
    assert ("Traceback" in job.logs[1]) == (code == 70)


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_ends_the_other(killed, worker, tmp_path):
    job = worker("steps", tmp_path, 0, JAXTRAIN_PEER_TIMEOUT=5)
    job.wait_for('"step": 5', 1)
    job.processes[killed].kill()
    codes = job.wait(40)
    assert codes[killed] == -signal.SIGKILL and codes[1 - killed] not in (0, 42, 43), job.logs


def test_a_hung_process_ends_all_and_shows_where_it_stood(worker, tmp_path):
    job = worker("steps", tmp_path, 1, JAXTRAIN_PEER_TIMEOUT=5, JAXTRAIN_STEP_TIMEOUT=3)
    job.wait_for('"step": 5', 1)
    codes = job.wait(40)
    assert all(code not in (0, 42, 43) for code in codes), job.logs
    assert "Timeout (0:00:03)!" in job.logs[1] and "in steps" in job.logs[1]


def test_sigterm_to_one_process_reaches_all_after_the_same_step(worker, tmp_path):
    job = worker("steps", tmp_path, 0)
    job.wait_for('"step": 5', 1)
    job.processes[1].terminate()
    assert job.wait(60) == [42, 42], job.logs
    first, second = map(told, job.logs)
    assert first["preempted"] == second["preempted"] > 5


MISTAKES = {
    "need all of JAXTRAIN": {"JAXTRAIN_NUM_PROCESSES": "2"},
    "JAXTRAIN_PROCESS_ID=2 is not from 0": {
        "JAXTRAIN_COORDINATOR": "localhost:1",
        "JAXTRAIN_NUM_PROCESSES": "2",
        "JAXTRAIN_PROCESS_ID": "2",
    },
    "must be HOST:PORT": {
        "JAXTRAIN_COORDINATOR": "localhost",
        "JAXTRAIN_NUM_PROCESSES": "2",
        "JAXTRAIN_PROCESS_ID": "1",
    },
    "finds processes by itself": {"JAXTRAIN_DISTRIBUTED": "1", "JAXTRAIN_PROCESS_ID": "1"},
    "JAXTRAIN_STEP_TIMEOUT is 'soon'": {"JAXTRAIN_STEP_TIMEOUT": "soon"},
}


@pytest.mark.parametrize("message", MISTAKES)
def test_a_contradictory_environment_is_refused(message, monkeypatch):
    for name in [name for name in os.environ if name.startswith("JAXTRAIN_")]:
        monkeypatch.delenv(name)
    for name, value in MISTAKES[message].items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message), distributed.job():
        pytest.fail("the job began")


def test_rows_are_shared_out_once():
    assert distributed.share(7) == slice(0, 7)  # of one process
    assert distributed.from_writer(lambda: (1, 2)) == (1, 2)


def test_sigterm_to_a_single_process(monkeypatch):
    """In a loop it waits to be asked; elsewhere nothing has to be saved, and it ends at once."""
    before = signal.getsignal(signal.SIGTERM)
    with distributed.job():
        with distributed.loop():
            assert not distributed.preempted()
            signal.raise_signal(signal.SIGTERM)
            assert distributed.preempted()
        with pytest.raises(distributed.Preempted):
            signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_job_that_is_to_stop_after_some_steps():
    with distributed.job(stop_after=2), distributed.loop():
        assert [distributed.preempted() for _ in range(3)] == [False, True, False]
    with distributed.job(), distributed.loop():
        assert not any(distributed.preempted() for _ in range(3))


def test_the_heartbeat_is_a_file_that_steps_touch(tmp_path, monkeypatch):
    file = tmp_path / "beat"
    monkeypatch.setenv("JAXTRAIN_HEARTBEAT", str(file))
    with distributed.job():
        distributed.beat()
        os.utime(file, (1, 1))
        distributed.beat()
        assert file.stat().st_mtime > 1
        os.utime(file, (1, 1))
        monkeypatch.setattr(distributed, "WAIT", 0.01)
        distributed.from_writer(lambda: time.sleep(0.1))  # as preparing data does, for longer
        assert file.stat().st_mtime > 1
