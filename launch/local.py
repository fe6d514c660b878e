"""Runs ``jaxtrain`` in one or more processes of this machine and starts it again after a failure.

    python launch/local.py --devices 8 --retries 3 -- run RECIPE.gin --out DIR
    python launch/local.py --processes 2 --devices 4 -- run RECIPE.gin --out DIR

A run continues from its newest checkpoint, bit for bit, when the same command is given again, so a restart
costs only the work since then.  Exit codes: 0 done, 42 preempted (started again for free), 43 a fault of
configuration or data (not started again), anything else a failure.  Standard library only.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import socket
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from supervise import Parser, Policy, Process, Supervisor, say

DEVICE_FLAG = "--xla_force_host_platform_device_count"


def environment(devices: int | None) -> dict[str, str]:
    """The environment of a process, with ``devices`` virtual CPU devices where given, whatever was set before."""
    env = dict(os.environ)
    if devices is not None:
        others = re.sub(rf"{DEVICE_FLAG}=\S*", "", env.get("XLA_FLAGS", "")).split()
        env["XLA_FLAGS"] = " ".join([*others, f"{DEVICE_FLAG}={devices}"])
        env["JAX_PLATFORMS"] = "cpu"  # an accelerator would hide the virtual devices
    return env


def free_port() -> int:
    """A port that nothing listens on now.  Every attempt takes another: the last one's may still be closing."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def processes(command: Sequence[str], env: dict[str, str], count: int, folder: Path) -> list[Process]:
    """The processes of one attempt, which find each other through ``JAXTRAIN_COORDINATOR`` where there are several."""
    coordinator = f"127.0.0.1:{free_port()}"
    found = []
    for number in range(count):
        own = dict(env)
        if count > 1:
            own["JAXTRAIN_COORDINATOR"] = coordinator
            own["JAXTRAIN_NUM_PROCESSES"] = str(count)
            own["JAXTRAIN_PROCESS_ID"] = str(number)
        found.append(Process(command, own, folder / f"heartbeat.{number}"))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("--processes", type=int, default=1, metavar="N", help="processes that train together (default: 1)")
    add("--devices", type=int, metavar="N", help="virtual CPU devices of each process (default: the real ones)")
    add("--retries", type=int, default=3, metavar="N", help="restarts after failures (default: 3)")
    add("--backoff", type=float, default=1.0, metavar="S", help="seconds before the first restart (default: 1)")
    shown = {"hang_after": "seconds without a heartbeat after which a process counts as hung"}
    shown["grace"] = "seconds between SIGTERM and SIGKILL for the others, when one process has failed"
    shown["linger"] = "seconds that the others may run on, when one process has ended well"
    for name, meaning in shown.items():
        default = getattr(Policy, name)
        add(f"--{name}", type=float, default=default, metavar="S", help=f"{meaning} (default: {default:g})")
    add("--program", help="what to run in place of this Python's jaxtrain, as a shell would read it")
    add("arguments", nargs="+", help="of jaxtrain, after --")
    args = parser.parse_args(argv)
    for name in ("devices", "processes"):
        if (value := getattr(args, name)) is not None and value < 1:
            parser.error(f"--{name} must be at least 1, found {value}")
    for name in ("retries", "backoff", *shown):
        if not (value := getattr(args, name)) >= 0:
            parser.error(f"--{name} must be at least 0, found {value}")
    command = [*(shlex.split(args.program) if args.program else [sys.executable, "-m", "jaxtrain.main"])]
    command += args.arguments
    policy = Policy(**{name: getattr(args, name) for name in ("retries", "backoff", *shown)})
    say("start: " + shlex.join(command).replace("\n", "\\n"))
    with tempfile.TemporaryDirectory(prefix="jaxtrain-launch-") as folder:
        env = environment(args.devices)
        return Supervisor(lambda attempt: processes(command, env, args.processes, Path(folder)), policy).run()


if __name__ == "__main__":
    sys.exit(main())
