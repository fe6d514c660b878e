"""The TPU backend end to end, with a fake ``gcloud`` on PATH that really runs what it is told to run on workers."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from bundle import pack
from gcloud import Remote, Slices, answers

ROOT = Path(__file__).resolve().parents[2]
AWKWARD = ["--text", 'it\'s "so"  $HOME `id` \\ *;&|\n#é', "", "--", "-x=$(exit 1)"]
STEPS = 12

# A run of a few steps: its state is a chain of hashes, saved when it is asked to end, and read when it begins.
TRAINER = """
import hashlib, json, os, signal, sys, time
from pathlib import Path
bucket, place = Path(os.environ["BUCKET"]), os.environ["FAKE_HOST"].split("-", 1)[1]
with open(bucket / f"starts-{place}", "a") as file:
    file.write(json.dumps([sys.argv[1:], os.environ.get("AWKWARD"), os.environ["JAXTRAIN_DISTRIBUTED"]]) + chr(10))
codes = json.loads((bucket / "codes").read_text()) if (bucket / "codes").exists() else {}
number = len((bucket / f"starts-{place}").read_text().splitlines())
path = bucket / f"state-{place}"
state = json.loads(path.read_text()) if path.exists() else {"step": 0, "hash": ""}
print("begins at step", state["step"], flush=True)
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
def save():
    path.with_suffix(".part").write_text(json.dumps(state))
    path.with_suffix(".part").replace(path)
def held():
    return (bucket / "hold").exists() and state["step"] >= int((bucket / "hold").read_text() or 0)
while state["step"] < STEPS:
    while held() and not asked:
        time.sleep(0.02)
    if asked:
        save()
        sys.exit(42)
    if str(number) in codes and state["step"] >= 2:
        sys.exit(codes[str(number)])
    state["step"] += 1
    state["hash"] = hashlib.sha256(f"{state['hash']} {state['step']} {place}".encode()).hexdigest()
    Path(os.environ["JAXTRAIN_HEARTBEAT"]).touch()
    save()
    print("step", state["step"], flush=True)
