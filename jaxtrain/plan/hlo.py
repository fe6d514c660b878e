"""What a compiled program does, read from its scheduled text: work, kernels and collectives, as often as they run.

XLA's own totals (``compiled.cost_analysis()``) count the body of a loop once, and a Pallas kernel at what it declares
without saying so.  Here loops are multiplied by their turns, and everything stays in the order of the schedule, so that
what runs while a collective is under way can be told (``roofline``).

Counted by hand: products of matrices (``dot``, ``convolution``), at 2 FLOPs a multiply-add; HBM bytes that
instructions read and write, of which a fusion's slices and updates in place count for what they touch, and a chip's own
small memories for nothing; transcendental functions; what Pallas kernels declare (``cost_estimate``).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

from jaxtrain.plan.hlo_bytes import COLLECTIVES, Traffic
from jaxtrain.plan.hlo_convolution import convolution_flops
from jaxtrain.plan.hlo_gathers import among_zeros
from jaxtrain.plan.hlo_loops import turns_of
from jaxtrain.plan.hlo_text import (
    HBM,
    Computation,
    Instruction,
    Module,
    axes_of,
    groups_of,
    pairs_of,
    parse,
)
from jaxtrain.sharding import slice_axes

# Names for values that exist already.
FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"),
    *(
        "opt-barrier",
        "optimization-barrier",
        "add-dependency",
        "domain",
        "copy-done",
        "iota",
        "rng-get-and-update-state",
    ),
}
TRANSCENDENTAL = {
    *("exponential", "exponential-minus-one", "log", "log-plus-one", "logistic", "power", "tanh", "sine", "cosine"),
    *("tan", "sqrt", "rsqrt", "cbrt", "erf", "atan2"),
}
# Custom calls that compute nothing.
MARKERS = (
    "AllocateBuffer",
    "ConcatBitcast",
    "AssumeGatherIndicesInBound",
    "Sharding",
    "SPMDFullToShardShape",
    "SPMDShardToFullShape",
    "PrepareAsyncCallStart",
    "PrepareAsyncCallDone",
)


MEGASCALE = "xla_megascale_runtime"


@dataclasses.dataclass(frozen=True)
class Work:
    """One instruction's share.  bytes: of HBM.  kernel: a Pallas call, whose figures are those that it declares."""

    name: str
    flops: float = 0.0
    bytes: float = 0.0
    transcendentals: float = 0.0
    kernel: bool = False


@dataclasses.dataclass(frozen=True)
class Collective:
    """bytes: of the whole array on one device: what a gather yields, what a reduction or an exchange reads.

    axes: of the mesh, along which the members of a group differ.  members: of a group.
    source: the operation of the program that it came from, as JAX names it.
    emulated: an all-reduce of parts that lie among zeros: what an all-gather would do with half the traffic.
    """

    kind: str
    bytes: float
    axes: tuple[str, ...]
    members: int
    source: str = ""
    emulated: bool = False

    @property
    def wire_bytes(self) -> float:
        """What one device sends, on a ring: each part once past all but one, twice for an all-reduce."""
        share = (self.members - 1) / self.members
        return self.bytes * {"all-reduce": 2 * share, "collective-permute": 1.0}.get(self.kind, share)


@dataclasses.dataclass(frozen=True)
class Start:
    """A collective begins.  asynchronous: until the ``Done`` of the same key; else it ends at once."""

    key: str
    collective: Collective
    asynchronous: bool


@dataclasses.dataclass(frozen=True)
class Done:
    key: str


@dataclasses.dataclass(frozen=True)
class Loop:
    """turns: 1 where the text does not say, see ``Program.unknown``."""

    turns: int
    items: tuple[Item, ...]


Item = Work | Start | Done | Loop


class Totals(NamedTuple):
    """Sums over a program.  What Pallas kernels declare is no part of ``flops`` and ``bytes``."""

    flops: float = 0.0
    bytes: float = 0.0
    transcendentals: float = 0.0
    kernel_flops: float = 0.0
    kernel_bytes: float = 0.0


