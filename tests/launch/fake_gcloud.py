"""Stands in for ``gcloud``: records its arguments, walks through scripted states, runs what workers are told to run.

Its folder, ``$FAKE_CLOUD``: ``calls.jsonl`` (every argument list), ``cloud.json`` (the queued resource, where there is
one), ``script.json`` (what the test wants to happen), ``workers/HOST`` (the login folder of each worker).
"""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(os.environ["FAKE_CLOUD"])
CLOUD, SCRIPT, WORKERS = ROOT / "cloud.json", ROOT / "script.json", ROOT / "workers"
GRANTED = ["ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
WORKERS_OF_A_SLICE = 2


def main(argv):
    with open(ROOT / "calls.jsonl", "a") as file:
        file.write(json.dumps(argv) + "\n")
    assert argv[:2] == ["compute", "tpus"], argv
    (group, verb), rest = argv[2:4], argv[4:]
    words = [word for word in rest if not word.startswith("--")]
    flags = {key: value for key, _, value in (word[2:].partition("=") for word in rest if word.startswith("--"))}
    assert flags["zone"] == "us-east5-a", "no zone"
    script = json.loads(SCRIPT.read_text())
    remote = [word for word in ("start", "status", "log", "stop") if f"supervise.py {word} " in argv[-1]]
    asked = "set_up" if "setup.lock" in argv[-1] else (remote or [f"{group} {verb}"])[0]
    failing = script.get("fail", {}).get(asked, [])
    if failing:
        message = failing.pop(0)
        SCRIPT.write_text(json.dumps(script))
        if message:
            fail(message)
    if asked == script.get("slow"):
        (ROOT / "slow").touch()
        time.sleep(1)
    cloud = json.loads(CLOUD.read_text()) if CLOUD.exists() else None
    does = {"create": create, "describe": describe, "delete": delete, "list": show_nodes, "scp": scp, "ssh": ssh}
    does[verb](cloud, script, words, flags)


def fail(message):
    sys.exit(f"ERROR: (gcloud.compute.tpus) {message}")


def save(cloud):
    CLOUD.write_text(json.dumps(cloud))


def create(cloud, script, words, flags):
    if cloud:
        fail("ALREADY_EXISTS: a queued resource of this name")
    count = int(flags.get("node-count", 1))
    names = [f"{flags['node-prefix']}-{i}" for i in range(count)] if count > 1 else [flags["node-id"]]
    labels = dict(pair.split("=") for pair in flags["labels"].split(","))
    counter = ROOT / "created"
    number = len(counter.read_text()) + 1 if counter.exists() else 1
    counter.write_text("x" * number)
    states = ["ACCEPTED", "FAILED"] if number <= script.get("refused", 0) else [*GRANTED]
    save({"name": words[0], "labels": labels, "nodes": names, "states": states, "number": number})


def describe(cloud, script, words, flags):
    """Every look moves on to the next state."""
    if cloud and cloud["states"] == ["ABSENT"]:
        CLOUD.unlink()
        cloud = None
    if not cloud or cloud["name"] != words[0]:
        fail("NOT_FOUND: Resource was not found")
    state = cloud["states"][0]
    if len(cloud["states"]) > 1:
        cloud["states"].pop(0)
    if state == "ACTIVE":
        for host in hosts(cloud):
            (WORKERS / host).mkdir(parents=True, exist_ok=True)
        preempt = script.get("preempt_at")
        if preempt and cloud["number"] == 1 and reached(preempt):
            state, cloud["states"] = "SUSPENDING", ["SUSPENDED"]
            take_away(hosts(cloud))
            (ROOT / "bucket/hold").unlink()
    save(cloud)
    spec = [{"nodeId": name, "node": {"labels": cloud["labels"]}} for name in cloud["nodes"]]
    print(json.dumps({"name": cloud["name"], "state": {"state": state}, "tpu": {"nodeSpec": spec}}))


def reached(step):
    states = [json.loads(path.read_text())["step"] for path in (ROOT / "bucket").glob("state-*")]
    return bool(states) and max(states) >= step


def hosts(cloud, node="all", worker="all"):
    found = []
    for number in range(len(cloud["nodes"])):
        for index in range(WORKERS_OF_A_SLICE):
            if node in ("all", str(number)) and worker in ("all", str(index)):
                found.append(f"vm{cloud['number']}-{number}-{index}")
    return found


def take_away(names):
    """As when a VM shuts down: SIGTERM to all that runs on it, then it is gone with its disk."""
    locks = [lock.open() for name in names for lock in (WORKERS / name).glob("jaxtrain-launch/jobs/*/lock")]
    for lock in locks:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # its supervisor runs
            os.kill(int(lock.read()), signal.SIGTERM)
    for lock in locks:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until the supervisor has ended
    for name in names:
        for status in (WORKERS / name).glob("jaxtrain-launch/jobs/*/status.json"):
            with open(ROOT / "last_codes", "a") as file:
                file.write(f"{json.loads(status.read_text())['code']}\n")
        shutil.rmtree(WORKERS / name)


def delete(cloud, script, words, flags):
    assert "force" in flags and cloud["name"] == words[0]
    if cloud["states"][0] == "ACTIVE":
        take_away(hosts(cloud))
    cloud["states"] = ["DELETING", "ABSENT"]
    save(cloud)


def show_nodes(cloud, script, words, flags):
    where = "projects/p/locations/us-east5-a/nodes/"
    nodes = [{"name": where + "a-colleagues-7", "state": "READY", "networkEndpoints": [{}] * 4}]
    for name in reversed(cloud["nodes"]):
        endpoints = [{}] * WORKERS_OF_A_SLICE
        nodes.append({"name": where + name, "state": "READY", "labels": cloud["labels"], "networkEndpoints": endpoints})
    print(json.dumps(nodes))


def scp(cloud, script, words, flags):
    source, target = words
    assert target == f"{cloud['name']}:"
    for host in hosts(cloud, flags["node"], flags["worker"]):
        shutil.copy(source, WORKERS / host)


def ssh(cloud, script, words, flags):
    """Runs the command on all chosen workers at once, as the real one does."""
    running = []
    for host in hosts(cloud, flags["node"], flags["worker"]):
        env = {
            "PATH": os.environ["PATH"],
            "HOME": str(WORKERS / host),
            "FAKE_HOST": host,
            "BUCKET": str(ROOT / "bucket"),
        }
        argv = ["bash", "-c", flags["command"]]
        running.append(subprocess.Popen(argv, cwd=WORKERS / host, env=env, stdin=subprocess.DEVNULL))
    codes = [process.wait() for process in running]
    if any(codes):
        fail("a command has failed")


if __name__ == "__main__":
    with open(ROOT / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        main(sys.argv[1:])
