"""One run on several processes: how they find each other, share files, agree, and end together.

Every process runs the same program.  Process 0 (``is_writer``) alone writes the files of a run, which lie in a folder
that all of them see.  The environment says how they are started:

JAXTRAIN_COORDINATOR=HOST:PORT, JAXTRAIN_NUM_PROCESSES=N, JAXTRAIN_PROCESS_ID=I: by hand; HOST is process 0's.
JAXTRAIN_DISTRIBUTED=1: JAX finds the cluster by itself (TPU pods, Slurm, GKE, Open MPI).
JAXTRAIN_HEARTBEAT=FILE: touched at every step, for a supervisor to look at.
JAXTRAIN_PEER_TIMEOUT=SECONDS: a process that has not been heard of for so long is dead, and ends the others (60).
JAXTRAIN_STEP_TIMEOUT=SECONDS: the longest that a step may take before its process counts as hung, prints where it
    stands and ends with exit code 1; 0: no bound (1800 with several processes, else 0).
JAXTRAIN_FIRST_STEP_TIMEOUT=SECONDS: the same while programs are still to be compiled (3600, at least the above).

Importing this module imports nothing heavy.
"""

from __future__ import annotations

import contextlib
import faulthandler
import itertools
import json
import os
import re
import secrets
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Exit codes.  What supervises a run starts it again for free after 42, never after 43.
PREEMPTED, USER_MISTAKE, CRASH, INTERRUPTED = 42, 43, 70, 130
FAILURE, SEEN = "jaxtrain/failure", "jaxtrain/seen/"
# XLA raises some of its errors, such as of a broken connection, as ValueError: they are nobody's mistake.
XLA_ERROR = re.compile(r"\b(UNKNOWN|INTERNAL|UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION): ")
POLL = 0.5  # seconds between two questions whether another process has failed
LAST_WORDS = 5.0  # seconds that process 0 waits for the others to hear of a failure
VISIBLE = 15.0  # seconds that a network file system may take to show a new file
LONGEST = 86400.0  # seconds that a process waits at its end for the others, which may still write
WAIT = 5.0  # seconds of one wait for process 0, after which signals are looked at; and between two heartbeats then


class Preempted(BaseException):
    """The machine is taken away: what can be continued from has been saved.  No Exception: nothing may swallow it."""


class _Job:
    """What one ``job`` knows; there is at most one in a process."""

    def __init__(self, several: bool, stop_after: int) -> None:
        self.stop_after = stop_after
        self.heartbeat = os.environ.get("JAXTRAIN_HEARTBEAT")
        self.values, self.steps = itertools.count(), itertools.count(1)
        self.in_loop = self.terminated = False
        self.step_timeout = _seconds("JAXTRAIN_STEP_TIMEOUT", 1800.0 if several else 0.0)
        self.first_timeout = max(_seconds("JAXTRAIN_FIRST_STEP_TIMEOUT", 3600.0), self.step_timeout)
        self.over = threading.Event()


_job: _Job | None = None


@contextlib.contextmanager
def job(stop_after: int = 0) -> Iterator[None]:
    """A run, from its first look at a device to its end.

    With several processes: joins the others.  An exception in one of them ends all, with its message and its exit code,
    and does not come out of this block.  SIGTERM: see ``preempted``.
    stop_after: steps after which a single process counts as preempted, as if it were sent SIGTERM; 0: never.
    Raises ValueError for a contradictory environment.
    """
    global _job
    assert _job is None, "one job at a time"
    several = _join()
    current = _Job(several, stop_after)
    try:
        _job = current
        if several:
            threading.Thread(target=_listen, args=(current,), name="peers", daemon=True).start()
            _bound(current.first_timeout)
            try:
                yield
                _wait_for_all()
            except Preempted:
                _wait_for_all()
                raise
            except BaseException as error:  # noqa: BLE001  whatever it is, the others must not wait for this process
                _abandon(error)
        else:
            with _on_sigterm(current):
                _bound(current.first_timeout)
                yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        current.over.set()
        _job = None


def is_writer() -> bool:
    """Whether this process writes the run's files."""
    return process()[0] == 0


def process() -> tuple[int, int]:
    """This process's number and how many there are, without waking devices up."""
    state = _state()
    return (0, 1) if state is None else (state.process_id, state.num_processes)


def from_writer(make: Callable[[], Any]) -> Any:
    """What ``make`` returns in process 0, where alone it is called, everywhere: a JSON value.

    The others wait for as long as it takes, so that all decide alike, and read files only when they are written.
    """
    with _unbounded():
        if process()[1] == 1:
            return make()
        assert _job is not None, "processes agree only within a job"
        client, key = _state().client, f"jaxtrain/value/{next(_job.values)}"
        if not is_writer():
            return json.loads(_get(client, key))
        text = json.dumps(make())
        client.key_value_set(key, text)
        return json.loads(text)


