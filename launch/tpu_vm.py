"""TPU slices in Google Cloud: create them, train on them, watch, resume after preemption, delete.

    python launch/tpu_vm.py run NAME --zone us-east5-a --type v5p-128 --spot -- run RECIPE.gin --out /mnt/runs/NAME
    python launch/tpu_vm.py status NAME --zone us-east5-a
    python launch/tpu_vm.py logs NAME --zone us-east5-a --out DIR
    python launch/tpu_vm.py down NAME --zone us-east5-a

``run`` ships this checkout, starts the job on every worker under a supervisor that needs no connection, and watches;
Ctrl-C ends the watching only, and the same command again takes it up.  ``up`` stops before starting the job.  Nothing
is deleted that does not carry this job's labels.  Exit codes: the job's; 43 for what would be refused again; 130
after Ctrl-C.  Standard library only; needs an installed ``gcloud``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bundle import pack
from gcloud import Remote, Slices, answers, call, workers_of
from state import LOST, Spec
from supervise import FAULT, Parser, Policy, say
from watch import Watch, show

INTERRUPTED = 130
# Images of TPU VMs come with an older Python than jaxtrain needs; uv brings one along.
SETUP = "python3 -m pip install --user --quiet uv && python3 -m uv venv --quiet --python 3.12 venv"
SETUP += " && python3 -m uv pip install --quiet --python venv/bin/python '.[tpu]'"


def status(watch: Watch, as_json: bool) -> int:
    """Prints the resource, its nodes and what every worker says."""
    slices = watch.slices
    found = slices.describe()
    report: dict[str, Any] = {"name": slices.name, "state": "ABSENT", "ours": False, "nodes": [], "workers": []}
    if found is not None:
        report |= {"state": found["state"]["state"], "ours": slices.is_ours(found)}
    if report["ours"]:
        nodes = slices.nodes() if report["state"] == "ACTIVE" else []
        report["nodes"] = [
            {"name": node["name"].rsplit("/", 1)[-1], "state": node.get("state"), "workers": workers_of(node)}
            for node in nodes
        ]
        if nodes and all(node["state"] == "READY" for node in report["nodes"]):
            told = answers(call(slices.ssh_command(watch.remote.probe())).stdout)
            report["workers"] = [answer for _, answer in sorted(told.items())]
    if as_json:
        sys.stdout.write(json.dumps(report) + "\n")
        return 0
    lines = [f"{slices.name}: {report['state']}" + ("" if report["ours"] or found is None else ", not ours")]
    lines += [f"  {node['name']}: {node['state']}, {node['workers']} workers" for node in report["nodes"]]
    for answer in report["workers"]:
        shown = [f"  {answer['worker']}: {answer.get('state', 'not set up')}"]
        shown += [f"{key} {answer[key]}" for key in ("generation", "attempt", "code") if answer.get(key) is not None]
        ages = {"beat_age": "supervisor", "heartbeat_age": "job"}
        shown += [f"{name} heard {answer[key]:.0f} s ago" for key, name in ages.items() if answer.get(key) is not None]
        lines += [", ".join(shown), *([f"    {answer['last_line']}"] if answer.get("last_line") else [])]
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


def logs(watch: Watch, args: argparse.Namespace) -> int:
    """Shows one worker's log, or writes all of them into a folder."""
    if args.out:
        watch.logs = args.out
        watch.sizes = [workers_of(node) for node in watch.slices.nodes()]
        if args.out.exists() and any(args.out.iterdir()):
            raise ValueError(f"--out {args.out}: the folder is not empty")
        watch.collect(all_of_them=True)
        return 0
    while True:
        found = watch.new_log(args.slice, args.worker)
        if found is not None:
            show(found[2])
        elif not args.follow:
            raise OSError(f"slice {args.slice}, worker {args.worker} does not answer")
        if not args.follow:
            return 0
        time.sleep(args.poll)


