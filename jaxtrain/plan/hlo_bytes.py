"""HBM bytes that the instructions of a compiled program read and write."""

from __future__ import annotations

import functools
import math

from jaxtrain.plan.hlo_text import HBM, Computation, Instruction, Module, Shape

COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)


class Traffic:
    """Of one program.  A chip's own small memories count for nothing."""

    def __init__(self, module: Module):
        self.module = module

    def bytes(self, body: Computation, one: Instruction) -> float:
        """HBM bytes read and written by one instruction outside of fusions."""
        operands = [body.by_name[name].shapes for name in one.operands]
        if one.op == "fusion":
            inner = one.called("calls")
            read = sum(
                min(_in_hbm(shapes), self._read(inner, place)) if _in_hbm(shapes) else 0.0
                for place, shapes in enumerate(operands)
            )
            written = self._written(inner, self.module.computations[inner].root)
            pairs = zip(one.shapes, written, strict=True) if len(one.shapes) == len(written) else ()
            return read + (
                sum(min(size, shape.bytes) for shape, size in pairs if shape.space == HBM)
                if pairs
                else _in_hbm(one.shapes)
            )
        if one.op in ("dynamic-slice", "slice", "gather"):
            return _in_hbm(one.shapes) + (one.shape.bytes if _in_hbm(operands[0]) else 0.0)
        if one.op in ("dynamic-update-slice", "scatter"):
            update = operands[1 if one.op == "dynamic-update-slice" else 2]
            return _in_hbm(update) + (update[0].bytes if one.shape.space == HBM else 0.0)
        return _in_hbm(one.shapes) + sum(map(_in_hbm, operands))

    @functools.cache  # noqa: B019  (as long as one walk)
    def _read(self, name: str, place: int) -> float:
        """How many bytes a fused computation reads of its parameter: slices count for what they take."""
        body = self.module.computations[name]
        start = body.parameters.get(place)
        if start is None:
            return math.inf

        def of(value: str) -> float:
            total = 0.0
            for user, position in body.users[value]:
                if user.op in ("dynamic-slice", "slice", "gather") and position == 0:
                    total += user.shape.bytes
                elif user.op in ("dynamic-update-slice", "scatter") and position == 0:
                    continue  # in place
                elif user.op in COLLECTIVES or user.op == "custom-call":
                    continue  # a collective's own traffic, and what it hands on
                elif user.op == "bitcast":
                    total += of(user.name)
                elif user.op == "fusion":
                    total += self._read(user.called("calls"), position)
                elif user.op != "tuple":
                    return math.inf
            return total

        return of(start)

    def _written(self, name: str, value: str) -> list[float]:
        """Bytes that a fused computation writes for each array of its result: an update in place only its part."""
        body = self.module.computations[name]
        one = body.by_name[value]
        if one.op == "tuple":
            return [size for operand in one.operands for size in self._written(name, operand)]
        if one.op == "bitcast":
            return self._written(name, one.operands[0])
        if one.op in ("dynamic-update-slice", "scatter"):
            return [body.by_name[one.operands[1 if one.op == "dynamic-update-slice" else 2]].shape.bytes]
        if one.op == "fusion":
            return self._written(one.called("calls"), self.module.computations[one.called("calls")].root)
        handed_on = one.op in COLLECTIVES or one.op in ("parameter", "custom-call")
        return [0.0 if handed_on else shape.bytes for shape in one.shapes]


def _in_hbm(shapes: tuple[Shape, ...]) -> float:
    return sum(shape.bytes for shape in shapes if shape.space == HBM)