@dataclasses.dataclass(frozen=True)
class Program:
    """items: in the order of the schedule.  unknown: loops whose turns the text does not tell, counted once.

    unpriced: kernels that declare no cost, counted as nothing but the bytes of their operands and results.
    """

    items: tuple[Item, ...]
    unknown: tuple[str, ...]
    unpriced: tuple[str, ...]

    def totals(self) -> Totals:
        """Of one run, on one device."""
        sums = Totals()
        for work, times in self.works():
            cost = (times * work.flops, times * work.bytes)
            if work.kernel:
                own = Totals(0.0, 0.0, times * work.transcendentals, *cost)
            else:
                own = Totals(*cost, times * work.transcendentals)
            sums = Totals(*(a + b for a, b in zip(sums, own, strict=True)))
        return sums

    def works(self) -> Iterator[tuple[Work, int]]:
        """Every piece of work and how often it is done."""
        return ((item, times) for item, times in flat(self.items) if isinstance(item, Work))

    def collectives(self) -> Iterator[tuple[Start, int]]:
        """Every collective and how often it runs."""
        return ((item, times) for item, times in flat(self.items) if isinstance(item, Start))


def flat(items: tuple[Item, ...], times: int = 1) -> Iterator[tuple[Work | Start | Done, int]]:
    """What loops hold, with the number of times it runs."""
    for item in items:
        if isinstance(item, Loop):
            yield from flat(item.items, times * item.turns)
        else:
            yield item, times


def walk(
    text: str,
    mesh: dict[str, int] | None = None,
    turns: int | None = None,
    slices: int = 1,
    routed: float = 1.0,
) -> Program:
    """Reads ``compiled.as_text()``.

    mesh: sizes by axis, in the order of the mesh that the program was compiled for; without it collectives name none.
    turns: of loops that end by what they compute, as sampling does.  slices: whose networks the mesh joins.
    routed: which part of the rows that a mixture's kernels have room for they find there; they declare all.
    """
    reader = _Reader(parse(text), mesh, turns, slices, routed)
    items = tuple(reader.schedule(reader.module.entry))
    return Program(items, tuple(reader.unknown), tuple(reader.unpriced))


def priced(program: Program, flops: float) -> Program:
    """With equal parts of ``flops`` for its Pallas kernels, which on GPUs declare nothing."""

    def bare(item: Item) -> bool:
        return isinstance(item, Work) and item.kernel and not item.flops and item.name.startswith("pallas_call")

    calls = sum(times for item, times in flat(program.items) if bare(item))
    items = _each_work(
        program.items, lambda work: dataclasses.replace(work, flops=flops / calls) if bare(work) else work
    )
    return dataclasses.replace(program, items=items)