def parser() -> Parser:
    top = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    verbs = top.add_subparsers(dest="verb", required=True, metavar="up|run|status|logs|down")
    texts = {"up": "create the slices and set them up", "run": "and train on them", "status": "say how it stands"}
    texts |= {"logs": "show or collect the workers' logs", "down": "delete the slices"}
    for verb, text in texts.items():
        one = verbs.add_parser(verb, help=text, description=text, allow_abbrev=False)
        add = one.add_argument
        add("name", metavar="NAME", help="of the job and its queued resource: small letters, digits and hyphens")
        add("--zone", required=True)
        add("--project", help="default: gcloud's")
        add("--poll", type=positive, default=Spec.poll, metavar="S", help=f"between two looks (default: {Spec.poll:g})")
        if verb != "down":
            add("--iap", action="store_true", help="reach the workers through Identity-Aware Proxy")
            add("--internal_ips", action="store_true", help="workers have no address outside the network")
        if verb in ("up", "run"):
            add_request(one)
        if verb == "run":
            add_job(one)
        if verb == "status":
            add("--json", action="store_true")
        if verb == "logs":
            add("--slice", type=int, default=0, metavar="N")
            add("--worker", type=int, default=0, metavar="N")
            add("--follow", action="store_true")
            add("--out", type=Path, metavar="DIR", help="write the logs of all workers into this new folder")
    return top


def add_request(one: argparse.ArgumentParser) -> None:
    add = one.add_argument
    add("--type", required=True, help="accelerator type of one slice: v5litepod-16, v5p-128, v6e-256, ...")
    add("--runtime", help="image of the workers (default: the one for the type)")
    add("--slices", type=int, default=1, metavar="N", help="slices joined by the data centre's network (default: 1)")
    kind = one.add_mutually_exclusive_group()
    kind.add_argument("--spot", action="store_true", help="cheaper, and taken away at any time")
    kind.add_argument("--reserved", action="store_true", help="from the project's reservation")
    add("--valid_until", metavar="DURATION", help="fail if not granted by then: 6h")
    add("--service_account", metavar="EMAIL", help="whose rights the workers have")
    add("--network")
    add("--subnetwork")
    add("--code", type=Path, default=Path(__file__).resolve().parents[1], metavar="DIR", help="git checkout to ship")
    add("--file", type=Path, action="append", default=[], metavar="PATH", help="put at its top too: your gin files")
    add("--setup", default=SETUP, metavar="COMMAND", help=f"run in the shipped folder, once a hash (default: {SETUP})")
    add("--restarts", type=count, default=Spec.restarts, metavar="N", help=f"after failures ({Spec.restarts})")
    add("--backoff", type=positive, default=Spec.backoff, metavar="S", help=f"doubles up to 15 min ({Spec.backoff:g})")
    add("--silence", type=positive, default=Spec.silence, metavar="S", help=f"until recreated ({Spec.silence:g})")


def add_job(one: argparse.ArgumentParser) -> None:
    add = one.add_argument
    add("--env", action="append", default=[], metavar="NAME=VALUE", help="environment of the job")
    add("--before", metavar="COMMAND", help="what a worker's shell runs before every start: mount a shared folder")
    add("--program", default="venv/bin/python -m jaxtrain.main", help="what to run, as a shell would read it")
    add("--worker_retries", type=count, default=3, metavar="N", help="restarts without asking here (3)")
    add("--hang_after", type=positive, default=Policy.hang_after, metavar="S", help=f"({Policy.hang_after:g})")
    add("--patience", type=positive, default=Spec.patience, metavar="S", help=f"for the last ({Spec.patience:g})")
    add("--replace", action="store_true", help="stop another job that runs there")
    add("--delete_after", action="store_true", help="delete the slices when the job has ended, well or not")
    add("--logs", type=Path, metavar="DIR", help="folder for the logs (default: ~/jaxtrain-logs/NAME)")


def positive(text: str) -> float:
    if not 0 < float(text) < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, found {text}")
    return float(text)


def count(text: str) -> int:
    if int(text) < 0:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 0, found {text}")
    return int(text)


# https://cloud.google.com/tpu/docs/runtimes
RUNTIMES = {"v4": "tpu-ubuntu2204-base", "v5litepod": "v2-alpha-tpuv5-lite", "v5p": "v2-alpha-tpuv5"}
RUNTIMES |= {"v6e": "v2-alpha-tpuv6e"}


