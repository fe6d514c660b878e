"""Reads the schedule that the TPU compiler has made of a kernel, from the text files it dumps.

A TPU core issues one bundle of instructions a cycle, in the order in which the compiler has put them, so that bundles
counted along the way that a program takes are cycles, less what it waits for memory.  Which way it takes is in the
branches: each names a region of the program, and comments in the text say where regions start.  A branch forward is an
``if`` around what it jumps over, a branch back is a loop; both take effect after some bundles that follow them, which
may be the first of the loop that an ``if`` guards.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

UNITS = ("MXU", "XLU", "VALU", "VPOP", "EUP", "VLOAD", "FILL", "VSTORE", "SPILL", "SALU")
MXU, FILL, SPILL = UNITS.index("MXU"), UNITS.index("FILL"), UNITS.index("SPILL")
# chip -> bundles after a branch before it takes effect, as the compiler's own labels show where inner loops end.
DELAY_SLOTS = {"v4": 1, "v5e": 4, "v5p": 4, "v6e": 4, "tpu7x": 6}


@dataclasses.dataclass(eq=False)
class Stretch:
    """Bundles ``start`` to ``end`` (exclusive) that run as often as ``kind`` says: "kernel" once, "if" or "loop"."""

    kind: str
    start: int
    end: int
    children: list[Stretch] = dataclasses.field(default_factory=list)

    def own(self) -> Iterator[int]:
        """Addresses of the bundles that belong to none of the children."""
        at = self.start
        for child in self.children:
            yield from range(at, child.start)
            at = child.end
        yield from range(at, self.end)

    @property
    def own_cycles(self) -> int:
        return self.end - self.start - sum(child.end - child.start for child in self.children)

    def walk(self) -> Iterator[Stretch]:
        """Itself and everything in it, in the order of the program."""
        yield self
        for child in self.children:
            yield from child.walk()


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel's name; what each of ``UNITS`` can start in a cycle; what it does start in each bundle; the program."""

    name: str
    capacity: tuple[int, ...]
    used: list[tuple[int, ...]]
    program: Stretch

    def feeds(self, stretch: Stretch) -> list[int]:
        """Addresses of a stretch's own bundles that feed a matrix unit."""
        return [at for at in stretch.own() if self.used[at][MXU]]

    def hot(self, stretch: Stretch) -> int:
        """Cycles from the first to the last of those."""
        found = self.feeds(stretch)
        return found[-1] - found[0] + 1

    @cached_property
    def matrix(self) -> list[Stretch]:
        """Every stretch whose own bundles feed a matrix unit, in order."""
        return [stretch for stretch in self.program.walk() if self.feeds(stretch)]

    def path(self, stretch: Stretch) -> list[Stretch]:
        """What stands around a stretch, from the program down to the stretch itself."""
        return [s for s in self.program.walk() if any(inner is stretch for inner in s.walk())]

    def use(self, stretch: Stretch) -> dict[str, float]:
        """The share of a unit's slots that a stretch's own bundles fill."""
        rows = [self.used[at] for at in stretch.own()]
        return {
            unit: sum(row[i] for row in rows) / (len(rows) * self.capacity[i])
            for i, unit in enumerate(UNITS)
            if self.capacity[i]
        }

    def spills(self, stretch: Stretch) -> int:
        """How often a register is put into memory for want of registers, or fetched back."""
        return sum(self.used[at][SPILL] + self.used[at][FILL] for at in stretch.own())


def read_program(text: str, chip: str) -> Stretch:
    """The tree of ``if`` and loop in the text of one kernel's bundles; ValueError if its branches are not nested."""
    at, regions, branches, delay = -1, {}, [], DELAY_SLOTS[chip]
    for line in text.splitlines():
        if found := re.match(r"\s*(0x[0-9a-f]+|0)\s*(?:[A-Z]{2})?\s*:", line):
            at = int(found[1], 16)
        for region in re.findall(r"Start(?:/End empty)? region (\d+)", line):
            regions[region] = at
        # A branch without a predicate would be the end of an ``if`` with an ``else``, which no kernel here has.
        branches += [(at, *found) for found in re.findall(r"sbr\.\w+ (\(!?%\w+\) )?target = \$region(\d+)", line)]
    stretches = []
    for branch, predicate, region in branches:
        # What has no start is the end of the program.
        after, target = branch + delay + 1, regions.get(region, at + 1)
        if not predicate:
            raise ValueError(f"an unconditional branch at {branch:#x}: this reader knows only if and loop")
        if target > branch:
            stretches.append(Stretch("if", after, max(after, target)))
        else:
            stretches.append(Stretch("loop", target, after))
    for guard in stretches:
        for loop in stretches:
            if (guard.kind, loop.kind) == ("if", "loop") and loop.start < guard.start < loop.end <= guard.end:
                guard.start = max(loop.start, guard.start - delay)
    root = Stretch("kernel", 0, at + 1)
    around = [root]
    # Of two that cover the same bundles the ``if`` is the outer: it guards the loop.
    for stretch in sorted(stretches, key=lambda s: (s.start, -s.end, s.kind == "loop")):
        while stretch.start >= around[-1].end:
            around.pop()
        if stretch.end > around[-1].end:
            raise ValueError(f"bundles {stretch.start:#x} to {stretch.end:#x} are half inside another branch's")
        around[-1].children.append(stretch)
        around.append(stretch)
    return root


def read_use(text: str) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """Capacity and use from the text of ``...final_hlo-static-per-bundle-utilization.txt``."""
    lines = text.splitlines()
    capacity, *used = (tuple(map(int, line.split())) for line in [lines[2], *lines[4:]] if line.strip())
    return capacity, used


def read_kernels(folder: Path, chip: str) -> dict[str, Kernel]:
    """name -> kernel, of everything in a folder of dumps that feeds a matrix unit."""
    kernels = {}
    for path in sorted(folder.glob("*final_hlo-static-per-bundle-utilization.txt")):
        stem, name = re.match(r"(\d+-(.*?)-)\d+-final_hlo", path.name).groups()
        capacity, used = read_use(path.read_text())
        if not any(row[MXU] for row in used):
            continue
        for bundles in folder.iterdir():
            if re.fullmatch(re.escape(stem) + r"\d+-final_bundles\.txt", bundles.name):
                program = read_program(bundles.read_text(), chip)
        if program.end != len(used):
            raise ValueError(f"{name}: {program.end} bundles, but the use of {len(used)}")
        kernels[name] = Kernel(name, capacity, used, program)
    return kernels


def keep_schedules(folder: Path) -> None:
    """Removes from a folder of dumps everything that ``read_kernels`` does not read: hundreds of megabytes."""
    for path in folder.iterdir():
        if not path.name.endswith(("final_hlo-static-per-bundle-utilization.txt", "final_bundles.txt")):
            path.unlink()


def compiler_environment(dump: Path) -> dict[str, str]:
    """Variables for a process that compiles for TPUs on a machine without one, and dumps what it makes there."""
    from jaxtrain.plan.compile import ENVIRONMENT  # brings JAX, which whoever only reads dumps does without

    dumping = f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true"
    return os.environ | ENVIRONMENT | {"JAX_PLATFORMS": "cpu", "LIBTPU_INIT_ARGS": dumping}
