"""Runs the processes of a job on one machine and starts them again after a failure.  One file, standard library only.

    python3 supervise.py start  --folder DIR --generation 1 --retries 5 -- COMMAND ...   # detached: survives the shell
    python3 supervise.py status --folder DIR                                             # one JSON object on one line
    python3 supervise.py log    --folder DIR --offset 0
    python3 supervise.py stop   --folder DIR

It is copied to machines whose own Python may be old (3.8), so it uses nothing newer.

The rule of exit codes, which everything in this folder shares: 0 done; 42 preempted, started again for free;
43 a fault of configuration or data, never started again; anything else a failure, started again after a wait that
doubles up to a bound, a limited number of times.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DONE, PREEMPTED, FAULT = 0, 42, 43
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
HEARTBEAT = "JAXTRAIN_HEARTBEAT"  # names the file that a process touches to say that it makes progress
BEAT = 5.0  # seconds between two writes of status.json
POLL = 0.05  # seconds between two looks at the processes


@dataclass(frozen=True)
class Policy:
    """When processes are ended and started again; times in seconds.

    backoff doubles with every failure up to longest_wait.  A process that has touched its heartbeat file once and
    then not for hang_after counts as hung.  After one process failed, the others get SIGTERM, and SIGKILL grace
    later; after one ended well (0 or 42), the others have linger to end by themselves.
    """

    retries: int = 3
    backoff: float = 1.0
    longest_wait: float = 60.0
    hang_after: float = 14400.0  # longer than jaxtrain's own bound on a step, and than data take to prepare
    grace: float = 30.0
    linger: float = 600.0
    restart_preempted: bool = True


@dataclass(frozen=True)
class Process:
    """One process of the job; heartbeat: the file named to it in ``JAXTRAIN_HEARTBEAT``."""

    command: Sequence[str]
    env: dict[str, str]
    heartbeat: Path


class Supervisor:
    """All processes of the job on this machine: started together, ended together.

    make: attempt (from 0) -> the processes of that attempt.  report is told of every change and every ``BEAT``
    seconds: state ("running", "waiting" or "ended"), attempt, and for an end the code.
    """

    def __init__(
        self,
        make: Callable[[int], Sequence[Process]],
        policy: Policy,
        *,
        cwd: str | None = None,
        report: Callable[..., None] = lambda **_: None,
    ):
        self.make, self.policy, self.cwd, self.report = make, policy, cwd, report
        self.children: list[subprocess.Popen] = []
        self.stopped_by: int | None = None

    def forward(self, signum: int, frame: object) -> None:
        """Signal handler: hands ``signum`` to every process, after whose end there is no restart."""
        self.stopped_by = signum
        for child in self.children:
            send(child, signum)

    def run(self) -> int:
        """Returns the exit code of the last attempt; 128 + n where signal n ended it."""
        for signum in FORWARDED:
            if signal.getsignal(signum) is not signal.SIG_IGN:  # nohup's choice stands
                signal.signal(signum, self.forward)
        policy, failures, attempt = self.policy, 0, 0
        while True:
            began = time.monotonic()
            code = self.once(attempt)
            end = f"{describe(code)} after {time.monotonic() - began:.1f} s"
            final = self.final(code, failures)
            if final:
                if code != DONE:
                    say(f"{final}: {end}")
                self.report(state="ended", attempt=attempt, code=exit_code(code))
                return exit_code(code)
            attempt += 1
            if code == PREEMPTED:
                wait = policy.backoff
                say(f"restart in {wait:g} s, preempted: {end}")
            else:
                wait = min(policy.backoff * 2**failures, policy.longest_wait)
                failures += 1
                say(f"restart {failures} of {policy.retries} in {wait:g} s: {end}")
            self.report(state="waiting", attempt=attempt)
            if not self.rest(wait):
                self.report(state="ended", attempt=attempt, code=128 + self.stopped_by)
                return 128 + self.stopped_by

    def final(self, code: int, failures: int) -> str:
        """Why there is no other attempt; empty where there is one."""
        if self.stopped_by is not None:
            return f"stopped by {signal.Signals(self.stopped_by).name}"
        if code == DONE:
            return "done"
        if code == FAULT:
            return "not retried"
        if code == PREEMPTED:
            return "" if self.policy.restart_preempted else "preempted"
        return "" if failures < self.policy.retries else f"given up after {failures} restarts"

    def once(self, attempt: int) -> int:
        """Starts all, waits for all; the code that stands for the attempt (negative: minus the signal)."""
        processes = self.make(attempt)
        for process in processes:
            if process.heartbeat.exists():
                process.heartbeat.unlink()
        for process in processes:
            self.children.append(spawn(process, self.cwd))
            if self.stopped_by is not None:  # the signal came before there was a child to hand it to
                send(self.children[-1], self.stopped_by)
        try:
            return self.watch(processes, attempt)
        finally:
            for child in self.children:  # whatever they started goes with them
                kill_group(child)
            for child in self.children:
                child.wait()
            self.children = []

    def watch(self, processes: Sequence[Process], attempt: int) -> int:
        beaten, ended = float("-inf"), None
        while True:
            now = time.monotonic()
            if now - beaten >= BEAT:
                beaten = now
                self.report(state="running", attempt=attempt)
            codes = [child.poll() for child in self.children]
            found = [code for code in codes if code is not None]
            if found:
                verdict = worst(found)
                if len(found) == len(codes):
                    return verdict
                if verdict not in (DONE, PREEMPTED):
                    which = codes.index(verdict)
                    say(f"process {which} of {len(codes)}: {describe(verdict)}; the others are ended")
                    self.end()
                    return verdict
                ended = now if ended is None else ended
                if now - ended > self.policy.linger:
                    say(f"{codes.count(None)} of {len(codes)} processes run {self.policy.linger:g} s longer: killed")
                    return -signal.SIGKILL
            for number, process in enumerate(processes):
                age = heartbeat_age(process.heartbeat)
                if codes[number] is None and age is not None and age > self.policy.hang_after:
                    say(f"process {number} of {len(codes)}: no heartbeat for {age:.0f} s; all are killed")
                    return -signal.SIGKILL
            time.sleep(POLL)

    def end(self) -> None:
        """SIGTERM to those that still run, and a time to obey; ``once`` kills what is left."""
        for child in self.children:
            send(child, signal.SIGTERM)
        deadline = time.monotonic() + self.policy.grace
        while any(child.poll() is None for child in self.children) and time.monotonic() < deadline:
            time.sleep(POLL)

    def rest(self, seconds: float) -> bool:
        """Waits; False, at once, when a signal asks to stop."""
        end = time.monotonic() + seconds
        while self.stopped_by is None and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, 0.2))
        return self.stopped_by is None


def worst(codes: Sequence[int]) -> int:
    """The code that stands for several: a fault before a failure, a failure before 42, 42 before 0."""
    for wanted in (FAULT, None, PREEMPTED):
        for code in codes:
            if code == wanted or (wanted is None and code not in (DONE, PREEMPTED)):
                return code
    return DONE


def spawn(process: Process, cwd: str | None) -> subprocess.Popen:
    """In a session of its own: a terminal's Ctrl-C would otherwise reach it twice."""
    env = {**process.env, HEARTBEAT: str(process.heartbeat)}
    return subprocess.Popen(
        list(process.command), env=env, cwd=cwd, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=follow
    )