def request(args: argparse.Namespace) -> Slices:
    """Raises ValueError for options that do not go together."""
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", args.name):
        raise ValueError(f"NAME {args.name!r}: expected at most 40 small letters, digits and hyphens, a letter first")
    reach = {"internal_ips": getattr(args, "internal_ips", False), "iap": getattr(args, "iap", False)}
    if args.verb not in ("up", "run"):
        return Slices(args.name, args.zone, args.project, **reach)
    kind = args.type.rsplit("-", 1)[0]
    if not re.fullmatch(r"[a-z0-9]+-[0-9]+", args.type):
        raise ValueError(f"--type {args.type!r}: expected a kind and a size, as v5p-128")
    if args.runtime is None and kind not in RUNTIMES:
        raise ValueError(f"--type {args.type}: no default image is known ({', '.join(RUNTIMES)}): give --runtime")
    if args.slices < 1:
        raise ValueError(f"--slices must be at least 1, found {args.slices}")
    return Slices(
        args.name, args.zone, args.project, args.type, args.runtime or RUNTIMES[kind], args.slices,
        spot=args.spot, reserved=args.reserved, valid_until=args.valid_until, service_account=args.service_account,
        network=args.network, subnetwork=args.subnetwork, **reach,
    )  # fmt: skip


def launch(args: argparse.Namespace, command: Sequence[str], folder: Path) -> int:
    slices = request(args)
    if args.verb in ("status", "logs", "down"):
        watch = Watch(slices, Remote(args.name, "none", ""), None, [], None)
        if args.verb == "down":
            return watch.until_the_end(Spec("down", "", poll=args.poll))
        return status(watch, args.json) if args.verb == "status" else logs(watch, args)
    digest, archive = pack(args.code, args.file, folder)
    # The way it is set up belongs to what is set up.
    bundle = hashlib.sha256(f"{digest} {args.setup}".encode()).hexdigest()[:16]
    remote = Remote(args.name, bundle, args.setup)
    times = {"restarts": args.restarts, "backoff": args.backoff, "silence": args.silence, "poll": args.poll}
    if args.verb == "up":
        return Watch(slices, remote, archive, [], None).until_the_end(Spec("up", "", **times))
    given = ["JAXTRAIN_DISTRIBUTED=1", *args.env]
    if wrong := [pair for pair in given if not re.match(r"[A-Za-z_]\w*=", pair)]:
        raise ValueError(f"--env {wrong[0]!r}: expected NAME=VALUE")
    line = [*shlex.split(args.program), *command]
    job = hashlib.sha256(json.dumps([bundle, given, args.before, line]).encode()).hexdigest()[:12]
    start = ["--job", job, "--cwd", remote.code, "--retries", str(args.worker_retries)]
    start += ["--backoff", str(args.backoff), "--hang_after", str(args.hang_after)]
    start += [part for pair in given for part in ("--env", pair)]
    logs_folder = args.logs or Path.home() / "jaxtrain-logs" / args.name
    watch = Watch(slices, remote, archive, [*start, "--", *line], logs_folder, before=args.before)
    spec = Spec("run", job, patience=args.patience, replace=args.replace, **times)
    say(f"job {job}, code {bundle}, logs in {watch.logs}")
    code = watch.until_the_end(spec)
    if args.delete_after:
        watch.until_the_end(Spec("down", "", poll=args.poll))
    return code


def main(argv: Sequence[str] | None = None) -> int:
    options = parser()
    args, command = options.split(argv)
    if (args.verb == "run") != bool(command):
        options.error("run takes the arguments of jaxtrain after --; the others take none")
    try:
        with tempfile.TemporaryDirectory(prefix="jaxtrain-launch-") as folder:
            return launch(args, command, Path(folder))
    except ValueError as error:
        say(f"error: {error}")
        return FAULT
    except OSError as error:
        say(f"error: {error}")
        return LOST
    except KeyboardInterrupt:
        say("no longer watching; the job, if started, goes on: the same command takes it up again")
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
