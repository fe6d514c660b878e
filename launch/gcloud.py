"""The slices of a job in Google Cloud, through the ``gcloud`` command: argument lists, never a shell."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bundle import LAUNCH
from state import Worker

HOME = "jaxtrain-launch"  # folder in the login folder of every worker
SUPERVISE = f"{HOME}/supervise.py"
# What gcloud says of a request that would be refused again: google.rpc.Code, and its own parser of arguments.
REFUSALS = ("INVALID_ARGUMENT", "PERMISSION_DENIED", "UNAUTHENTICATED", "unrecognized arguments", "ERROR: (gcloud.auth")
REFUSALS += ("argument --", "Invalid choice", "do not currently have an active account", "required property [project]")
GONE = ("PREEMPTED", "TERMINATED")  # states of a node that does not come back by itself


class Refused(ValueError):
    """What the cloud would refuse again: a fault of the request."""


@dataclass(frozen=True)
class Slices:
    """One queued resource of ``count`` slices, and how its workers are reached."""

    name: str
    zone: str
    project: str | None = None
    accelerator_type: str = ""
    runtime_version: str = ""
    count: int = 1
    spot: bool = False
    reserved: bool = False
    valid_until: str | None = None
    service_account: str | None = None
    network: str | None = None
    subnetwork: str | None = None
    internal_ips: bool = False
    iap: bool = False

    @property
    def labels(self) -> dict[str, str]:
        return {"managed-by": "jaxtrain", "jaxtrain-job": self.name}

    def command(self, *words: str) -> list[str]:
        where = [f"--zone={self.zone}", *([f"--project={self.project}"] if self.project else []), "--quiet"]
        return ["gcloud", "compute", "tpus", *words, *where]

    def create_command(self) -> list[str]:
        argv = self.command("queued-resources", "create", self.name)
        argv += [f"--accelerator-type={self.accelerator_type}", f"--runtime-version={self.runtime_version}"]
        # With --node-count the nodes are called PREFIX-0, PREFIX-1, ..., so a single one is called alike.
        several = ["--node-count=" + str(self.count), f"--node-prefix={self.name}"]
        argv += several if self.count > 1 else [f"--node-id={self.name}-0"]
        argv += ["--labels=" + ",".join(f"{key}={value}" for key, value in self.labels.items())]
        argv += ["--scopes=https://www.googleapis.com/auth/cloud-platform"]  # what it may do, its account's roles say
        chosen = {"spot": self.spot, "reserved": self.reserved, "internal-ips": self.internal_ips}
        argv += [f"--{flag}" for flag, on in chosen.items() if on]
        values = {"valid-until-duration": self.valid_until, "service-account": self.service_account}
        values |= {"network": self.network, "subnetwork": self.subnetwork}
        return argv + [f"--{flag}={value}" for flag, value in values.items() if value]

    def delete_command(self) -> list[str]:
        return [*self.command("queued-resources", "delete", self.name), "--force", "--async"]

    def ssh_command(self, remote: str, node: str = "all", worker: str = "all") -> list[str]:
        """``remote`` is what the worker's shell reads."""
        return [*self._reach("ssh", node, worker), self.name, f"--command={remote}"]

    def scp_command(self, source: Path) -> list[str]:
        return [*self._reach("scp", "all", "all"), str(source), f"{self.name}:"]

    def _reach(self, verb: str, node: str, worker: str) -> list[str]:
        how = ["--tunnel-through-iap"] if self.iap else ["--internal-ip"] if self.internal_ips else []
        return [*self.command("queued-resources", verb), f"--node={node}", f"--worker={worker}", *how]

    def describe(self) -> dict[str, Any] | None:
        """The queued resource as the API gives it; None where there is none.  Raises OSError without an answer."""
        done = call([*self.command("queued-resources", "describe", self.name), "--format=json"])
        if done.returncode == 0:
            return json.loads(done.stdout)
        if "NOT_FOUND" in done.stderr:
            return None
        raise failure("describe", done)

    def is_ours(self, found: dict[str, Any]) -> bool:
        """Whether every node that was asked for carries this job's labels."""
        nodes = found.get("tpu", {}).get("nodeSpec", [])
        owned = [self.labels.items() <= node.get("node", {}).get("labels", {}).items() for node in nodes]
        return bool(owned) and all(owned)

    def nodes(self) -> list[dict[str, Any]]:
        """The nodes of the job, in the order of their numbers.  Raises OSError without an answer."""
        done = call([*self.command("tpu-vm", "list"), "--format=json"])
        if done.returncode:
            raise failure("list", done)
        found = [node for node in json.loads(done.stdout) if self.labels.items() <= node.get("labels", {}).items()]
        return sorted(found, key=lambda node: int(node["name"].rsplit("-", 1)[1]))


