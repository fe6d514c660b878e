"""What to do next for a job on TPU slices, as a pure function: ``plan(spec, observed) -> actions``.

The slices of a job are the nodes of one queued resource, which Google Cloud grants and takes away as a whole.  Each
worker (a host of a slice) runs a supervisor, ``supervise.py``.  A *generation* is one common start of all workers:
its number only grows, and a worker that has begun a generation never begins it again, so every action may be repeated
after a lost answer.  ``plan`` holds no state: what it must remember comes with ``Observed``.
"""

from __future__ import annotations

from dataclasses import dataclass

from supervise import DONE, FAULT, PREEMPTED, worst

# Of QueuedResourceState.State in the Cloud TPU API v2.  Two of ours: ABSENT (there is none), UNKNOWN (no answer).
LEAVING = ("SUSPENDING", "DELETING")
LOST = 1  # stands for the exit code of a worker whose supervisor died without a word


@dataclass(frozen=True)
class Spec:
    """What is wanted.  goal: "up" (workers set up), "run" (the job has ended) or "down" (nothing left); seconds.

    job names code, command and environment by their hash.  restarts: failures in all before giving up; backoff
    doubles with each of them up to longest_wait.  After a worker ended well (0 or 42) the others have patience to end
    too; workers that do not answer for silence are lost.  replace: stop another job that runs there.  after: the last
    generation of an earlier call: if it has ended, and not well, the job is asked for anew.
    """

    goal: str
    job: str
    restarts: int = 5
    backoff: float = 30.0
    longest_wait: float = 900.0
    patience: float = 900.0
    silence: float = 900.0
    poll: float = 30.0
    replace: bool = False
    after: int = 0


@dataclass(frozen=True)
class Worker:
    """One worker's answer.  state: "none" (nothing was ever started), "running", "ended" or "lost".

    ready: our code is set up; ended_for: seconds since the end of what ran, by the worker's clock; failures: those
    counted before this generation.
    """

    ready: bool = True
    state: str = "none"
    job: str = ""
    generation: int = 0
    failures: int = 0
    code: int | None = None
    ended_for: float = 0.0


@dataclass(frozen=True)
class Observed:
    """What is there.  ours: it carries our labels; taken: a node was preempted although the resource says ACTIVE.

    expected: workers of all slices; workers: those that answered; silent_for: seconds since all last did.
    failures, since_failure, generation: counted by whoever watches, since this knowledge dies with the workers.
    """

    resource: str
    ours: bool = True
    taken: bool = False
    expected: int = 0
    workers: tuple[Worker, ...] = ()
    silent_for: float = 0.0
    failures: int = 0
    since_failure: float = float("inf")
    generation: int = 0


@dataclass(frozen=True)
class Action:
    """kind: create, delete, set_up, start, stop, wait, finish or give_up.

    seconds: of a wait; generation and failures: of a start; code: of finish and give_up; charged: counts as a failure.
    """

    kind: str
    why: str
    seconds: float = 0.0
    generation: int = 0
    failures: int = 0
    code: int = DONE
    charged: bool = False


def plan(spec: Spec, seen: Observed) -> tuple[Action, ...]:
    """The next actions, in order; look again after them.  The last of all is ``finish`` or ``give_up``."""
    if seen.resource == "UNKNOWN":
        return (_wait(spec, "the cloud did not answer"),)
    if seen.resource != "ABSENT" and not seen.ours:
        return (_give_up(FAULT, "a queued resource of this name exists without this job's labels: it is left alone"),)
    action = _down(seen) if spec.goal == "down" else _up(spec, seen)
    if action is None:
        return (_wait(spec, seen.resource),)
    if action.kind in ("wait", "finish", "give_up"):
        return (action,)
    failures = _failures(seen)
    if failures > spec.restarts:
        return (_give_up(LOST, f"{failures} failures"),)
    left = backoff(spec, failures) - seen.since_failure
    return (_wait(spec, f"after failure {failures}", left) if left > 0 else action,)


def backoff(spec: Spec, failures: int) -> float:
    """Seconds between the last of so many failures and the next try."""
    return min(spec.backoff * 2 ** (failures - 1), spec.longest_wait) if failures else 0.0


