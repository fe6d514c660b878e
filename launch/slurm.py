"""Writes a batch file for a GPU cluster under Slurm.

    python launch/slurm.py NAME --nodes 4 --gpus_per_node 8 --time 24:00:00 -- run RECIPE.gin --out /shared/run
    sbatch NAME.sbatch

One process for each GPU, as JAX expects under Slurm.  Some time before the limit, and when the job is preempted, all
processes get SIGTERM, save and exit with 42: the job is queued again.  43 is not tried again; anything else is, after
a wait that doubles, a limited number of times.  Standard library only.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from supervise import FAULT, PREEMPTED, Parser, say

BODY = """
trap ':' TERM  # the processes answer it; this script must live to queue the job again
cd {folder}
{exports}
failures=0
pause={backoff}
while true; do
    # --wait: after the first process has ended, the others have so many seconds.
    srun --wait={linger} {container}{command} &
    step=$!
    while true; do  # a signal interrupts wait, but does not end srun
        wait "$step"
        code=$?
        kill -0 "$step" 2>/dev/null || break
    done
    case "$code" in
        0) exit 0 ;;
        {preempted})
            echo "launch: preempted, queued again" >&2
            scontrol requeue "$SLURM_JOB_ID"
            exit {preempted}
            ;;
        {fault})
            echo "launch: not retried: exit code {fault}" >&2
            exit {fault}
            ;;
    esac
    failures=$((failures + 1))
    if [ "$failures" -gt {retries} ]; then
        echo "launch: given up after {retries} restarts: exit code $code" >&2
        exit "$code"
    fi
    echo "launch: restart $failures of {retries} in $pause s: exit code $code" >&2
    sleep "$pause"
    pause=$((pause * 2 > {longest} ? {longest} : pause * 2))
done
"""


def batch(args: argparse.Namespace, command: Sequence[str]) -> str:
    """The text of the batch file.  Raises ValueError for options that Slurm would refuse or misread."""
    directives = {
        "job-name": args.name,
        "nodes": args.nodes,
        "ntasks-per-node": args.gpus_per_node,
        "gpus-per-node": args.gpus_per_node,
        "cpus-per-task": args.cpus_per_task,
        "time": args.time,
        "signal": f"TERM@{args.signal_before}",
        "open-mode": "append",  # one log, however often it is queued again
        "output": args.log or f"{args.name}-%j.log",
        "partition": args.partition,
        "account": args.account,
        "qos": args.qos,
        "constraint": args.constraint,
        "mem": args.mem,
    }
    for name, value in directives.items():
        if value is not None and not re.fullmatch(r"[\w%@:.,/&|*()\[\]+=-]+", str(value)):
            raise ValueError(f"--{name.replace('-', '_')} {value!r}: a batch file's header takes no spaces or quotes")
    if seconds(args.time) <= args.signal_before:
        raise ValueError(f"--signal_before {args.signal_before}: longer than --time {args.time}")
    lines = ["#!/bin/bash", *(f"#SBATCH --{key}={value}" for key, value in directives.items() if value is not None)]
    lines += ["#SBATCH --requeue", *(["#SBATCH --exclusive"] if args.exclusive else [])]
    pairs = ["JAXTRAIN_DISTRIBUTED=1", *args.env]
    exports = []
    for pair in pairs:
        name, found, value = pair.partition("=")
        if not found or not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise ValueError(f"--env {pair!r}: expected NAME=VALUE")
        exports.append(f"export {name}={shlex.quote(value)}")
    container = [f"--container-image={args.container}"] if args.container else []
    container += [f"--container-mounts={args.mounts}"] if args.mounts else []
    if args.mounts and not args.container:
        raise ValueError("--mounts are those of a --container")
    body = BODY.format(
        folder=shlex.quote(str(args.folder)),
        exports="\n".join(exports),
        backoff=args.backoff,
        longest=args.longest_wait,
        linger=args.linger,
        retries=args.retries,
        container=shlex.join(container) + " " * bool(container),
        command=shlex.join([*shlex.split(args.program), *command]),
        preempted=PREEMPTED,
        fault=FAULT,
    )
    return "\n".join(lines) + "\n" + body


def seconds(text: str) -> int:
    """Slurm's time limits: MINUTES, MINUTES:SECONDS, HOURS:MINUTES:SECONDS, DAYS-HOURS[:MINUTES[:SECONDS]]."""
    if not re.fullmatch(r"(\d+-\d+(:\d+){0,2}|\d+(:\d+){0,2})", text):
        raise ValueError(f"--time {text!r}: expected HOURS:MINUTES:SECONDS or DAYS-HOURS")
    days, dash, rest = text.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        hours, minutes, rest_seconds = [*parts, 0, 0][:3]
    else:
        hours, minutes, rest_seconds = parts if len(parts) == 3 else [0, *[*parts, 0][:2]]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + rest_seconds


def whole(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, found {text}")
    return int(text)


def parser() -> Parser:
    top = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = top.add_argument
    add("name", metavar="NAME", help="of the job")
    add("--nodes", type=whole, required=True, metavar="N")
    add("--gpus_per_node", type=whole, required=True, metavar="N")
    add("--time", required=True, help="limit of one run in the queue: 24:00:00")
    add("--signal_before", type=whole, default=300, metavar="S", help="seconds before the limit to save in (300)")
    add("--cpus_per_task", type=whole, metavar="N")
    add("--mem", help="memory of a node: 0 for all of it")
    add("--partition")
    add("--account")
    add("--qos")
    add("--constraint")
    add("--exclusive", action="store_true", help="share the nodes with no other job")
    add("--log", metavar="FILE", help="%%j is the job's number (default: NAME-%%j.log)")
    add("--container", metavar="IMAGE", help="run in it (srun --container-image, of the Pyxis plugin)")
    add("--mounts", metavar="SRC:DST,...", help="folders that the container sees")
    add("--folder", type=Path, default=Path.cwd(), metavar="DIR", help="to run in, on the nodes (default: this one)")
    add("--program", default="jaxtrain", help="what to run, as a shell would read it (default: jaxtrain)")
    add("--env", action="append", default=[], metavar="NAME=VALUE")
    add("--retries", type=int, default=3, metavar="N", help="restarts after failures (default: 3)")
    add("--backoff", type=whole, default=30, metavar="S", help="seconds before the first restart (default: 30)")
    add("--longest_wait", type=whole, default=900, metavar="S", help="bound of the doubling (default: 900)")
    add("--linger", type=whole, default=120, metavar="S", help="for the others once one process has ended (120)")
    add("--out", type=Path, metavar="FILE", help="default: NAME.sbatch")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    options = parser()
    args, command = options.split(argv)
    if not command:
        options.error("the arguments of jaxtrain are missing: give them after --")
    if args.retries < 0:
        options.error(f"--retries must be at least 0, found {args.retries}")
    try:
        text = batch(args, command)
    except ValueError as error:
        say(f"error: {error}")
        return FAULT
    out = args.out or Path(f"{args.name}.sbatch")
    out.write_text(text)
    sys.stdout.write(f"sbatch {shlex.quote(str(out))}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