def workers_of(node: dict[str, Any]) -> int:
    """Hosts of a slice.  A host with several networks has an endpoint in each."""
    return len(node.get("networkEndpoints", [])) // max(1, len(node.get("networkConfigs", [])))


def call(argv: Sequence[str], timeout: float = 300.0) -> subprocess.CompletedProcess[str]:
    """Runs gcloud; what takes longer than ``timeout`` seconds is ended and counts as failed.

    In a session of its own: a terminal's Ctrl-C would otherwise end it between two workers.
    """
    env = os.environ | {"CLOUDSDK_CORE_DISABLE_PROMPTS": "1"}
    try:
        return subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout, env=env, encoding="utf-8",
            errors="surrogateescape", start_new_session=True,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(argv, 124, "", f"no end after {timeout:g} s")
    except FileNotFoundError:
        raise Refused("gcloud is not installed here: https://cloud.google.com/sdk/docs/install") from None


def failure(what: str, done: subprocess.CompletedProcess[str]) -> Exception:
    """What to raise: ``Refused`` where another try would end alike, else OSError."""
    text = done.stderr.strip()[-2000:]
    message = f"gcloud {what}: exit code {done.returncode}: {text}"
    return Refused(message) if any(word in done.stderr for word in REFUSALS) else OSError(message)


@dataclass(frozen=True)
class Remote:
    """The shell commands that workers run; every one may be repeated."""

    name: str
    bundle: str
    setup: str

    @property
    def code(self) -> str:
        return f"{HOME}/code/{self.bundle}"

    @property
    def ready(self) -> str:
        return f"{self.code}/.ready"

    def supervise(self, verb: str, *options: str) -> str:
        return shlex.join(["python3", SUPERVISE, verb, "--folder", f"{HOME}/jobs/{self.name}", *options])

    def probe(self) -> str:
        """Prints one JSON object on one line; a worker that was never set up has only its name to tell."""
        known = self.supervise("status", "--ready", self.ready) + ' --worker "$(hostname)"'
        bare = """printf '\\n{"worker": "%s"}\\n' "$(hostname)\""""
        return f"if [ -e {SUPERVISE} ]; then {known}; else {bare}; fi"

    def set_up(self, archive: Path) -> str:
        """Unpacks the archive, which lies in the login folder, and runs ``setup`` in it, once for each hash."""
        code, packed = shlex.quote(self.code), shlex.quote(archive.name)
        fresh = [f"rm -rf {code}", f"mkdir {code}", f"tar -xzf {packed} -C {code}"]
        fresh += [f"(cd {code}; sh -c {shlex.quote(self.setup)})"]
        fresh += [f"cp {code}/{LAUNCH}/supervise.py {SUPERVISE}.new", f"mv {SUPERVISE}.new {SUPERVISE}"]
        fresh += [f"touch {shlex.quote(self.ready)}"]
        steps = ["set -eu", f"mkdir -p {HOME}/code", f"exec 9>{HOME}/setup.lock", "flock 9"]
        steps += [f"if [ ! -e {shlex.quote(self.ready)} ]; then {'; '.join(fresh)}; fi", f"rm -f {packed}"]
        return "; ".join(steps)


def answers(text: str) -> dict[str, dict[str, Any]]:
    """The workers' answers to ``probe`` among whatever else ssh prints.  A broken line is no answer."""
    found = {}
    for line in text.splitlines():
        try:
            answer = json.loads(line)
        except ValueError:
            continue
        if isinstance(answer, dict) and "worker" in answer:
            found[answer["worker"]] = answer
    return found


def as_worker(answer: dict[str, Any]) -> Worker:
    names = ("state", "job", "generation", "failures", "code", "ended_for")
    given = {name: answer[name] for name in names if answer.get(name) is not None}
    if given.get("state") == "waiting":  # between two attempts of its own
        given["state"] = "running"
    return Worker(ready=bool(answer.get("ready")), **given)