_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def follow() -> None:
    """In the child: die when the supervisor dies, so that no process is left holding the accelerator (Linux)."""
    if _LIBC is not None:
        _LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, prctl(2)


def send(child: subprocess.Popen, signum: int) -> None:
    if child.poll() is None:
        child.send_signal(signum)


def kill_group(child: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # nothing left of it (the second on macOS)
        os.killpg(child.pid, signal.SIGKILL)


def heartbeat_age(path: Path) -> float | None:
    """Seconds since the file was touched; None where it never was."""
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return None


def describe(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:  # a real-time signal has no name
        return f"killed by signal {-code}"


def exit_code(code: int) -> int:
    """A shell's: 128 + n for death by signal n."""
    return code if code >= 0 else 128 - code


def say(line: str) -> None:
    sys.stderr.write(f"launch: {line}\n")
    sys.stderr.flush()


class Parser(argparse.ArgumentParser):
    """Wrong arguments are a fault like any other; argparse's own exit code is 2."""

    def error(self, message: str) -> None:
        self.print_usage(sys.stderr)
        self.exit(FAULT, f"{self.prog}: error: {message}\n")

    def split(self, argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
        """What stands before ``--``, parsed, and the words after it; argv: None for the process's own."""
        argv = sys.argv[1:] if argv is None else list(argv)
        own = argv[: argv.index("--")] if "--" in argv else argv
        return self.parse_args(own), argv[len(own) + 1 :]


class Folder:
    """What a supervisor leaves on its machine: ``status.json``, ``log.GENERATION``, ``heartbeat`` and ``lock``."""

    def __init__(self, path: str):
        self.path = Path(path).absolute()
        self.status, self.heartbeat = self.path / "status.json", self.path / "heartbeat"

    def log(self, generation: int) -> Path:
        return self.path / f"log.{generation}"

    def read(self) -> dict[str, Any]:
        """The last status written; a supervisor that died without a last word is "lost"."""
        try:
            found = json.loads(self.status.read_text())
        except FileNotFoundError:
            return {"state": "none", "generation": 0, "failures": 0, "job": ""}
        if found["state"] != "ended" and not self.held():
            found.update(state="lost", ended=found["time"])
        return found

    def write(self, **values: Any) -> None:
        """Atomically, so that a reader never sees half of it."""
        part = self.status.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(values))
        part.replace(self.status)

    def lock(self, wait: float = 0.0) -> int | None:
        """The lock of the folder, held until this process ends; None where another process holds it."""
        self.path.mkdir(parents=True, exist_ok=True)
        handle = os.open(str(self.path / "lock"), os.O_RDWR | os.O_CREAT, 0o644)
        deadline = time.monotonic() + wait
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return handle
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    os.close(handle)
                    return None
            time.sleep(POLL)

    def held(self) -> bool:
        handle = self.lock()
        if handle is not None:
            os.close(handle)
        return handle is None


def start(args: argparse.Namespace) -> int:
    """Begins ``run`` detached from this shell; a generation that was begun already is left alone."""
    folder = Folder(args.folder)
    if folder.read()["generation"] >= args.generation:
        return 0
    if folder.held():
        say(f"{args.folder}: an earlier generation still runs")
        return 1
    with folder.log(args.generation).open("ab") as log:
        argv = [sys.executable, str(Path(__file__).absolute()), "run", *args.raw]
        subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    deadline = time.monotonic() + 30.0
    while folder.read()["generation"] < args.generation:
        if time.monotonic() > deadline:
            say(f"{args.folder}: the supervisor did not begin; see {folder.log(args.generation)}")
            return 1
        time.sleep(POLL)
    return 0


def run(args: argparse.Namespace) -> int:
    folder = Folder(args.folder)
    handle = folder.lock(wait=5.0)  # held as long as this process lives; a reader's look at it lasts an instant
    if handle is None:
        say(f"{args.folder}: another supervisor runs there")
        return 1
    os.ftruncate(handle, 0)
    os.write(handle, str(os.getpid()).encode())
    given = dict(pair.split("=", 1) for pair in args.env)

    def report(state: str, attempt: int, code: int | None = None) -> None:
        now = time.time()
        ended = now if state == "ended" else None
        record = {"job": args.job, "generation": args.generation, "failures": args.failures}
        folder.write(state=state, attempt=attempt, code=code, time=now, ended=ended, **record)

    def make(attempt: int) -> list[Process]:
        report("running", attempt)
        return [Process(args.command, {**os.environ, **given}, folder.heartbeat)]

    policy = Policy(
        **{name: getattr(args, name) for name in ("retries", "backoff", "longest_wait", "hang_after", "grace")},
        restart_preempted=args.restart_preempted,
    )
    try:
        return Supervisor(make, policy, cwd=args.cwd, report=report).run()
    except OSError as error:  # the command cannot be started: it never can
        say(f"{args.command[0]}: {error}")
        report("ended", 0, FAULT)
        return FAULT


def status(args: argparse.Namespace) -> int:
    """Ages instead of times: the clock of whoever asks may differ.  Short enough to reach a pipe in one piece."""
    folder = Folder(args.folder)
    found, now = folder.read(), time.time()
    lines = tail(folder.log(found["generation"])).split("\n")
    shown = {key: found.get(key) for key in ("state", "job", "generation", "failures", "attempt", "code")}
    shown["worker"] = args.worker
    shown["ready"] = [path for path in args.ready if Path(path).exists()]
    shown["ended_for"] = now - found["ended"] if found.get("ended") else None
    shown["beat_age"] = now - found["time"] if found.get("time") else None
    shown["heartbeat_age"] = heartbeat_age(folder.heartbeat)
    shown["last_line"] = next((line.strip()[:400] for line in reversed(lines) if line.strip()), "")
    sys.stdout.write("\n" + json.dumps(shown) + "\n")
    return 0


def tail(path: Path) -> str:
    if not path.exists():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 4096))
        return file.read(4096).decode(errors="replace")


