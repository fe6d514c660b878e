"""Follows one job on its slices: looks, asks ``plan`` what to do, and does it."""

from __future__ import annotations

import json
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from gcloud import GONE, Refused, Remote, Slices, answers, as_worker, call, failure, workers_of
from state import Action, Observed, Spec, plan
from supervise import say

TAIL = 4096  # bytes of an older log that are shown when watching begins


class Watch:
    """One job on its slices: looks, asks ``plan`` what to do, does it, until the end."""

    def __init__(
        self,
        slices: Slices,
        remote: Remote,
        archive: Path | None,
        start: Sequence[str],
        logs: Path | None,
        before: str | None = None,
    ):
        """archive: what set-up ships; start: options of ``supervise.py start`` and the command; logs: a folder.

        before: what the workers' shells run before every start.
        """
        self.slices, self.remote, self.archive, self.start, self.logs = slices, remote, archive, list(start), logs
        self.before = [f"sh -c {shlex.quote(before)}"] if before else []
        self.failures, self.failed_at = 0, float("-inf")
        self.generation = 0
        self.answered_at: float | None = None
        self.offsets: dict[tuple[int, int], tuple[int, int]] = {}
        self.sizes: list[int] = []  # workers of each slice
        self.told = ""

    def observe(self) -> Observed:
        kept = {"failures": self.failures, "since_failure": time.monotonic() - self.failed_at}
        kept["generation"] = self.generation
        try:
            found = self.slices.describe()
            if found is None:
                self.answered_at = None
                return Observed("ABSENT", **kept)
            state, ours = found["state"]["state"], self.slices.is_ours(found)
            if state != "ACTIVE" or not ours:
                self.answered_at = None
                return Observed(state, ours=ours, **kept)
            nodes = self.slices.nodes()
        except OSError as error:
            say(str(error))
            return Observed("UNKNOWN", **kept)
        now = time.monotonic()
        self.answered_at = now if self.answered_at is None else self.answered_at
        taken = any(node.get("state") in GONE for node in nodes)
        whole = len(nodes) == self.slices.count and all(node.get("state") == "READY" for node in nodes)
        self.sizes = [workers_of(node) for node in nodes] if whole else []
        told = {} if not whole else answers(call(self.slices.ssh_command(self.remote.probe())).stdout)
        workers = tuple(as_worker(answer) for _, answer in sorted(told.items()))
        if whole and len(workers) >= sum(self.sizes):
            self.answered_at = time.monotonic()
        self.generation = max([self.generation, *(worker.generation for worker in workers)])
        return Observed(
            "ACTIVE",
            taken=taken,
            expected=sum(self.sizes),
            workers=workers,
            silent_for=time.monotonic() - self.answered_at,
            **(kept | {"generation": self.generation}),
        )

    def until_the_end(self, spec: Spec) -> int:
        """Returns the exit code: of ``finish`` or ``give_up``."""
        fresh = True
        while True:
            seen = self.observe()
            if fresh and seen.expected and len(seen.workers) == seen.expected:
                fresh = False
                if not any(worker.state == "running" for worker in seen.workers):
                    spec = replace(spec, after=self.generation)
            if seen.workers and self.generation:
                self.collect(all_of_them=any(worker.state in ("ended", "lost") for worker in seen.workers))
            for action in plan(spec, seen):
                self.tell(action)
                if action.kind in ("finish", "give_up"):
                    return action.code
                if action.kind == "wait":
                    time.sleep(action.seconds)
                elif self.perform_whole(action):
                    self.failures = max(self.failures + action.charged, action.failures)
                    if action.charged:
                        self.failed_at = time.monotonic()
                else:
                    self.failures, self.failed_at = self.failures + 1, time.monotonic()

    def tell(self, action: Action) -> None:
        line = f"{action.kind}: {action.why}"
        if line != self.told:
            say(line)
        self.told = line

    def perform_whole(self, action: Action) -> bool:
        """``perform``, with a Ctrl-C put off until it is done, so that no worker is left out; a second one is not."""
        asked: list[int] = []

        def put_off(signum: int, frame: object) -> None:
            if asked:
                raise KeyboardInterrupt
            asked.append(signum)
            say(f"ends after this step ({action.kind}); once more to end at once")

        before = signal.signal(signal.SIGINT, put_off)
        try:
            worked = self.perform(action)
        finally:
            signal.signal(signal.SIGINT, before)
        if asked:
            raise KeyboardInterrupt
        return worked

    def perform(self, action: Action) -> bool:
        """Whether it worked.  Raises Refused where it never will."""
        self.generation = max(self.generation, action.generation)  # some may have begun, whatever the answer
        for argv, timeout in self.commands(action):
            done = call(argv, timeout)
            if done.returncode and not (action.kind == "create" and "ALREADY_EXISTS" in done.stderr):
                error = failure(action.kind, done)
                if isinstance(error, Refused) and action.kind in ("create", "delete"):
                    raise error
                say(str(error))
                return False
        return True

    def commands(self, action: Action) -> list[tuple[list[str], float]]:
        """The argument lists that do it, each with its bound in seconds."""
        slices, remote = self.slices, self.remote
        if action.kind == "create":
            return [(slices.create_command(), 300.0)]
        if action.kind == "delete":
            return [(slices.delete_command(), 300.0)]
        if action.kind == "set_up":
            setup = slices.ssh_command(remote.set_up(self.archive))
            return [(slices.scp_command(self.archive), 1800.0), (setup, 3600.0)]
        if action.kind == "start":
            which = ["--generation", str(action.generation), "--failures", str(action.failures)]
            steps = " && ".join([*self.before, remote.supervise("start", *which, *self.start)])
            return [(slices.ssh_command(steps), 600.0)]
        assert action.kind == "stop", action
        return [(slices.ssh_command(remote.supervise("stop", "--grace", "300")), 900.0)]

    def collect(self, *, all_of_them: bool) -> None:
        """Brings the files of the logs up to date; what is new in the first worker's is also shown."""
        if self.logs is None:
            return
        self.logs.mkdir(parents=True, exist_ok=True)
        for node, size in enumerate(self.sizes):
            for worker in range(size):
                if (all_of_them or (node, worker) == (0, 0)) and (found := self.new_log(node, worker)):
                    generation, offset, text = found
                    path = self.logs / f"slice{node}-worker{worker}.{generation}.log"
                    with path.open("ab" if offset else "wb") as file:
                        file.write(text)
                    if (node, worker) == (0, 0):
                        show(text if offset else text[-TAIL:])

    def new_log(self, node: int, worker: int) -> tuple[int, int, bytes] | None:
        """(generation, place of the first byte, bytes) that were not there before; None without an answer."""
        generation, offset = self.offsets.get((node, worker), (0, 0))
        options = ["--generation", str(generation), "--offset", str(offset)]
        done = call(self.slices.ssh_command(self.remote.supervise("log", *options), str(node), str(worker)))
        head, _, text = done.stdout.partition("\n")
        if done.returncode or not head.startswith("["):
            return None
        generation, offset = json.loads(head)
        raw = text.encode(errors="surrogateescape")
        self.offsets[node, worker] = (generation, offset + len(raw))
        return generation, offset, raw


def show(text: bytes) -> None:
    sys.stdout.write(text.decode(errors="replace"))
    sys.stdout.flush()
