"""Writes a JobSet for TPU slices in Google Kubernetes Engine, and the command of xpk that asks for the same.

    python launch/gke.py NAME --kind v5p --topology 4x4x4 --slices 2 --image IMAGE -- run RECIPE.gin --out /runs/NAME
    kubectl apply -f NAME.json

The manifest is JSON, which every reader of YAML reads.  Kubernetes has one limit for all restarts: preemptions (42)
count towards ``--max_restarts`` like failures do; 43 ends the job.  Standard library only.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from supervise import FAULT, PREEMPTED, Parser, say


class Kind(NamedTuple):
    """accelerator: node label cloud.google.com/gke-tpu-accelerator; prefix and cores per chip make up the type."""

    accelerator: str
    prefix: str
    cores: int
    dimensions: int


# xpk 1.16 (core/system_characteristics.py)
KINDS = {
    "v4": Kind("tpu-v4-podslice", "v4", 2, 3),
    "v5e": Kind("tpu-v5-lite-podslice", "v5litepod", 1, 2),
    "v5p": Kind("tpu-v5p-slice", "v5p", 2, 3),
    "v6e": Kind("tpu-v6e-slice", "v6e", 1, 2),
    "tpu7x": Kind("tpu7x", "tpu7x", 2, 3),
}
CHIPS_OF_A_HOST = 4
XPK_RESTARTS = {PREEMPTED, *range(127, 256)}  # the codes after which xpk restarts by itself


def chips(kind: str, topology: str) -> int:
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", topology) or len(topology.split("x")) != KINDS[kind].dimensions:
        raise ValueError(f"--topology {topology!r}: {kind} has {KINDS[kind].dimensions} dimensions, as in 4x4x4")
    number = math.prod(int(part) for part in topology.split("x"))
    if number != 1 and number % CHIPS_OF_A_HOST:
        raise ValueError(f"--topology {topology}: {number} chips do not fill hosts of {CHIPS_OF_A_HOST}")
    return number


def manifest(args: argparse.Namespace, command: Sequence[str]) -> dict[str, Any]:
    """The JobSet (jobset.x-k8s.io/v1alpha2).  JAX finds its peers by what GKE puts into the pods' environment."""
    number = chips(args.kind, args.topology)
    hosts = max(1, number // CHIPS_OF_A_HOST)
    pairs = dict(pair.split("=", 1) for pair in ["JAXTRAIN_DISTRIBUTED=1", *args.env])
    tpus = {"google.com/tpu": min(number, CHIPS_OF_A_HOST)}
    container = {
        "name": "jaxtrain",
        "image": args.image,
        "command": [literal(word) for word in [*shlex.split(args.program), *command]],
        "env": [{"name": name, "value": literal(value)} for name, value in pairs.items()],
        "resources": {"requests": tpus, "limits": tpus},
    }
    where = {"cloud.google.com/gke-tpu-accelerator": KINDS[args.kind].accelerator}
    where["cloud.google.com/gke-tpu-topology"] = args.topology
    tolerations = [{"key": "google.com/tpu", "operator": "Exists", "effect": "NoSchedule"}]
    if args.spot:
        where["cloud.google.com/gke-spot"] = "true"
        tolerations.append({"key": "cloud.google.com/gke-spot", "operator": "Exists", "effect": "NoSchedule"})
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": args.grace,
        "hostNetwork": True,
        "dnsPolicy": "ClusterFirstWithHostNet",
        "nodeSelector": where,
        "tolerations": tolerations,
        "containers": [container],
    }
    if args.service_account:
        pod["serviceAccountName"] = args.service_account
    faults = {"containerName": container["name"], "operator": "In", "values": [FAULT]}
    job = {
        "parallelism": hosts,
        "completions": hosts,
        "backoffLimit": 0,  # one pod that fails is a failed slice, and the JobSet starts all of them again
        "podFailurePolicy": {"rules": [{"action": "FailJob", "onExitCodes": faults}]},
        "template": {"spec": pod},
    }
    labels = {"app.kubernetes.io/managed-by": "jaxtrain"}
    if args.queue:
        labels["kueue.x-k8s.io/queue-name"] = args.queue
    rules = [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}]
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": args.name,
            "labels": labels,
            # One slice for each node pool, whose nodes are the slice.
            "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"},
        },
        "spec": {
            "failurePolicy": {"maxRestarts": args.max_restarts, "rules": rules},
            "replicatedJobs": [{"name": "slice", "replicas": args.slices, "template": {"spec": job}}],
        },
    }


