"""Compiled HLO as text, taken apart: computations, instructions, shapes, and which devices a collective joins."""

from __future__ import annotations

import dataclasses
import functools
import math
import re

import numpy as np

# Bits of an element.
BITS = {"pred": 8, "token": 0, "opaque": 0} | {
    f"{kind}{bits}": bits for kind in ("s", "u", "f") for bits in (1, 2, 4, 8, 16, 32, 64)
}
BITS |= {"bf16": 16, "c64": 64, "c128": 128}

HBM, HOST = 0, 5  # memory spaces of a layout, S(n); others are a chip's own small memories


@dataclasses.dataclass(frozen=True)
class Shape:
    """One array.  space: the memory that it lies in, see ``HBM``."""

    dtype: str
    dims: tuple[int, ...]
    space: int = HBM

    @property
    def elements(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> float:
        # float8 comes in kinds, such as f8e4m3fn.
        bits = BITS.get(self.dtype) or BITS.get(self.dtype[:2], 0) if self.dtype not in BITS else BITS[self.dtype]
        return self.elements * bits / 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """``name = type op(operands), attributes``.  shapes: of the result; several where it is a tuple (nested ones flat).

    inside: the text between the parentheses.
    """

    name: str
    op: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    inside: str
    attributes: str

    @property
    def shape(self) -> Shape:
        return self.shapes[0]

    def called(self, key: str) -> str | None:
        """The computation that an attribute names."""
        found = re.search(rf"\b{key}=%?([\w.-]+)", self.attributes)
        return found[1] if found else None

    def sizes(self, key: str) -> tuple[int, ...]:
        """The numbers of an attribute such as ``lhs_contracting_dims={1,2}``."""
        found = re.search(rf"\b{key}={{([\d,]*)}}", self.attributes)
        return tuple(int(number) for number in found[1].split(",") if number) if found else ()


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions in the order of the text, which in a scheduled program is that of their execution."""

    name: str
    instructions: tuple[Instruction, ...]
    root: str

    @functools.cached_property
    def by_name(self) -> dict[str, Instruction]:
        return {one.name: one for one in self.instructions}

    @functools.cached_property
    def parameters(self) -> dict[int, str]:
        """Names of the parameters by number."""
        return {int(one.inside): one.name for one in self.instructions if one.op == "parameter"}

    @functools.cached_property
    def users(self) -> dict[str, list[tuple[Instruction, int]]]:
        """Who reads each instruction, and as which operand."""
        found: dict[str, list[tuple[Instruction, int]]] = {one.name: [] for one in self.instructions}
        for one in self.instructions:
            for place, name in enumerate(one.operands):
                found[name].append((one, place))
        return found


@dataclasses.dataclass(frozen=True)
class Module:
    """A whole program.  devices: that it runs on."""

    computations: dict[str, Computation]
    entry: str
    devices: int


_INSTRUCTION = re.compile(r"^\s+(?P<root>ROOT )?%?(?P<name>[\w.-]+) = (?P<type>.*?) (?P<op>[a-z][\w-]*)\((?P<rest>.*)$")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\](?:\{([^{}]*)\})?")
_TAIL = re.compile(r'^\}(, execution_thread="\w+")?\s*$')
_HEAD = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.-]+) \(.*\{$")


def parse(text: str) -> Module:
    """Reads ``compiled.as_text()``.  Raises ValueError for text without an entry computation."""
    computations: dict[str, Computation] = {}
    entry = name = ""
    lines: list[Instruction] = []
    root = ""
    for line in text.splitlines():
        if head := _HEAD.match(line):
            name, lines, root = head["name"], [], ""
            entry = name if head["entry"] else entry
        elif _TAIL.match(line) and name:
            computations[name] = Computation(name, tuple(lines), root or (lines[-1].name if lines else ""))
            name = ""
        elif name and (found := _INSTRUCTION.match(line)):
            inside, attributes = _split(found["rest"])
            operands = () if found["op"] in ("constant", "parameter") else tuple(re.findall(r"%([\w.-]+)", inside))
            lines.append(Instruction(found["name"], found["op"], shapes(found["type"]), operands, inside, attributes))
            root = found["name"] if found["root"] else root
        elif name and lines:  # metadata of a kernel may hold line breaks
            lines[-1] = dataclasses.replace(lines[-1], attributes=lines[-1].attributes + line)
    if not entry:
        raise ValueError("this is no compiled HLO: there is no ENTRY computation")
    first = text[: text.index("\n")]
    counts = [int(n) for n in re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", first)]
    return Module(computations, entry, math.prod(counts))


def shapes(text: str) -> tuple[Shape, ...]:
    """The arrays of a type, ``bf16[8,128]{1,0:T(8,128)S(1)}`` or a tuple of such."""
    found = []
    for dtype, dims, layout in _ARRAY.findall(text):
        space = re.search(r"S\((\d+)\)", layout)
        sizes = tuple(int(size.strip("<=")) for size in dims.split(",") if size)
        found.append(Shape(dtype, sizes, int(space[1]) if space else HBM))
    return tuple(found)


def _split(rest: str) -> tuple[str, str]:
    """What stands before and after the parenthesis that closes the operands."""
    depth = 1
    for place, letter in enumerate(rest):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return rest[:place], rest[place + 1 :]
    return rest, ""


def groups_of(attributes: str, devices: int) -> np.ndarray:
    """``[groups, members]``, the numbers of the devices that a collective joins; all of them where none are named.

    The notations of HLO: lists, ``[2,4]<=[8]``, ``[4,2]<=[2,4]T(1,0)``, ``mesh['a'=2,'b'=4] {'b'}``, and the last with
    the order of devices, ``mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}``.
    """
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        wanted, sizes, order = (tuple(int(n) for n in (part or "").split(",") if n) for part in found.groups())
        ids = np.arange(math.prod(sizes)).reshape(sizes)
        return (ids.transpose(order) if order else ids).reshape(wanted[0], -1)
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\](.*?)\{((?:'[^}]*)?)\}", attributes):
        sizes = {axis: int(size) for axis, size in re.findall(r"'([^']+)'=(\d+)", found[1])}
        ids = np.arange(math.prod(sizes.values()))
        if order := re.search(r"device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\)", found[2]):
            dims, moved = ([int(n) for n in (part or "").split(",") if n] for part in order.groups())
            ids = ids.reshape(dims).transpose(moved or range(len(dims)))
        elif listed := re.search(r"device_ids=\(([\d,]+)\)", found[2]):
            ids = np.array([int(n) for n in listed[1].split(",")])
        return _mesh_groups(ids.reshape(-1), sizes, re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", found[3]))
    if found := re.search(r"replica_groups=\{(\{[\d,{}]*\})\}", attributes):
        return np.array([[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", found[1])])
    return np.arange(devices)[None]


def _mesh_groups(ids: np.ndarray, sizes: dict[str, int], joined: list[tuple[str, str, str]]) -> np.ndarray:
    """joined: (axis, devices before the part of it that is joined, devices of that part); '' for the whole axis."""
    split: list[int] = []
    chosen: list[int] = []
    for axis, size in sizes.items():
        part = next((rest for name, *rest in joined if name == axis), None)
        if part is None:
            split.append(size)
        elif not part[0]:
            chosen.append(len(split))
            split.append(size)
        else:
            before, own = int(part[0]), int(part[1])
            chosen.append(len(split) + 1)
            split += [before, own, size // before // own]
    rest = [i for i in range(len(split)) if i not in chosen]
    members = math.prod(split[i] for i in chosen)
    return ids.reshape(split).transpose(*rest, *chosen).reshape(-1, members)


def axes_of(groups: np.ndarray, mesh: dict[str, int]) -> tuple[str, ...]:
    """Along which axes of the mesh the members of a group differ."""
    places = np.stack(np.unravel_index(groups, tuple(mesh.values())))  # [axes, groups, members]
    differ = (places != places[:, :, :1]).any(axis=(1, 2))
    return tuple(axis for axis, differs in zip(mesh, differ, strict=True) if differs)


def pairs_of(attributes: str) -> np.ndarray:
    """``[pairs, 2]``, source and target, of a collective-permute."""
    text = attributes.split("source_target_pairs={")[1]
    pairs = re.match(r"(?:\{\d+,\d+\},?)*", text)[0]
    return np.array([[int(n) for n in pair.split(",")] for pair in re.findall(r"\{(\d+,\d+)\}", pairs)])