def _wait(spec: Spec, why: str, seconds: float | None = None) -> Action:
    return Action("wait", why, seconds=spec.poll if seconds is None else min(seconds, spec.poll))


def _give_up(code: int, why: str) -> Action:
    return Action("give_up", why, code=code)


def _failures(seen: Observed) -> int:
    return max([seen.failures, *(worker.failures for worker in seen.workers)])


def _down(seen: Observed) -> Action | None:
    if seen.resource == "ABSENT":
        return Action("finish", "nothing is left")
    return None if seen.resource in LEAVING else Action("delete", "asked for")


def _up(spec: Spec, seen: Observed) -> Action | None:
    if seen.resource == "ABSENT":
        return Action("create", "there is none")
    if seen.resource == "SUSPENDED" or (seen.resource == "ACTIVE" and seen.taken):
        return Action("delete", "preempted")
    if seen.resource == "FAILED":
        return Action("delete", "the request has failed", charged=True)
    if seen.resource != "ACTIVE":
        return None  # waiting for it, or for its end, or a state that this program does not know
    if not seen.expected or len(seen.workers) < seen.expected:
        why = f"{len(seen.workers)} of {seen.expected} workers answer"
        return Action("delete", why, charged=True) if seen.silent_for > spec.silence else _wait(spec, why)
    foreign = [worker for worker in seen.workers if worker.state == "running" and worker.job != spec.job]
    if spec.goal == "run" and foreign:
        if not spec.replace:
            return _give_up(FAULT, f"another job ({foreign[0].job}) runs there: --replace stops it")
        return Action("stop", f"another job ({foreign[0].job}) is replaced")
    if not all(worker.ready for worker in seen.workers):
        return Action("set_up", "not all workers have this code")
    return Action("finish", "all workers are set up") if spec.goal == "up" else _run(spec, seen)


def _run(spec: Spec, seen: Observed) -> Action:
    """All workers answer and are set up, and no other job runs on them."""
    newest = max([seen.generation, *(worker.generation for worker in seen.workers)])
    current = [worker for worker in seen.workers if worker.generation == newest and worker.job == spec.job]
    behind = [worker for worker in seen.workers if worker not in current]
    running = any(worker.state == "running" for worker in seen.workers)
    failures = _failures(seen)
    blocked = any(worker.generation == newest for worker in behind)  # by another job: it would not begin this one
    if running and (blocked or not current or any(worker.state == "running" for worker in behind)):
        return Action("stop", "not all workers are at the same generation of this job")
    if not current:
        return Action("start", "nothing runs", generation=newest + 1, failures=failures)
    over = [worker for worker in current if worker.state != "running"]
    if not over:
        if behind:
            return Action("start", "some have not begun", generation=newest, failures=failures)
        return _wait(spec, "running")
    codes = [worker.code if worker.state == "ended" else LOST for worker in over]
    found = worst(codes)
    if running:
        if found not in (DONE, PREEMPTED):
            return Action("stop", f"a worker ended with exit code {found}")
        if max(worker.ended_for for worker in over) > spec.patience:
            return Action("stop", f"a worker ended with exit code {found}, and others run on")
        return _wait(spec, f"a worker ended with exit code {found}")
    if newest <= spec.after and (behind or found != DONE):
        return Action("start", f"asked for again after exit code {found}", generation=newest + 1)
    if found == FAULT:
        return _give_up(FAULT, "a fault of configuration or data; see the logs")
    if behind and found == DONE:
        found = LOST  # some have done their work, and some have never begun it
    if found == DONE:
        return Action("finish", "all workers are done")
    rested = min(worker.ended_for for worker in over)
    if found == PREEMPTED:
        due, why = spec.backoff, "preempted"
    else:
        failures += 1
        if failures > spec.restarts:
            return _give_up(found, f"{failures} failures, the last with exit code {found}; see the logs")
        due, why = backoff(spec, failures), f"failure {failures} of at most {spec.restarts}, exit code {found}"
    if rested < due:
        return _wait(spec, why, due - rested)
    return Action("start", why, generation=newest + 1, failures=failures)
