"""How long a program takes at best: matrix units, memory and interconnect, each at a stated rate.

Instructions run one after another, each as long as the slower of its arithmetic and its memory traffic.  A collective
keeps the interconnect busy for its bytes over the links of its axes; an asynchronous one meanwhile lets what the
compiler has scheduled before its end run, and only what is left of it then is waited for.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Iterable

from jaxtrain.plan.chips import Slice
from jaxtrain.plan.hlo import Collective, Done, Item, Loop, Start, Work, flat
from jaxtrain.sharding import slice_axes

# Of the matrix units' peak that attention kernels reach.  JAX's and our own kernels' matrix slots are 64 to 100% full
# in the hot regions of their compiled schedules (benchmarks/README.md); masked tiles and the ends of rows are not.
KERNEL_SHARE = 0.5


@dataclasses.dataclass
class Times:
    """Seconds of one run.  matmul, memory, kernels: by what was the slower part of each instruction.

    collectives: that the interconnect is busy.  exposed: of these, what nothing else runs in.
    """

    matmul: float = 0.0
    memory: float = 0.0
    kernels: float = 0.0
    collectives: float = 0.0
    exposed: float = 0.0

    @property
    def seconds(self) -> float:
        return self.matmul + self.memory + self.kernels + self.exposed

    def add(self, other: Times, times: float = 1) -> None:
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(self, field.name) + times * getattr(other, field.name))


@dataclasses.dataclass(frozen=True)
class Network:
    """The interconnect of a slice under a mesh of ``sizes`` by axis."""

    where: Slice
    sizes: dict[str, int]

    def rate(self, axes: Iterable[str]) -> float:
        """Bytes a second that a device sends in a collective over these axes together.

        On a torus an axis has the links of the dimensions whose chips it counts exactly, and one link where it takes
        part of a dimension.  GPUs of one host have their switch; beyond it a host's network cards together.
        """
        chip, where = self.where.chip, self.where
        axes = tuple(axes)
        if not set(axes).isdisjoint(slice_axes(self.sizes, where.slices)):
            return chip.network_rate
        chips = max(1, math.prod(self.sizes[axis] for axis in axes) // chip.devices)
        if not chip.is_tpu:
            inside = chips <= chip.chips_per_host
            return chip.link_rate if inside else min(chip.link_rate, chip.chips_per_host * chip.network_rate)
        best = 1
        dims = [size for size in where.shape if size > 1]
        for count in range(1, len(dims) + 1):
            for chosen in itertools.combinations(dims, count):
                if math.prod(chosen) == chips:
                    best = max(best, sum(where.links(size) for size in chosen))
        return best * chip.link_rate / chip.devices

    def seconds(self, collective: Collective) -> float:
        if collective.members == 1:
            return 0.0
        rate = self.rate(collective.axes)
        if collective.kind == "collective-permute" and self.where.chip.is_tpu:
            rate = min(rate, self.where.chip.link_rate / self.where.chip.devices)  # to one neighbour, over one link
        return collective.wire_bytes / rate


def walk_times(items: tuple[Item, ...], network: Network) -> Times:
    """Times of a walked program on one device."""
    chip = network.where.chip
    flops, memory = chip.flops / chip.devices, chip.hbm_rate / chip.devices
    found = Times()
    now = free = 0.0  # the chip's clock, and when the interconnect is free
    ends: dict[str, float] = {}
    for item in items:
        if isinstance(item, Loop):
            inner = walk_times(item.items, network)
            found.add(inner, item.turns)
            now += item.turns * inner.seconds
        elif isinstance(item, Work):
            compute = item.flops / (flops * (KERNEL_SHARE if item.kernel else 1.0))
            moved = item.bytes / memory
            seconds = max(compute, moved)
            now += seconds
            kind = "kernels" if item.kernel else "matmul" if compute >= moved else "memory"
            setattr(found, kind, getattr(found, kind) + seconds)
        elif isinstance(item, Start):
            seconds = network.seconds(item.collective)
            found.collectives += seconds
            free = max(now, free) + seconds
            if item.asynchronous:
                ends[item.key] = free
            else:
                found.exposed += free - now
                now = free
        elif isinstance(item, Done) and item.key in ends:
            end = ends.pop(item.key)
            found.exposed += max(0.0, end - now)
            now = max(now, end)
    return found


def hidden(items: tuple[Item, ...]) -> dict[str, bool]:
    """Of every asynchronous collective by key, whether any work stands between its start and its end."""
    found: dict[str, bool] = {}
    open_: set[str] = set()
    for item in items:
        if isinstance(item, Loop):
            found |= hidden(item.items)
            found |= dict.fromkeys(open_, True)
        elif isinstance(item, Start) and item.asynchronous:
            open_.add(item.key)
            found.setdefault(item.key, False)
        elif isinstance(item, Done):
            open_.discard(item.key)
        elif isinstance(item, Work) and (item.flops or item.bytes):
            found |= dict.fromkeys(open_, True)
    return found


def table_of_collectives(items: tuple[Item, ...], network: Network) -> list[dict]:
    """Rows of what a program sends: alike ones added up, the longest first."""
    behind = hidden(items)
    counts: Counter = Counter()
    for item, times in flat(items):
        if isinstance(item, Start):
            key = (
                item.collective.kind,
                item.collective.axes,
                item.collective.members,
                item.collective.bytes,
                item.asynchronous,
                behind.get(item.key, False),
                item.collective.emulated,
            )
            counts[key] += times
    rows = []
    for (kind, axes, members, size, asynchronous, overlaps, emulated), count in counts.items():
        one = Collective(kind, size, axes, members)
        rows.append(
            {
                "kind": kind,
                "axes": list(axes),
                "devices": members,
                "bytes": size,
                "count": count,
                "asynchronous": asynchronous,
                "overlaps": asynchronous and overlaps,
                "emulates_all_gather": emulated,
                "seconds": count * network.seconds(one),
            }
        )
    return sorted(rows, key=lambda row: -row["seconds"])
