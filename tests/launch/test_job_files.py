"""What ``slurm.py`` and ``gke.py`` write, read back: by bash with a fake ``srun``, and by a reader of JSON."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import slurm

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
AWKWARD = ["run", 'it\'s "so"  $HOME $(id) `id` \\ *;&|\n#é', "", "--", "--nodes"]
SLURM = ["--nodes", "2", "--gpus_per_node", "4", "--time", "1:00:00"]
GKE = ["--kind", "v5p", "--topology", "4x4x4", "--image", "repo/image:1"]


def write(script: str, folder: Path, *options: str, command: list[str] = AWKWARD) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, str(LAUNCH / script), "job", *options, "--", *command]
    return subprocess.run(argv, cwd=folder, capture_output=True, text=True)


# Records its arguments and environment; exits with the next code of the file "codes".
SRUN = """#!{python} -S
import json, os, signal, sys, time
with open("calls", "a") as file:
    file.write(json.dumps([sys.argv[1:], os.environ["JAXTRAIN_DISTRIBUTED"], os.environ.get("A")]) + "\\n")
codes = open("codes").read().split()
open("codes", "w").write(" ".join(codes[1:]))
if codes[0] == "wait":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(42))
    open("waiting", "w").write(str(os.getpid()))
    time.sleep(30)
    sys.exit(1)