def writer_first(make: Callable[[], Any], read: Callable[[], Any]) -> Any:
    """What ``make`` returns in process 0, and then, in the others, what ``read`` makes of the files it left."""
    made: list[Any] = []
    from_writer(lambda: made.append(make()))
    return made[0] if made else read()


def check_same(what: str, value: str) -> None:
    """Raises ValueError where this process's ``value`` is not process 0's.  All processes must call it."""
    first = from_writer(lambda: value)
    if first != value:
        raise ValueError(
            f"process {process()[0]} has another {what} than process 0: start all with the same command, files and "
            "version of jaxtrain"
        )


def check_shared(folder: Path) -> None:
    """Raises ValueError, naming it, where ``folder`` is not the one that process 0 sees under this name."""
    if process()[1] == 1:
        return
    mark = folder / ".shared"

    def leave() -> str:
        folder.mkdir(parents=True, exist_ok=True)
        text = secrets.token_hex(16)
        mark.write_text(text)
        return text

    wanted = from_writer(leave)
    until = time.monotonic() + VISIBLE
    while not (mark.is_file() and mark.read_text() == wanted):
        if time.monotonic() > until:
            raise ValueError(
                f"process {process()[0]} does not see in {folder} what process 0 has written there: --out must be on a "
                "file system that all hosts share"
            )
        time.sleep(0.2)


def beat(*, compiling: bool = False) -> None:
    """Says that this process makes progress; called at every step.  compiling: what comes next may take longer."""
    if _job is None:
        return
    if _job.heartbeat:
        Path(_job.heartbeat).touch()
    _bound(_job.first_timeout if compiling else _job.step_timeout)


def _bound(seconds: float) -> None:
    """From now on, until the next call; a thread of the interpreter's that no hung code holds up."""
    if _job is not None and _job.step_timeout:
        faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__)


@contextlib.contextmanager
def _unbounded() -> Iterator[None]:
    """While files are written, or waited for: preparing data may take hours, in which the heartbeat goes on."""
    current, done = _job, threading.Event()
    if current is None:
        yield
        return

    def tick() -> None:
        while not done.wait(WAIT):
            Path(current.heartbeat).touch()

    faulthandler.cancel_dump_traceback_later()
    thread = threading.Thread(target=tick, name="heartbeat", daemon=True)
    if current.heartbeat:
        thread.start()
    try:
        yield
    finally:
        done.set()
        _bound(current.first_timeout)


@contextlib.contextmanager
def loop() -> Iterator[None]:
    """A training loop, which asks ``preempted`` after every step."""
    if _job is not None:
        _job.in_loop = True
    beat(compiling=True)
    try:
        yield
    finally:
        if _job is not None:
            _job.in_loop = False
        beat(compiling=True)


def preempted() -> bool:
    """Whether to save now and to raise ``Preempted``: true in all processes after the same step.

    SIGTERM to any process asks for it.  Call it after every step of every loop, in all processes alike.  Outside of
    a loop a single process raises Preempted at the signal; several come to an end at their next step.
    """
    if _job is None:
        return False
    if process()[1] == 1:
        return next(_job.steps) == _job.stop_after or _job.terminated
    from jax.experimental import multihost_utils

    return multihost_utils.reached_preemption_sync_point(next(_job.steps))


def fetch(array: Any) -> Any:
    """A global array's values, as a NumPy array, on every host.  All hosts must call it."""
    import jax
    import numpy as np

    if isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated):
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)