print("done", flush=True)
""".replace("STEPS", str(STEPS))


def undisturbed(place: str) -> str:
    chain = ""
    for step in range(1, STEPS + 1):
        chain = hashlib.sha256(f"{chain} {step} {place}".encode()).hexdigest()
    return chain


class Laptop:
    """A checkout, and a cloud to launch it in."""

    def __init__(self, folder: Path):
        self.cloud, self.code, self.bin = folder / "cloud", folder / "code", folder / "bin"
        for path in (self.cloud / "bucket", self.code, self.bin):
            path.mkdir(parents=True)
        (self.code / "trainer.py").write_text(TRAINER)
        (self.code / ".gitignore").write_text("secret\n")
        (self.code / "secret").write_text("not to be shipped")
        subprocess.run(["git", "init", "-q", str(self.code)], check=True)
        fake = Path(__file__).with_name("fake_gcloud.py").read_text()
        self.install("gcloud", f"#!{sys.executable} -IS\n{fake}")
        self.install("hostname", '#!/bin/sh\necho "$FAKE_HOST"\n')
        self.install("python3", f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
        self.script()

    def install(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(stat.S_IRWXU)

    def script(self, **wanted) -> None:
        (self.cloud / "script.json").write_text(json.dumps(wanted))

    def hold(self, step: int) -> None:
        """From this step on the job waits, until another step is said or the file is gone."""
        part = self.bucket("hold.part")
        part.write_text(str(step))
        part.replace(self.bucket("hold"))

    def bucket(self, name: str) -> Path:
        return self.cloud / "bucket" / name

    def argv(self, verb: str, *options: str, arguments: tuple[str, ...] = ()) -> list[str]:
        argv = [sys.executable, str(ROOT / "launch/tpu_vm.py"), verb, "job", "--zone", "us-east5-a", "--poll", "0.1"]
        if verb in ("up", "run"):
            argv += ["--type", "v5p-16", "--code", str(self.code), "--setup", "echo 'set  up' >> ../setups"]
            argv += ["--backoff", "0.1"]
        if verb == "run":
            argv += ["--program", "python3 trainer.py", "--worker_retries", "0", "--logs", str(self.cloud / "logs")]
        return [*argv, *options, *(["--", *(arguments or ("run",))] if verb == "run" else [])]

    @property
    def env(self) -> dict[str, str]:
        return os.environ | {"PATH": f"{self.bin}:{os.environ['PATH']}", "FAKE_CLOUD": str(self.cloud)}

    def launch(self, verb: str, *options: str, **more) -> subprocess.CompletedProcess[str]:
        argv = self.argv(verb, *options, **more)
        return subprocess.run(argv, env=self.env, capture_output=True, text=True, timeout=120)

    def calls(self, *words: str) -> list[list[str]]:
        path = self.cloud / "calls.jsonl"
        found = [json.loads(line)[2:] for line in path.read_text().splitlines()] if path.exists() else []
        return [argv for argv in found if argv[: len(words)] == list(words)]

    def starts(self, place: str = "0-0") -> list[list]:
        path = self.bucket(f"starts-{place}")
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def state(self, place: str = "0-0") -> dict:
        path = self.bucket(f"state-{place}")
        return json.loads(path.read_text()) if path.exists() else {"step": 0}

    def wait_for_step(self, step: int) -> None:
        end = time.monotonic() + 60
        while self.state()["step"] < step:
            assert time.monotonic() < end, f"no step {step}"
            time.sleep(0.05)

    def put_a_resource_there(self, **more) -> None:
        cloud = {"name": "job", "labels": {}, "nodes": ["job-0"], "states": ["ACTIVE"], "number": 1}
        (self.cloud / "cloud.json").write_text(json.dumps(cloud | more))


@pytest.fixture
def laptop(tmp_path):
    found = Laptop(tmp_path)
    yield found
    for lock in found.cloud.glob("workers/*/jaxtrain-launch/jobs/*/lock"):  # whatever a failed test left running
        with lock.open() as file, contextlib.suppress(ProcessLookupError, ValueError):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.kill(int(file.read()), signal.SIGKILL)


def test_preempted_in_the_middle_recreated_and_resumed(laptop):
    """Two slices of two workers: all of it, with arguments that no shell may touch."""
    laptop.hold(6)  # until it is preempted
    laptop.script(preempt_at=4)
    options = ["--spot", "--slices", "2", "--env", f"AWKWARD={AWKWARD[1]}", "--delete_after"]
    options += ["--before", 'echo "$FAKE_HOST it\'s" >> "$BUCKET/before"']
    done = laptop.launch("run", *options, arguments=tuple(AWKWARD))
    assert done.returncode == 0, done.stderr
    for place in ("0-0", "0-1", "1-0", "1-1"):
        assert laptop.state(place) == {"step": STEPS, "hash": undisturbed(place)}
        assert laptop.starts(place) == [[AWKWARD, AWKWARD[1], "1"]] * 2
    hosts = [f"vm{vm}-{i}-{j} it's" for vm in (1, 2) for i in (0, 1) for j in (0, 1)]
    assert sorted(laptop.bucket("before").read_text().splitlines()) == hosts
    assert (laptop.cloud / "last_codes").read_text().split()[:4] == ["42"] * 4
    (first, second), deletions = laptop.calls("queued-resources", "create"), laptop.calls("queued-resources", "delete")
    assert first == second and {"--spot", "--node-count=2", "--node-prefix=job"} <= set(first)
    assert "--labels=managed-by=jaxtrain,jaxtrain-job=job" in first
    assert [argv[2] for argv in deletions] == ["job", "job"]  # the preempted one, and the last when all was done
    assert "delete: preempted" in done.stderr and "finish: all workers are done" in done.stderr
    logs = {path.name: path.read_text() for path in (laptop.cloud / "logs").iterdir()}
    assert {name for name in logs if ".2.log" in name} == {f"slice{i}-worker{j}.2.log" for i in (0, 1) for j in (0, 1)}
    for text in (logs["slice0-worker0.2.log"], logs["slice1-worker1.2.log"]):
        lines = [line for line in text.splitlines() if not line.startswith("launch: ")]
        begin = int(lines[0].removeprefix("begins at step "))
        assert begin >= 4 and lines[1:] == [*(f"step {n}" for n in range(begin + 1, STEPS + 1)), "done"]
    assert f"step {STEPS}\ndone\n" in done.stdout


def test_ctrl_c_leaves_the_job_running_and_run_attaches_again(laptop):
    laptop.hold(2)
    watching = subprocess.Popen(laptop.argv("run"), env=laptop.env, stderr=subprocess.PIPE, text=True, process_group=0)
    laptop.wait_for_step(2)
    os.killpg(watching.pid, signal.SIGINT)
    assert "the job, if started, goes on" in watching.communicate(timeout=60)[1]
    assert watching.returncode == 130
    laptop.hold(5)
    laptop.wait_for_step(5)

    shown = json.loads(laptop.launch("status", "--json").stdout)
    assert (shown["state"], shown["ours"]) == ("ACTIVE", True)
    assert shown["nodes"] == [{"name": "job-0", "state": "READY", "workers": 2}]
    for worker, name in zip(shown["workers"], ["vm1-0-0", "vm1-0-1"], strict=True):
        assert (worker["worker"], worker["state"], worker["generation"], worker["code"]) == (name, "running", 1, None)
        assert 0 <= worker["heartbeat_age"] < 30 and 0 <= worker["beat_age"] < 30
        assert worker["last_line"].startswith("step ")
    text = laptop.launch("status").stdout
    assert "job-0: READY, 2 workers" in text and "vm1-0-1: running, generation 1" in text
    other = laptop.launch("run", arguments=("another",))
    assert other.returncode == 43 and "another job" in other.stderr

    laptop.bucket("hold").unlink()
    again = laptop.launch("run")
    assert again.returncode == 0, again.stderr
    assert len(laptop.starts("0-0")) == len(laptop.starts("0-1")) == 1
    assert laptop.state()["hash"] == undisturbed("0-0")
    assert len(laptop.calls("queued-resources", "create")) == len(laptop.calls("queued-resources", "scp")) == 1
    assert laptop.calls("queued-resources", "delete") == []

    one = laptop.launch("logs", "--worker", "1")
    assert one.stdout.startswith("begins at step 0\n") and one.stdout.endswith("done\n")
    out = laptop.cloud / "collected"
    assert laptop.launch("logs", "--out", str(out)).returncode == 0
    assert sorted(path.name for path in out.iterdir()) == ["slice0-worker0.1.log", "slice0-worker1.1.log"]
    assert laptop.launch("down").returncode == 0
    assert not (laptop.cloud / "cloud.json").exists() and list((laptop.cloud / "workers").iterdir()) == []


def test_ctrl_c_while_workers_are_started_leaves_none_out(laptop):
    laptop.script(slow="start")
    watching = subprocess.Popen(laptop.argv("run"), env=laptop.env, stderr=subprocess.PIPE, text=True, process_group=0)
    end = time.monotonic() + 60
    while not (laptop.cloud / "slow").exists() and time.monotonic() < end:
        time.sleep(0.02)
    os.killpg(watching.pid, signal.SIGINT)
    log = watching.communicate(timeout=60)[1]
    assert watching.returncode == 130 and "ends after this step (start)" in log
    statuses = laptop.cloud.glob("workers/*/jaxtrain-launch/jobs/job/status.json")
    assert [json.loads(path.read_text())["generation"] for path in statuses] == [1, 1]


def test_a_failure_is_retried_a_fault_is_not(laptop):
    """First start: 70 on both workers; second: 43.  What the cloud fails at in between is tried again, too."""
    laptop.bucket("codes").write_text(json.dumps({"1": 70, "2": 43}))
    fail = {"queued-resources create": ["RESOURCE_EXHAUSTED: no quota"], "queued-resources scp": ["cut off"]}
    fail |= {"set_up": ["cut off"], "status": ["", "cut off"], "log": ["cut off"]}
    fail["queued-resources describe"] = ["UNAVAILABLE: come again"]
    laptop.script(fail=fail)
    done = laptop.launch("run")
    assert done.returncode == 43, done.stderr
    assert len(laptop.starts("0-0")) == len(laptop.starts("0-1")) == 2
    assert "failure 4 of at most 5, exit code 70" in done.stderr  # create, scp, set-up, and the job's
    assert "give_up: a fault of configuration or data" in done.stderr
    assert laptop.calls("queued-resources", "delete") == []
    setups = (laptop.cloud / "workers/vm1-0-0/jaxtrain-launch/code/setups").read_text()
    assert setups == "set  up\n"
    laptop.bucket("codes").unlink()  # what was wrong with the data is put right: asked again, it runs
    again = laptop.launch("run")
    assert again.returncode == 0, again.stderr
    assert "start: asked for again after exit code 43" in again.stderr
    assert laptop.state()["hash"] == undisturbed("0-0") and len(laptop.starts()) == 3


def test_failures_end_at_the_limit_with_the_last_code(laptop):
    laptop.bucket("codes").write_text(json.dumps({str(n): 70 for n in range(1, 9)}))
    done = laptop.launch("run", "--restarts", "1")
    assert done.returncode == 70 and "2 failures, the last with exit code 70" in done.stderr
    assert len(laptop.starts()) == 2


@pytest.mark.parametrize(("refused", "code"), [(1, 0), (2, 1)])
def test_a_request_that_fails_is_made_again_up_to_the_limit(refused, code, laptop):
    laptop.script(refused=refused)
    done = laptop.launch("run", "--restarts", "1")
    assert done.returncode == code, done.stderr
    assert "delete: the request has failed" in done.stderr and ("give_up: 2 failures" in done.stderr) == bool(code)
    assert len(laptop.calls("queued-resources", "create")) == 2


def test_another_job_is_replaced_when_asked(laptop):
    laptop.hold(1)
    watching = subprocess.Popen(laptop.argv("run"), env=laptop.env, stderr=subprocess.DEVNULL, process_group=0)
    laptop.wait_for_step(1)
    os.killpg(watching.pid, signal.SIGINT)
    watching.wait(60)
    argv = laptop.argv("run", "--replace", arguments=("other",))
    replacing = subprocess.Popen(argv, env=laptop.env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 60
    while len(laptop.starts()) < 2 and time.monotonic() < end:
        time.sleep(0.05)
    laptop.bucket("hold").unlink()
    assert "stop: another job" in replacing.communicate(timeout=60)[1] and replacing.returncode == 0
    assert [start[0] for start in laptop.starts()] == [["run"], ["other"]]


def test_up_sets_up_once_for_each_hash_and_starts_nothing(laptop):
    setups = laptop.cloud / "workers/vm1-0-0/jaxtrain-launch/code/setups"
    for _ in range(2):
        assert laptop.launch("up").returncode == 0
        assert setups.read_text() == "set  up\n"
    other = laptop.cloud / "workers/vm1-0-1/jaxtrain-launch/code"
    next(other.glob("*/.ready")).unlink()  # as if its set-up had been cut off: the others are not set up again
    assert laptop.launch("up").returncode == 0
    assert (setups.read_text(), (other / "setups").read_text()) == ("set  up\n", "set  up\n" * 2)
    (laptop.code / "secret").write_text("changed")
    assert laptop.launch("up").returncode == 0
    assert setups.read_text() == "set  up\n"
    (laptop.code / "new file.gin").write_text("x = 1")
    extra = laptop.cloud / "mine.gin"
    extra.write_text("y = 2")
    assert laptop.launch("up", "--file", str(extra)).returncode == 0
    assert setups.read_text() == "set  up\nset  up\n"
    assert laptop.starts() == []
    shipped = [
        {str(path.relative_to(code)) for path in code.rglob("*")} for code in setups.parent.iterdir() if code.is_dir()
    ]
    assert {".ready", ".gitignore", ".launch", ".launch/supervise.py", "trainer.py"} in shipped
    assert {
        ".ready",
        ".gitignore",
        ".launch",
        ".launch/supervise.py",
        "trainer.py",
        "new file.gin",
        "mine.gin",
    } in shipped


@pytest.mark.parametrize("labels", [{}, {"managed-by": "jaxtrain", "jaxtrain-job": "other"}, {"jaxtrain-job": "job"}])
@pytest.mark.parametrize("states", [["ACTIVE"], ["SUSPENDED"], ["FAILED"]])
def test_what_is_not_labelled_is_never_touched(labels, states, laptop):
    laptop.put_a_resource_there(labels=labels, states=states)
    for verb in ("run", "down"):
        done = laptop.launch(verb)
        assert done.returncode == 43 and "left alone" in done.stderr
    assert json.loads(laptop.launch("status", "--json").stdout)["ours"] is False
    verbs = {argv[1] for argv in laptop.calls("queued-resources")}
    assert verbs == {"describe"}


def test_what_would_be_refused_again_is_not_asked_again(laptop):
    laptop.script(fail={"queued-resources create": ["INVALID_ARGUMENT: no such accelerator"]})
    done = laptop.launch("run")
    assert done.returncode == 43 and "no such accelerator" in done.stderr
    assert len(laptop.calls("queued-resources", "create")) == 1


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--type", "v5p"], "expected a kind and a size"),
        (["--type", "v99-8"], "give --runtime"),
        (["--slices", "0"], "--slices must be at least 1"),
        (["--env", "A"], "expected NAME=VALUE"),
        (["--file", "/no/such"], "no such file"),
        (["--code", "/"], "not a git checkout"),
        (["--poll", "0"], "above 0"),
        (["--spot", "--reserved"], "not allowed with"),
        (["--restarts", "-1"], "at least 0"),
    ],
)
def test_wrong_options_are_refused_before_any_call(options, complaint, laptop):
    done = laptop.launch("run", *options)
    assert done.returncode == 43 and complaint in done.stderr, done.stderr
    assert laptop.calls() == []


def test_without_gcloud_it_says_where_to_get_it(laptop):
    laptop.bin.joinpath("gcloud").unlink()
    git = Path(shutil.which("git")).resolve()
    (laptop.bin / "git").symlink_to(git)
    env = laptop.env | {"PATH": str(laptop.bin)}
    done = subprocess.run(laptop.argv("run"), env=env, capture_output=True, text=True)
    assert done.returncode == 43 and "gcloud is not installed" in done.stderr


def test_the_hash_is_of_contents_not_of_times_or_owners(laptop, tmp_path, monkeypatch):
    first, archive = pack(laptop.code, [], tmp_path)
    content = archive.read_bytes()
    os.utime(laptop.code / "trainer.py", (1, 1))
    monkeypatch.setattr("time.time", lambda: 1e9)
    again, archive = pack(laptop.code, [], tmp_path)
    assert (again, archive.read_bytes()) == (first, content)
    (laptop.code / "trainer.py").chmod(0o755)
    executable = pack(laptop.code, [], tmp_path)[0]
    (laptop.code / "link").symlink_to("trainer.py")
    linked = pack(laptop.code, [], tmp_path)[0]
    assert len({first, executable, linked}) == 3


def test_the_argument_lists():
    slices = Slices("job", "z", "p", "v5p-128", "image", 1, reserved=True, iap=True, valid_until="6h", network="n")
    argv = slices.create_command()
    assert argv[:6] == ["gcloud", "compute", "tpus", "queued-resources", "create", "job"]
    assert {"--zone=z", "--project=p", "--node-id=job-0", "--reserved", "--valid-until-duration=6h"} <= set(argv)
    assert not [part for part in argv if part.startswith(("--node-count", "--spot"))]
    assert "--tunnel-through-iap" in slices.ssh_command("x") and "--tunnel-through-iap" not in argv
    assert slices.ssh_command("a b", "1", "3")[-2:] == ["job", "--command=a b"]
    remote = Remote("job", "hash", "true")
    words = shlex.split(remote.supervise("start", "--env", f"A={AWKWARD[1]}"))
    assert words[-1] == f"A={AWKWARD[1]}"


def test_broken_lines_are_no_answers():
    text = 'Using ssh batch size\n{"worker": "a", "state": "none"}\n{"worker": "b"{"worker": "c"}\n[1]\n"x"\n'
    assert list(answers(text)) == ["a"]