class _Reader:
    def __init__(self, module: Module, mesh: dict[str, int] | None, turns: int | None, slices: int, routed: float):
        self.module, self.mesh, self.turns, self.routed = module, mesh or {}, turns, routed
        self.slices, self.between = slices, tuple(slice_axes(self.mesh, slices)) if slices > 1 else ()
        self.traffic = Traffic(module)
        self.unknown: list[str] = []
        self.unpriced: list[str] = []

    def computation(self, name: str) -> Computation:
        return self.module.computations[name]

    def schedule(self, name: str) -> Iterator[Item]:
        """A computation's items in order."""
        body = self.computation(name)
        for one in body.instructions:
            yield from self.items(body, one)

    def items(self, body: Computation, one: Instruction) -> Iterator[Item]:
        op = one.op
        if op in FREE:
            return
        if op == "while":
            turns = turns_of(self.module, body, one)
            if turns is None:
                turns = self.turns_by_name(one)
            if turns is None:
                self.unknown.append(one.name)
            yield Loop(turns or 1, tuple(self.schedule(one.called("body"))))
        elif op == "call":
            yield from self.schedule(one.called("to_apply"))
        elif op == "conditional":
            heavier = max((tuple(self.schedule(name)) for name in _branches(one)), key=_weight)
            # How often, see ``kernels.attention.ring``.
            often = re.search(r"taken_(\d+)_of_(\d+)", _source(one))
            yield from _part(heavier, int(often[1]) / int(often[2])) if often else heavier
        elif MEGASCALE in one.attributes:
            yield from self.between_slices(body, one)
        elif op in ("call-start", "call-update"):
            yield from self.on_sparse_core(body, one)
        elif op.endswith(("-done", "-update")):
            yield from () if op.endswith("-update") else (Done(self.started(body, one)),)
        elif op == "async-start":
            inner = tuple(self.schedule(one.called("calls")))
            joined = [item for item in inner if isinstance(item, Start)]
            yield from (item for item in inner if isinstance(item, Work))
            yield from (dataclasses.replace(item, key=one.name, asynchronous=True) for item in joined[:1])
        elif op.removesuffix("-start") in COLLECTIVES:
            yield Start(one.name, self.collective(body, one), op.endswith("-start"))
        elif op.endswith("-start"):  # a copy or a slice, mostly between HBM and a chip's own memory
            least = min(shape.bytes for shape in one.shapes if shape.dims)
            yield Work(one.name, bytes=sum(least for shape in one.shapes if shape.dims and shape.space == HBM))
        elif op == "custom-call":
            yield from self.custom_call(body, one)
        else:
            if op == "fusion":
                yield from self.fused_collectives(one)
            yield Work(one.name, self.flops(body, one), self.traffic.bytes(body, one), self.transcendentals(body, one))

    def turns_by_name(self, one: Instruction) -> int | None:
        """Of a loop that ends by what it computes: ``turns``; of one over a mixture's rows, see
        ``kernels.grouped_matmul.blocked``, as many as their part takes."""
        most = re.search(r"at_most_(\d+)_turns", _source(one))
        return math.ceil(int(most[1]) * self.routed) if most else self.turns

    def started(self, body: Computation, done: Instruction) -> str:
        """The name of what a ``-done`` waits for, past ``async-update``."""
        return self.first(body, done).name

    def first(self, body: Computation, later: Instruction) -> Instruction:
        """The ``-start`` of a chain of ``-update`` and ``-done``."""
        start = later
        while start.op.endswith(("-update", "-done")):
            start = body.by_name[start.operands[0]]
        return start

    def on_sparse_core(self, body: Computation, one: Instruction) -> Iterator[Item]:
        """A collective (or a copy) that a TPU's sparse cores carry out beside its tensor cores: it begins where it is
        handed its operands, at its ``call-start``, or at a ``call-update`` after one that only made ready."""
        start = self.first(body, one)
        if len(one.operands) <= (one is not start):
            return
        for item in self.schedule(start.called("to_apply")):
            started = isinstance(item, Start)
            yield dataclasses.replace(item, key=start.name, asynchronous=True) if started else item

    def collective(self, body: Computation, one: Instruction) -> Collective:
        kind = one.op.removesuffix("-start")
        operands = [shape for name in one.operands for shape in body.by_name[name].shapes]
        if kind == "collective-permute":
            pairs = pairs_of(one.attributes)
            axes, members, size = pairs, 2, operands[0].bytes
        else:
            axes = groups_of(one.attributes, self.module.devices)
            members, size = axes.shape[1], sum(shape.bytes for shape in operands)
            if kind == "all-gather":
                size *= members
        names = axes_of(axes, self.mesh) if self.mesh else ()
        emulated = kind == "all-reduce" and any(among_zeros(self.module, body, name) for name in one.operands)
        return Collective(kind, size, names, members, _source(one), emulated)

    def between_slices(self, body: Computation, one: Instruction) -> Iterator[Item]:
        """A collective over the network between slices: a ``send`` through the host, and a ``recv`` of its result."""
        if one.op == "recv-done":
            yield Done(_megascale(body.by_name[one.operands[0]], "host_transfer_rendezvous"))
        elif one.op == "send":
            kind = _megascale(one, "megascale_transfer_type").lower().replace("_", "-")
            kind = kind if kind in COLLECTIVES else "collective-permute"
            found = Collective(kind, one.shapes[0].bytes, self.between, self.slices)
            yield Start(_megascale(one, "host_transfer_rendezvous"), found, True)

    def fused_collectives(self, one: Instruction) -> Iterator[Item]:
        """Those inside a fusion, of which TPUs have two kinds: a reduce-scatter as an all-reduce fused with the slice
        that is kept; and an asynchronous collective that several fusions carry on in turn, known by its chain."""
        body = self.computation(one.called("calls"))
        targets = re.findall(r'custom_call_target="(\w+)"', " ".join(other.attributes for other in body.instructions))
        sliced = any(other.op == "dynamic-slice" for other in body.instructions)
        for inner in body.instructions:
            if inner.op not in COLLECTIVES:
                continue
            chain = re.search(r'chain_id="(\d+)"', inner.attributes)
            if chain and "AsyncCollectiveStart" not in targets:
                yield from (Done(f"chain {chain[1]}"),) if "AsyncCollectiveDone" in targets else ()
                continue
            found = self.collective(body, inner)
            if inner.op == "all-reduce" and sliced:
                found = dataclasses.replace(found, kind="reduce-scatter")
            found = dataclasses.replace(found, source=found.source or _source(one))
            yield Start(f"chain {chain[1]}" if chain else one.name, found, bool(chain))

    def custom_call(self, body: Computation, one: Instruction) -> Iterator[Item]:
        target = re.search(r'custom_call_target="([^"]*)"', one.attributes)[1]
        if target in MARKERS:
            return
        touched = self.traffic.bytes(body, one)
        declared = re.search(r'"cost_estimate":(\{[^}]*\})', one.attributes)
        if declared:
            share = self.routed if "ragged_dot" in _source(one) else 1.0
            cost = {name: share * float(value) for name, value in json.loads(declared[1]).items()}
            yield Work(
                one.name, cost["flops"], cost.get("bytes_accessed", touched), cost.get("transcendentals", 0.0), True
            )
        else:
            self.unpriced.append(f"{one.name} ({target})")
            yield Work(one.name, bytes=touched, kernel=True)

    def flops(self, body: Computation, one: Instruction) -> float:
        if one.op == "dot":
            left = body.by_name[one.operands[0]].shape
            return 2.0 * one.shape.elements * math.prod(left.dims[i] for i in one.sizes("lhs_contracting_dims"))
        if one.op == "convolution":
            left, right = (body.by_name[name].shape for name in one.operands)
            return convolution_flops(left.dims, right.dims, one.shape.dims, one.attributes)
        if one.op == "fusion":
            return self._fused(one.called("calls"))[0]
        return 0.0

    def transcendentals(self, body: Computation, one: Instruction) -> float:
        if one.op in TRANSCENDENTAL:
            return float(one.shape.elements)
        return self._fused(one.called("calls"))[1] if one.op == "fusion" else 0.0

    @functools.cache  # noqa: B019  (a reader lives as long as one walk)
    def _fused(self, name: str) -> tuple[float, float]:
        body = self.computation(name)
        return (
            sum(self.flops(body, one) for one in body.instructions),
            sum(self.transcendentals(body, one) for one in body.instructions),
        )