def share(count: int) -> slice:
    """Which of ``count`` rows are this process's, where the rows are divided among processes."""
    number, processes = process()
    each = -(-count // processes)
    return slice(min(number * each, count), min((number + 1) * each, count))


def gather(own: Any, count: int) -> Any:
    """All ``count`` float64 values, where this process has ``own``, those of ``share(count)``.  Bit for bit."""
    import numpy as np

    own, processes = np.asarray(own, np.float64), process()[1]
    if processes == 1:
        return own
    from jax.experimental import multihost_utils

    padded = np.zeros(-(-count // processes), np.float64)
    padded[: len(own)] = own
    # As pairs of words: JAX would make float32 of them.
    words = np.asarray(multihost_utils.process_allgather(padded.view(np.uint32), tiled=True))
    return np.ascontiguousarray(words).view(np.float64)[:count]


def _seconds(name: str, default: float) -> float:
    text = os.environ.get(name, "")
    try:
        value = float(text) if text else default
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise ValueError(f"{name} is {text!r}: it must be a number of seconds")
    return value


def _state() -> Any:
    """JAX's own record of the processes, None where there is one.  (The key-value store has no public name.)"""
    if "jax" not in sys.modules:
        return None
    from jax._src.distributed import global_state

    return None if global_state.client is None else global_state


def _join() -> bool:
    """Finds the other processes where the environment names some; whether there are any."""
    names = ("JAXTRAIN_COORDINATOR", "JAXTRAIN_NUM_PROCESSES", "JAXTRAIN_PROCESS_ID")
    coordinator, processes, number = (os.environ.get(name, "") for name in names)
    found = os.environ.get("JAXTRAIN_DISTRIBUTED", "0") not in ("", "0")
    if not (coordinator or processes or number or found):
        return False
    if found and (coordinator or processes or number):
        raise ValueError(f"JAXTRAIN_DISTRIBUTED finds processes by itself: unset it, or {', '.join(names)}")
    if not found:
        given = {name: os.environ.get(name, "") for name in names}
        if not all(given.values()):
            raise ValueError(f"several processes need all of {', '.join(names)}; found {given}")
        if not (processes.isdigit() and number.isdigit() and int(number) < int(processes)):
            raise ValueError(f"JAXTRAIN_PROCESS_ID={number} is not from 0 to JAXTRAIN_NUM_PROCESSES={processes} - 1")
        if not coordinator.rpartition(":")[2].isdigit() or not coordinator.rpartition(":")[0]:
            raise ValueError(f"JAXTRAIN_COORDINATOR is {coordinator!r}: it must be HOST:PORT")
    peers = int(_seconds("JAXTRAIN_PEER_TIMEOUT", 60.0))
    import jax

    options: dict[str, Any] = {"heartbeat_timeout_seconds": peers, "shutdown_timeout_seconds": peers}
    if found:
        jax.distributed.initialize(**options)
    else:
        jax.distributed.initialize(coordinator, int(processes), int(number), **options)
    return process()[1] > 1


@contextlib.contextmanager
def _on_sigterm(current: _Job) -> Iterator[None]:
    """SIGTERM to a single process: ``preempted`` becomes true in a loop; elsewhere nothing has to be saved."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(signum: int, frame: Any) -> None:
        current.terminated = True
        if not current.in_loop:
            raise Preempted("before the first step of a stage, or after its last")

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _get(client: Any, key: str) -> str:
    """A value that another process is still to give; if that dies, JAX's heartbeats end this one."""
    while True:
        try:
            return client.blocking_key_value_get(key, int(WAIT * 1000))
        except Exception as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise


def _wait_for_all() -> None:
    """Until every process is at its end.  Still listening, because another one may fail yet."""
    faulthandler.cancel_dump_traceback_later()
    _state().client.wait_at_barrier("jaxtrain/end", int(LONGEST * 1000))


def _listen(current: _Job) -> None:
    """Ends this process when another one has failed: it may stand in a collective that will never end."""
    while not current.over.wait(POLL):
        _follow()


def _follow() -> None:
    """Ends this process as the first that failed has ended, where one has."""
    try:
        failure = json.loads(_state().client.key_value_try_get(FAILURE))
    except Exception:  # noqa: BLE001  none has; or there is nobody left to ask, which JAX's heartbeats will notice
        return
    if failure["process"] != process()[0]:
        _say(f"jaxtrain: process {failure['process']} has ended the run: {failure['error']}")
        _leave(failure["code"])


def _abandon(error: BaseException) -> None:
    """Tells why this process has failed, here and to the others, and ends it."""
    faulthandler.cancel_dump_traceback_later()
    _follow()  # a collective fails because another process has ended: that one's reason is the one to tell
    if isinstance(error, KeyboardInterrupt):
        code, text = INTERRUPTED, "interrupted"
    elif isinstance(error, ValueError | OSError) and not XLA_ERROR.search(str(error)):
        code, text = USER_MISTAKE, f"error: {error}"
    else:
        code, text = CRASH, f"{type(error).__name__}: {error}"
    if code == CRASH or os.environ.get("JAXTRAIN_TRACEBACK", "0") not in ("", "0"):
        traceback.print_exception(error)
    number = process()[0]
    _say(f"jaxtrain: process {number}: {text}")
    with contextlib.suppress(Exception):  # two may fail at once, and process 0, who keeps the record, may be gone
        _state().client.key_value_set(FAILURE, json.dumps({"process": number, "code": code, "error": text}))
    _leave(code)


def _leave(code: int) -> None:
    """Ends this process; process 0, whose end is noticed at once and aborts the others, after them."""
    client, (number, processes) = _state().client, process()
    with contextlib.suppress(Exception):
        client.key_value_set(f"{SEEN}{number}", "1")
        until = time.monotonic() + LAST_WORDS
        while number == 0 and time.monotonic() < until and len(client.key_value_dir_get(SEEN)) < processes:
            time.sleep(0.05)
    if number == 0:
        time.sleep(POLL)
    _exit(code)


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def _exit(code: int) -> None:
    """At once: an orderly end would wait for the others at a barrier."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
