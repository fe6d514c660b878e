"""``plan`` on every combination of what can be observed, and in a simulated cloud until the end."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest
from state import LOST, Action, Observed, Spec, Worker, plan
from supervise import DONE, FAULT, PREEMPTED

OURS, OTHER = "job", "other"
# Every state that the API knows, one that it may yet learn, and our own two.
STATES = ["ABSENT", "UNKNOWN", "CREATING", "ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
STATES += ["SUSPENDING", "SUSPENDED", "FAILED", "DELETING", "STATE_UNSPECIFIED", "NEW_STATE"]
COMING = {"CREATING", "ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING", "STATE_UNSPECIFIED", "NEW_STATE"}
SPEC = Spec("run", OURS, restarts=3, backoff=30, longest_wait=100, patience=60, silence=900, poll=10)
FOREVER = float("inf")

WORKERS = [None, Worker(), Worker(ready=False)]
for job, generation in itertools.product((OURS, OTHER), (1, 2)):
    record = {"job": job, "generation": generation}
    WORKERS.append(Worker(state="running", **record))
    WORKERS.append(Worker(state="lost", ended_for=50, **record))
    for code, ended_for in itertools.product((DONE, PREEMPTED, FAULT, 70), (0, 500)):
        WORKERS.append(Worker(state="ended", code=code, ended_for=ended_for, **record))


def observations():
    """(goal, replace, observation): all states; where workers matter, all pairs of workers."""
    shared = itertools.product(("run", "up", "down"), (False, True), (0, 3, 4), (0.0, FOREVER), (0, 2))
    for goal, instead, failures, since, known in shared:
        memory = {"failures": failures, "since_failure": since, "generation": known}
        for state, ours, taken in itertools.product(STATES, (True, False), (True, False)):
            yield goal, instead, Observed(state, ours=ours, taken=taken, expected=2, **memory)
        for pair, silent in itertools.product(itertools.product(WORKERS, repeat=2), (0.0, 1000.0)):
            workers = tuple(worker for worker in pair if worker)
            yield goal, instead, Observed("ACTIVE", expected=2, workers=workers, silent_for=silent, **memory)


def check(spec: Spec, seen: Observed, action: Action) -> None:
    """What must hold of the answer to any observation."""
    kind, workers = action.kind, seen.workers
    ended = [worker for worker in workers if worker.state == "ended"]
    running = [worker for worker in workers if worker.state == "running"]
    newest = max([seen.generation, *(worker.generation for worker in workers)])
    current = [worker for worker in workers if (worker.generation, worker.job) == (newest, spec.job)]
    if seen.resource != "ABSENT" and not seen.ours:
        assert kind == "wait" if seen.resource == "UNKNOWN" else (kind, action.code) == ("give_up", FAULT)
    if kind == "wait":
        assert 0 < action.seconds <= spec.poll
    if kind == "create":
        assert seen.resource == "ABSENT" and spec.goal != "down"
    if kind == "delete":
        assert seen.ours and seen.resource not in ("ABSENT", "UNKNOWN", "DELETING", "SUSPENDING")
        if spec.goal != "down":
            assert seen.resource in ("SUSPENDED", "FAILED") or seen.taken or seen.silent_for > spec.silence
            assert action.charged == (seen.resource == "FAILED" or (seen.resource == "ACTIVE" and not seen.taken))
    if kind in ("create", "delete", "set_up", "start", "stop"):
        assert seen.failures <= spec.restarts
        assert not seen.failures or seen.since_failure >= spec.backoff  # no try right after a failure
    if kind in ("set_up", "start", "stop"):
        assert seen.resource == "ACTIVE" and seen.ours and not seen.taken and spec.goal != "down"
        assert len(workers) == seen.expected
    if kind == "start":
        assert spec.goal == "run" and all(worker.ready for worker in workers)
        assert all((worker.generation, worker.job) == (action.generation, spec.job) for worker in running)
        assert any(worker.generation < action.generation for worker in workers), "nobody would begin"
        assert not any(worker.code == FAULT for worker in current), "43 is never retried"
        assert all(worker.ended_for >= spec.backoff for worker in current if worker.state != "running")
        codes = {worker.code if worker.state == "ended" else LOST for worker in current if worker not in running}
        again, incomplete = action.generation > newest and current, len(current) < len(workers)
        if again and not running:
            charge = bool(codes - {DONE, PREEMPTED}) or (codes == {DONE} and incomplete)
            assert action.failures == seen.failures + charge  # preemptions are free
    if kind == "stop":
        assert running
        if any(worker.job != spec.job for worker in running):
            assert spec.replace
    if kind == "finish":
        assert action.code == DONE
        if spec.goal == "run":
            assert len(ended) == seen.expected and {worker.code for worker in ended} == {DONE} and ended == current
        elif spec.goal == "down":
            assert seen.resource == "ABSENT"
    if kind == "give_up":
        assert action.code not in (DONE, PREEMPTED)
        if action.code == FAULT and seen.ours:
            foreign = any(worker.job != spec.job for worker in running)
            assert foreign or any(worker.code == FAULT for worker in current)


def test_every_combination():
    kinds, number = set(), 0
    for goal, instead, seen in observations():
        spec = replace(SPEC, goal=goal, replace=instead)
        (action,) = plan(spec, seen)
        check(spec, seen, action)
        kinds.add((goal, action.kind))
        number += 1
    assert number > 50_000
    everything = {"create", "delete", "set_up", "start", "stop", "wait", "finish", "give_up"}
    assert {kind for goal, kind in kinds if goal == "run"} == everything
    assert {kind for goal, kind in kinds if goal == "up"} == everything - {"start", "stop"}
    assert {kind for goal, kind in kinds if goal == "down"} == {"delete", "wait", "finish", "give_up"}


@pytest.mark.parametrize("state", STATES)
def test_what_each_state_of_the_resource_leads_to(state):
    kind = plan(SPEC, Observed(state, expected=1))[0].kind
    if state in COMING | {"UNKNOWN", "SUSPENDING", "DELETING", "ACTIVE"}:  # ACTIVE: its worker does not answer yet
        assert kind == "wait"
    else:
        assert kind == {"ABSENT": "create", "SUSPENDED": "delete", "FAILED": "delete"}[state]


def after(*workers: Worker, spec: Spec = SPEC, **known) -> Action:
    return plan(spec, Observed("ACTIVE", expected=len(workers), workers=workers, **known))[0]


def ended(code: int, ended_for: float = 1000, **more) -> Worker:
    return Worker(state="ended", job=OURS, generation=1, code=code, ended_for=ended_for, **more)


def test_workers_that_stay_silent_are_lost():
    for workers in ((), (Worker(),)):
        seen = Observed("ACTIVE", expected=2, workers=workers, silent_for=899)
        assert plan(SPEC, seen)[0].kind == "wait"
        (action,) = plan(SPEC, replace(seen, silent_for=901))
        assert (action.kind, action.charged) == ("delete", True)


RUNNING = Worker(state="running", job=OURS, generation=1)


def test_the_waits_double_up_to_the_longest():
    for failures, wait in enumerate([30, 60, 100, 100]):
        spec = replace(SPEC, poll=1000, restarts=9)
        assert after(ended(70, 10, failures=failures), spec=spec).seconds == pytest.approx(wait - 10)
        assert after(ended(70, wait, failures=failures), spec=spec, since_failure=wait).kind == "start"


def test_what_ends_first_decides_for_all():
    assert after(RUNNING, RUNNING).kind == "wait"
    assert after(RUNNING, ended(70, 0)).kind == "stop"
    assert after(RUNNING, ended(FAULT, 0)).kind == "stop"
    assert after(RUNNING, ended(PREEMPTED, 50)).kind == "wait"
    assert after(RUNNING, ended(PREEMPTED, 70)).kind == "stop"
    assert after(RUNNING, ended(DONE, 70)).kind == "stop"
    assert after(RUNNING, Worker()) == Action("start", "some have not begun", generation=1)
    start = after(ended(PREEMPTED, failures=2), ended(DONE))
    assert (start.kind, start.generation, start.failures) == ("start", 2, 2)
    start = after(ended(PREEMPTED), ended(70))
    assert (start.kind, start.generation, start.failures) == ("start", 2, 1)
    assert after(ended(PREEMPTED), ended(FAULT)).code == FAULT
    assert after(ended(71, failures=3), ended(DONE)) == Action(
        "give_up", "4 failures, the last with exit code 71; see the logs", code=71
    )
    assert after(ended(PREEMPTED, failures=3)).kind == "start"


def test_what_an_earlier_call_left_is_started_anew_unless_it_ended_well():
    spec = replace(SPEC, after=1)
    for code in (FAULT, PREEMPTED, 70):
        again = after(ended(code, 0, failures=3), ended(DONE), spec=spec)
        assert (again.kind, again.generation, again.failures) == ("start", 2, 0)
    assert after(ended(DONE), ended(DONE), spec=spec).kind == "finish"
    assert after(RUNNING, ended(FAULT), spec=spec).kind == "stop"
    assert after(*[replace(ended(FAULT), generation=2)] * 2, spec=spec).kind == "give_up"


class Cloud:
    """A model of the cloud in which anything may go wrong a limited number of times."""

    def __init__(self, seed: int, troubles: int):
        self.random, self.troubles = random.Random(seed), troubles
        self.state, self.age, self.now = "ABSENT", 0, 0.0
        self.workers: list[Worker] = []
        self.failures, self.failed_at, self.silent_since, self.generation = 0, -1e9, 0.0, 0
        self.done, self.preemptions, self.fault = 0, 0, False

    def trouble(self, chance: float) -> bool:
        happens = self.troubles > 0 and self.random.random() < chance
        self.troubles -= happens
        return happens

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        path = ["CREATING", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
        if self.state in path[:-1]:
            self.state = path[path.index(self.state) + 1] if not self.trouble(0.05) else "FAILED"
            self.workers = [Worker(ready=False) for _ in range(2)] if self.state == "ACTIVE" else []
            self.silent_since = self.now
        elif self.state in ("SUSPENDING", "DELETING"):
            self.state = {"SUSPENDING": "SUSPENDED", "DELETING": "ABSENT"}[self.state]
        elif self.state == "ACTIVE" and self.trouble(0.1):
            self.preemptions += 1
            self.state, self.workers = "SUSPENDING", []
        self.workers = [self.step(worker, seconds) for worker in self.workers]

    def step(self, worker: Worker, seconds: float) -> Worker:
        if worker.state in ("ended", "lost"):
            return replace(worker, ended_for=worker.ended_for + seconds)
        if worker.state != "running":
            return worker
        if self.trouble(0.1):
            code = self.random.choice([PREEMPTED, 1, 70, None] + [FAULT] * self.fault)
            return replace(worker, state="lost" if code is None else "ended", code=code)
        together = [other for other in self.workers if other.state == "running"]
        if len(together) == 2 or self.done:  # alone it waits for the other one
            self.done += 1
            return replace(worker, state="ended", code=DONE) if self.done > 10 else worker
        return worker

    def observe(self) -> Observed:
        answering = () if self.trouble(0.05) else tuple(self.workers)
        if len(answering) == 2:
            self.silent_since = self.now
        self.generation = max([self.generation, *(worker.generation for worker in answering)])
        return Observed(
            "UNKNOWN" if self.trouble(0.05) else self.state,
            expected=2, workers=answering, silent_for=self.now - self.silent_since, failures=self.failures,
            since_failure=self.now - self.failed_at, generation=self.generation,
        )  # fmt: skip

    def perform(self, action: Action) -> None:
        if action.kind == "create":
            assert self.state == "ABSENT", "created twice"
            self.state = "CREATING"
        elif action.kind == "delete":
            self.state, self.workers = "DELETING", []
        elif action.kind == "set_up":
            self.workers = [worker if self.trouble(0.1) else replace(worker, ready=True) for worker in self.workers]
        elif action.kind == "start":
            for number, worker in enumerate(self.workers):
                if worker.generation < action.generation and not self.trouble(0.1):
                    fresh = {"state": "running", "job": OURS, "code": None, "ended_for": 0.0}
                    known = {"generation": action.generation, "failures": action.failures}
                    self.workers[number] = replace(worker, **fresh, **known)
        elif action.kind == "stop":
            stopped = {"state": "ended", "code": PREEMPTED, "ended_for": 0.0}
            self.workers = [replace(w, **stopped) if w.state == "running" else w for w in self.workers]
        self.failures = max(self.failures + action.charged, action.failures)
        self.failed_at = self.now if action.charged else self.failed_at


@pytest.mark.parametrize("troubles", [0, 2, 10, 40])
def test_it_ends_in_a_cloud_where_everything_goes_wrong_sometimes(troubles):
    ends = []
    for seed in range(150):
        cloud = Cloud(seed, troubles)
        cloud.fault = seed % 3 == 0
        for _ in range(3000):
            (action,) = plan(SPEC, cloud.observe())
            if action.kind in ("finish", "give_up"):
                break
            cloud.perform(action)
            cloud.pass_time(action.seconds if action.kind == "wait" else 1.0)
        else:
            pytest.fail(f"seed {seed}: no end")
        ends.append(action.code)
        if action.kind == "finish":
            assert [worker.code for worker in cloud.workers] == [DONE, DONE]
        elif action.code != FAULT:
            assert cloud.failures >= SPEC.restarts, "given up too early"
    assert ends.count(DONE) == 150 if troubles == 0 else 0 < ends.count(DONE) <= 150