def _megascale(one: Instruction, name: str) -> str:
    return re.search(rf'_xla_{name}="([^"]*)"', one.attributes)[1]


def _branches(one: Instruction) -> list[str]:
    if found := re.search(r"branch_computations=\{([^}]*)\}", one.attributes):
        return re.findall(r"%?([\w.-]+)", found[1])
    return [one.called("true_computation"), one.called("false_computation")]


def _weight(items: tuple[Item, ...]) -> tuple[float, float]:
    """Which branch of a conditional costs more."""
    works = [(item, times) for item, times in flat(items) if isinstance(item, Work)]
    return sum(w.flops * n for w, n in works), sum(w.bytes * n for w, n in works)


def _part(items: tuple[Item, ...], share: float) -> tuple[Item, ...]:
    """What is done in this part of all times, on average."""

    def less(work: Work) -> Work:
        costs = {name: share * getattr(work, name) for name in ("flops", "bytes", "transcendentals")}
        return dataclasses.replace(work, **costs)

    return _each_work(items, less)


def _each_work(items: tuple[Item, ...], change: Callable[[Work], Work]) -> tuple[Item, ...]:
    """With all work changed, that of loops too."""

    def one(item: Item) -> Item:
        if isinstance(item, Loop):
            return Loop(item.turns, _each_work(item.items, change))
        return change(item) if isinstance(item, Work) else item

    return tuple(map(one, items))


def _source(one: Instruction) -> str:
    found = re.search(r'op_name="([^"]*)"', one.attributes)
    return found[1] if found else ""
