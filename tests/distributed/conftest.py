"""Real processes, started as a launcher starts them, each with a few virtual CPU devices."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("worker.py")
# These tests compile much and run it a few times.
COMPILE_FAST = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
LONGEST = 240.0  # seconds that a test waits before it fails


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Group:
    """The processes of one job.  ``logs``: what each has printed so far."""

    def __init__(self, folder: Path, command: Sequence[object], processes: int, devices: int, env: dict[str, str]):
        folder.mkdir(parents=True)
        port = free_port()
        self.files = [folder / f"{number}.log" for number in range(processes)]
        self.processes = []
        for number, file in enumerate(self.files):
            own = env | {
                "XLA_FLAGS": f"{COMPILE_FAST} --xla_force_host_platform_device_count={devices}",
                "JAXTRAIN_COORDINATOR": f"127.0.0.1:{port}",
                "JAXTRAIN_NUM_PROCESSES": str(processes),
                "JAXTRAIN_PROCESS_ID": str(number),
            }
            with file.open("w") as log:
                words = [sys.executable, *map(str, command)]
                self.processes.append(
                    subprocess.Popen(words, env=os.environ | own, stdout=log, stderr=subprocess.STDOUT)
                )

    @property
    def logs(self) -> list[str]:
        return [file.read_text() for file in self.files]

    def wait(self, seconds: float = LONGEST) -> list[int]:
        """Exit codes; fails where a process has not ended after so long."""
        until = time.monotonic() + seconds
        try:
            return [process.wait(max(until - time.monotonic(), 0.1)) for process in self.processes]
        except subprocess.TimeoutExpired:
            pytest.fail(f"not over after {seconds} s: {self.logs}")

    def wait_for(self, text: str, number: int = 0) -> None:
        """Until process ``number`` has printed ``text``."""
        until = time.monotonic() + LONGEST
        while text not in self.logs[number]:
            assert self.processes[number].poll() is None, f"ended before {text!r}: {self.logs}"
            assert time.monotonic() < until, f"no {text!r} after {LONGEST} s: {self.logs}"
            time.sleep(0.05)

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


@pytest.fixture(scope="session")
def environment(tmp_path_factory) -> dict[str, str]:
    """What all processes of these tests share, their compiled programs too."""
    return {
        "PYTHONPATH": os.pathsep.join(p for p in [str(ROOT), *sys.path] if p),
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("xla")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.05",
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
        "XLA_FLAGS": COMPILE_FAST,
    }


@pytest.fixture
def start(tmp_path, environment):
    """``start(command, processes=2, devices=1, **env)``: a Group, which does not outlive the test."""
    groups = []

    def begin(command: Sequence[object], *, processes: int = 2, devices: int = 1, **env: object) -> Group:
        folder = tmp_path / f"job{len(groups)}"
        own = environment | {name: str(value) for name, value in env.items()}
        groups.append(Group(folder, command, processes, devices, own))
        return groups[-1]

    yield begin
    for group in groups:
        group.kill()


@pytest.fixture
def worker(start):
    """``worker(what, *arguments)``: a job of processes that run the function ``what`` of worker.py."""
    return lambda what, *arguments, **options: start([WORKER, what, *arguments], **options)