def log(args: argparse.Namespace) -> int:
    """The newest generation's log from a byte on; its number and that byte's are on the first line."""
    folder = Folder(args.folder)
    generation = folder.read()["generation"]
    path = folder.log(generation)
    offset = args.offset if generation == args.generation else 0
    with path.open("rb") if path.exists() else open(os.devnull, "rb") as file:
        file.seek(offset)
        sys.stdout.buffer.write(json.dumps([generation, offset]).encode() + b"\n" + file.read())
    return 0


def stop(args: argparse.Namespace) -> int:
    """SIGTERM to the supervisor, which hands it on; SIGKILL where it has not ended after ``--grace``."""
    folder = Folder(args.folder)
    if not folder.held():
        return 0
    pid, deadline = int((folder.path / "lock").read_text()), time.monotonic() + args.grace
    os.kill(pid, signal.SIGTERM)
    while folder.held():
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            deadline = float("inf")
        time.sleep(POLL)
    return 0


def parser() -> Parser:
    top = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    verbs = top.add_subparsers(dest="verb", required=True)
    for verb, does in (("start", start), ("run", run), ("status", status), ("log", log), ("stop", stop)):
        one = verbs.add_parser(verb, allow_abbrev=False)
        one.set_defaults(does=does)
        add = one.add_argument
        add("--folder", required=True)
        if verb in ("start", "run"):
            add("--generation", type=int, default=1, help="what was begun once is not begun again")
            add("--failures", type=int, default=0, help="those before this generation, for the record")
            add("--job", default="", help="what runs, for the record")
            add("--cwd", help="folder to run it in")
            add("--env", action="append", default=[], metavar="NAME=VALUE")
            add("--restart_preempted", action="store_true", help="start again after exit code 42 (default: end)")
            for name, kind in (("retries", int), ("backoff", float), ("longest_wait", float), ("hang_after", float)):
                add(f"--{name}", type=kind, default=getattr(Policy, name))
        if verb in ("start", "run", "stop"):
            add("--grace", type=float, default=Policy.grace)
        if verb == "status":
            add("--ready", action="append", default=[], metavar="PATH", help="say whether it exists")
            add("--worker", default="", help="the name to answer with")
        if verb == "log":
            add("--offset", type=int, default=0)
            add("--generation", type=int, default=0, help="the one that the offset is of")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    options = parser()
    args, args.command = options.split(argv)
    args.raw = argv[1:]
    if args.does in (start, run) and not args.command:
        options.error("the command to run is missing: give it after --")
    return args.does(args)


if __name__ == "__main__":
    sys.exit(main())