sys.exit(int(codes[0]))
"""


@pytest.fixture
def cluster(tmp_path):
    """A folder with a fake ``srun`` and ``scontrol``, and a function that runs the batch file there."""
    (tmp_path / "bin").mkdir()
    fakes = {"srun": SRUN.replace("{python}", sys.executable), "scontrol": '#!/bin/sh\necho "$@" >> requeued\n'}
    for name, text in (fakes | {"sleep": '#!/bin/sh\necho "$1" >> slept\n'}).items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def sbatch(cluster: Path, codes: str, *options: str, terminate: bool = False):
    """(exit code, calls of srun, pauses, requeued, stderr); terminate: SIGTERM to all while srun runs."""
    done = write("slurm.py", cluster, *SLURM, *options)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "sbatch job.sbatch\n"
    (cluster / "codes").write_text(codes)
    assert subprocess.run(["bash", "-n", "job.sbatch"], cwd=cluster).returncode == 0
    env = {"PATH": f"{cluster / 'bin'}:/usr/bin:/bin", "SLURM_JOB_ID": "7"}
    ending = "bash job.sbatch & p=$!; until [ -s waiting ]; do /bin/sleep 0.05; done; kill -TERM $p; /bin/sleep 0.2; "
    ending += "kill -TERM $(cat waiting); wait $p"
    argv = ["bash", "-c", ending] if terminate else ["bash", "job.sbatch"]
    ran = subprocess.run(argv, cwd=cluster, env=env, capture_output=True, text=True, timeout=60)
    lines = {
        name: (cluster / name).read_text().splitlines() for name in ("slept", "requeued") if (cluster / name).exists()
    }
    calls = [json.loads(line) for line in (cluster / "calls").read_text().splitlines()]
    return ran.returncode, calls, lines.get("slept", []), lines.get("requeued", []), ran.stderr


def test_slurm_hands_the_command_over_as_it_is(cluster):
    options = ["--env", f"A={AWKWARD[1]}", "--program", "python -m 'my program'", "--folder", str(cluster)]
    code, calls, *_ = sbatch(cluster, "0", *options)
    assert code == 0
    assert calls == [[["--wait=120", "python", "-m", "my program", *AWKWARD], "1", AWKWARD[1]]]


def test_slurm_retries_failures_with_growing_pauses(cluster):
    code, calls, pauses, requeued, log = sbatch(cluster, "70 137 1 0", "--longest_wait", "50", "--retries", "3")
    assert (code, len(calls), pauses, requeued) == (0, 4, ["30", "50", "50"], [])
    assert "restart 1 of 3 in 30 s: exit code 70" in log


def test_slurm_gives_up(cluster):
    code, calls, pauses, requeued, log = sbatch(cluster, "70 71", "--retries", "1")
    assert (code, len(calls), pauses, requeued) == (71, 2, ["30"], [])
    assert "given up after 1 restarts: exit code 71" in log


def test_slurm_queues_a_preempted_job_again_and_leaves_a_fault(cluster):
    assert sbatch(cluster, "42")[:4:3] == (42, ["requeue 7"])
    (cluster / "calls").unlink()
    (cluster / "requeued").unlink()
    code, calls, pauses, requeued, _ = sbatch(cluster, "43")
    assert (code, len(calls), pauses, requeued) == (43, 1, [], [])


def test_slurm_waits_for_what_saves_when_it_gets_a_signal_itself(cluster):
    code, calls, _, requeued, _ = sbatch(cluster, "wait", terminate=True)
    assert (code, len(calls), requeued) == (42, 1, ["requeue 7"])


def test_slurm_header(tmp_path):
    options = ["--partition", "gpu", "--account", "a", "--exclusive", "--signal_before", "120", "--cpus_per_task", "8"]
    write("slurm.py", tmp_path, *SLURM, *options, "--container", "img.sqsh", "--mounts", "/a:/b", "--out", "x.sh")
    text = (tmp_path / "x.sh").read_text()
    header = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", text, re.MULTILINE))
    assert header["nodes"] == "2" and header["ntasks-per-node"] == header["gpus-per-node"] == "4"
    assert header["signal"] == "TERM@120" and header["time"] == "1:00:00" and header["open-mode"] == "append"
    assert header["output"] == "job-%j.log" and {"requeue", "exclusive"} <= set(header) and "qos" not in header
    assert text.startswith("#!/bin/bash\n#SBATCH") and text.count("#SBATCH") == len(header)
    assert "srun --wait=120 --container-image=img.sqsh --container-mounts=/a:/b jaxtrain run" in text


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 5400), ("1:30", 90), ("2:00:00", 7200), ("1-12", 129600), ("1-0:30:05", 88205)]
)
def test_slurm_time_limits(text, seconds):
    assert slurm.seconds(text) == seconds


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--nodes", "0"], "at least 1"),
        (["--time", "soon"], "HOURS:MINUTES:SECONDS"),
        (["--time", "4"], "longer than --time"),
        (["--partition", "a b"], "no spaces"),
        (["--env", "A"], "NAME=VALUE"),
        (["--env", "A B=1"], "NAME=VALUE"),
        (["--mounts", "/a:/b"], "--container"),
        (["--retries", "-1"], "at least 0"),
        (["--gpus", "1"], "--gpus"),
    ],
)
def test_slurm_refuses(options, complaint, tmp_path):
    done = write("slurm.py", tmp_path, *SLURM, *options)
    assert done.returncode == 43 and complaint in done.stderr
    assert list(tmp_path.iterdir()) == []


def expanded(text: str) -> str:
    """As Kubernetes does it (third_party/forked/golang/expansion): $$ is $, $(NAME) a reference, $ else itself."""
    assert "$(" not in re.sub(r"\$\$", "", text), "a reference"
    return text.replace("$$", "$")


def test_gke_manifest(tmp_path):
    options = ["--slices", "2", "--spot", "--env", f"A={AWKWARD[1]}", "--queue", "q", "--service_account", "s"]
    done = write("gke.py", tmp_path, *GKE, *options, "--cluster", "c", "--max_restarts", "7")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "job.json").read_text())
    assert (found["apiVersion"], found["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert found["metadata"]["name"] == "job" and found["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "q"
    (slices,) = found["spec"]["replicatedJobs"]
    assert slices["replicas"] == 2
    job = slices["template"]["spec"]
    assert job["parallelism"] == job["completions"] == 16 and job["backoffLimit"] == 0
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never" and pod["serviceAccountName"] == "s"
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "4x4x4",
        "cloud.google.com/gke-spot": "true",
    }
    (container,) = pod["containers"]
    assert container["resources"] == {key: {"google.com/tpu": 4} for key in ("requests", "limits")}
    assert [expanded(word) for word in container["command"]] == ["jaxtrain", *AWKWARD]
    env = {pair["name"]: expanded(pair["value"]) for pair in container["env"]}
    assert env == {"JAXTRAIN_DISTRIBUTED": "1", "A": AWKWARD[1]}
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [43]}
    policy = found["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 7 and policy["rules"][0]["action"] == "FailJobSet"

    kubectl, _, xpk = done.stdout.partition("\n")
    assert shlex.split(kubectl) == ["kubectl", "apply", "-f", "job.json"]
    argv = shlex.split(xpk)
    assert argv[:3] == ["xpk", "workload", "create"]
    assert {"--tpu-type=v5p-128", "--num-slices=2", "--cluster=c", "--max-restarts=7"} <= set(argv)
    assert shlex.split(argv[argv.index("--command") + 1]) == ["jaxtrain", *AWKWARD]
    (codes,) = (part.split("=")[1] for part in argv if part.startswith("--restart-on-exit-codes="))
    restarts = {int(code) for code in codes.split(",")} | {42, *range(127, 256)}
    assert restarts == set(range(1, 256)) - {43}


@pytest.mark.parametrize(
    ("kind", "topology", "hosts", "chips", "name"),
    [
        ("v5e", "16x16", 64, 4, "v5litepod-256"),
        ("v6e", "1x1", 1, 1, "v6e-1"),
        ("v4", "2x2x1", 1, 4, "v4-8"),
        ("tpu7x", "4x4x4", 16, 4, "tpu7x-128"),
    ],
)
def test_gke_hosts_of_a_slice(kind, topology, hosts, chips, name, tmp_path):
    done = write("gke.py", tmp_path, "--kind", kind, "--topology", topology, "--image", "i", "--out", "m.yaml")
    job = json.loads((tmp_path / "m.yaml").read_text())["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["parallelism"] == hosts
    assert job["template"]["spec"]["containers"][0]["resources"]["limits"]["google.com/tpu"] == chips
    assert f"--tpu-type={name} " in done.stdout


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--kind", "v3"], "--kind"),
        (["--topology", "4x4"], "3 dimensions"),
        (["--topology", "4x4xfour"], "3 dimensions"),
        (["--topology", "3x3x1"], "do not fill hosts"),
        (["--slices", "0"], "at least 1"),
        (["--env", "A"], "NAME=VALUE"),
        (["--grace", "0"], "at least 1"),
    ],
)
def test_gke_refuses(options, complaint, tmp_path):
    done = write("gke.py", tmp_path, *GKE, *options)
    assert done.returncode == 43 and complaint in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_gke_names(tmp_path):
    argv = [sys.executable, str(LAUNCH / "gke.py"), "No_Name", *GKE, "--", "x"]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 43 and "small letters" in done.stderr
