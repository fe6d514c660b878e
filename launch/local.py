"""Runs ``jaxtrain`` as a child process and starts it again after a crash.  Standard library only.

    python launch/local.py --devices 8 --retries 3 -- run RECIPE.gin --out DIR

A run continues from its newest checkpoint, bit for bit, when the same command is given again, so a restart
costs only the work since then.  A crash is death by a signal, or an exit code other than 0 (done), 1 (a check
failed), 2 (a user's mistake) and 130 (interrupted).
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

FINAL = (0, 1, 2, 130)
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
LONGEST_WAIT = 60.0  # seconds between a crash and the restart
DEVICE_FLAG = "--xla_force_host_platform_device_count"


class Supervisor:
    """One child at a time; ``run`` returns the exit code of the last."""

    def __init__(self, command: Sequence[str], env: dict[str, str], *, retries: int, backoff: float):
        """backoff: seconds before the first restart; doubles up to ``LONGEST_WAIT``."""
        self.command, self.env, self.retries, self.backoff = list(command), env, retries, backoff
        self.child: subprocess.Popen | None = None
        self.stopped_by: int | None = None

    def forward(self, signum: int, frame: object) -> None:
        """Signal handler: hands ``signum`` to the child, after whose end there is no restart."""
        self.stopped_by = signum
        if self.child is not None:
            self.child.send_signal(signum)

    def run(self) -> int:
        for signum in FORWARDED:
            if signal.getsignal(signum) is not signal.SIG_IGN:  # nohup's choice stands
                signal.signal(signum, self.forward)
        say("start: " + shlex.join(self.command).replace("\n", "\\n"))
        for attempt in range(self.retries + 1):
            began = time.monotonic()
            code = self.once()
            end = f"{describe(code)} after {time.monotonic() - began:.1f} s"
            if self.stopped_by is not None:
                say(f"stopped by {signal.Signals(self.stopped_by).name}: {end}")
                return exit_code(code)
            if code in FINAL:
                if code:
                    say(f"not retried: {end}")
                return code
            if attempt == self.retries:
                say(f"given up after {self.retries} restarts: {end}")
                return exit_code(code)
            wait = min(self.backoff * 2**attempt, LONGEST_WAIT)
            say(f"restart {attempt + 1} of {self.retries} in {wait:g} s: {end}")
            if not self.rest(wait):
                return 128 + self.stopped_by
        raise AssertionError("the last attempt returns")

    def once(self) -> int:
        # A process group of its own: a terminal's Ctrl-C would otherwise reach the child twice.
        self.child = subprocess.Popen(self.command, env=self.env, stdin=subprocess.DEVNULL, process_group=0)
        if self.stopped_by is not None:  # the signal came before there was a child to forward it to
            self.child.send_signal(self.stopped_by)
        code = self.child.wait()
        self.child = None
        return code

    def rest(self, seconds: float) -> bool:
        """Waits; False, at once, when a signal asks to stop."""
        end = time.monotonic() + seconds
        while self.stopped_by is None and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, 0.2))
        return self.stopped_by is None


def describe(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:  # a real-time signal has no name
        return f"killed by signal {-code}"


def exit_code(code: int) -> int:
    """A shell's: 128 + n for death by signal n."""
    return code if code >= 0 else 128 - code


def say(line: str) -> None:
    sys.stderr.write(f"launch: {line}\n")
    sys.stderr.flush()


def environment(devices: int | None) -> dict[str, str]:
    """The child's environment, with ``devices`` virtual CPU devices where given, whatever was set before."""
    env = dict(os.environ)
    if devices is not None:
        others = re.sub(rf"{DEVICE_FLAG}=\S*", "", env.get("XLA_FLAGS", "")).split()
        env["XLA_FLAGS"] = " ".join([*others, f"{DEVICE_FLAG}={devices}"])
        env["JAX_PLATFORMS"] = "cpu"  # an accelerator would hide the virtual devices
    return env


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--devices", type=int, metavar="N", help="virtual CPU devices of the child (default: the real ones)")
    add("--retries", type=int, default=3, metavar="N", help="restarts after a crash (default: 3)")
    add("--backoff", type=float, default=1.0, metavar="S", help="seconds before the first (default: 1)")
    add("--program", help="what to run in place of this Python's jaxtrain, as a shell would read it")
    add("arguments", nargs="+", help="of jaxtrain, after --")
    args = parser.parse_args(argv)
    if args.devices is not None and args.devices < 1:
        parser.error(f"--devices must be at least 1, found {args.devices}")
    if args.retries < 0 or args.backoff < 0:
        parser.error(f"--retries and --backoff must be at least 0, found {args.retries} and {args.backoff}")
    program = shlex.split(args.program) if args.program else [sys.executable, "-m", "jaxtrain.main"]
    supervisor = Supervisor(
        [*program, *args.arguments], environment(args.devices), retries=args.retries, backoff=args.backoff
    )
    return supervisor.run()


if __name__ == "__main__":
    sys.exit(main())