def literal(text: str) -> str:
    """Kubernetes replaces $(NAME) in commands and values, and reads $$ as $."""
    return text.replace("$", "$$")


def xpk(args: argparse.Namespace, command: Sequence[str]) -> list[str]:
    """The argument list of ``xpk workload create`` for the same job; xpk has a shell read the command."""
    kind = KINDS[args.kind]
    codes = [str(code) for code in range(1, 256) if code not in XPK_RESTARTS | {FAULT}]
    argv = ["xpk", "workload", "create", f"--workload={args.name}", f"--cluster={args.cluster or 'CLUSTER'}"]
    argv += [f"--tpu-type={kind.prefix}-{chips(args.kind, args.topology) * kind.cores}", f"--num-slices={args.slices}"]
    argv += [f"--docker-image={args.image}", f"--max-restarts={args.max_restarts}"]
    argv += [f"--termination-grace-period-seconds={args.grace}", f"--restart-on-exit-codes={','.join(codes)}"]
    argv += [part for pair in ["JAXTRAIN_DISTRIBUTED=1", *args.env] for part in ("--env", pair)]
    return [*argv, "--command", shlex.join([*shlex.split(args.program), *command])]


def parser() -> Parser:
    top = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = top.add_argument
    add("name", metavar="NAME", help="of the job: small letters, digits and hyphens")
    add("--kind", required=True, choices=KINDS)
    add("--topology", required=True, help="of one slice: 4x4x4")
    add("--slices", type=int, default=1, metavar="N")
    add("--image", required=True, help="container with jaxtrain in it")
    add("--program", default="jaxtrain", help="what to run, as a shell would read it (default: jaxtrain)")
    add("--env", action="append", default=[], metavar="NAME=VALUE")
    add("--max_restarts", type=int, default=100, metavar="N", help="preemptions among them (default: 100)")
    add("--grace", type=int, default=300, metavar="S", help="to save in when asked to end (default: 300)")
    add("--spot", action="store_true", help="on spot nodes")
    add("--service_account", metavar="NAME", help="Kubernetes' account of the pods, bound to one that may write")
    add("--queue", metavar="NAME", help="Kueue's local queue")
    add("--cluster", metavar="NAME", help="for xpk's command")
    add("--out", type=Path, metavar="FILE", help="default: NAME.json")
    return top


def check(args: argparse.Namespace) -> None:
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", args.name):
        raise ValueError(f"NAME {args.name!r}: expected at most 40 small letters, digits and hyphens, a letter first")
    for name, least in (("slices", 1), ("max_restarts", 0), ("grace", 1)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name} must be at least {least}, found {getattr(args, name)}")
    if wrong := [pair for pair in args.env if not re.match(r"[A-Za-z_]\w*=", pair)]:
        raise ValueError(f"--env {wrong[0]!r}: expected NAME=VALUE")


def main(argv: Sequence[str] | None = None) -> int:
    options = parser()
    args, command = options.split(argv)
    if not command:
        options.error("the arguments of jaxtrain are missing: give them after --")
    try:
        check(args)
        found = manifest(args, command)
    except ValueError as error:
        say(f"error: {error}")
        return FAULT
    out = args.out or Path(f"{args.name}.json")
    out.write_text(json.dumps(found, indent=2) + "\n")
    sys.stdout.write(f"kubectl apply -f {shlex.quote(str(out))}\n{shlex.join(xpk(args, command))}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
