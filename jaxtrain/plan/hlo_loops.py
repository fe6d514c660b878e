"""How often a loop of a compiled program turns, read from its counter."""

from __future__ import annotations

import dataclasses
import re

from jaxtrain.plan.hlo_text import Computation, Instruction, Module


@dataclasses.dataclass(frozen=True)
class _Element:
    """An element of a loop's state, and what has been added to it."""

    index: int
    added: int = 0


@dataclasses.dataclass(frozen=True)
class _Test:
    left: _Value
    right: _Value
    direction: str


_Value = int | _Element | _Test | None


def _is_sum(left: _Value, right: _Value) -> bool:
    return isinstance(left, _Element) and isinstance(right, int)


def turns_of(module: Module, body: Computation, loop: Instruction) -> int | None:
    """From the compiler's note, or from the loop's counter: where it starts (0 if that is not told here), what is
    added to it in a turn, and the constant that it is compared with.  None where these are not found."""
    if found := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(found[1])
    test = value_of(module, loop.called("condition"), module.computations[loop.called("condition")].root)
    if not (isinstance(test, _Test) and isinstance(test.right, int) and isinstance(test.left, _Element)):
        return None
    index, limit = test.left.index, test.right
    inner = module.computations[loop.called("body")]
    changed = inner.by_name[inner.root].operands
    step = value_of(module, inner.name, changed[index]) if index < len(changed) else None
    if not isinstance(step, _Element) or step.index != index or step.added <= 0:
        return None
    given = body.by_name[loop.operands[0]]
    start = value_of(module, body.name, given.operands[index]) if given.op == "tuple" else 0
    distance = limit - (start if isinstance(start, int) else 0) + (test.direction == "LE")
    return max(0, -(-distance // step.added))


def value_of(module: Module, name: str, wanted: str, given: tuple[_Value, ...] | None = None) -> _Value:
    """What is known of an integer: a constant, an element of the computation's parameter plus a constant, or how
    two such compare.  given: of the parameters, where the computation is fused into another."""
    body = module.computations[name]
    one = body.by_name[wanted]

    def of(place: int) -> _Value:
        return value_of(module, name, one.operands[place], given)

    if one.op == "constant" and one.shape.dims == () and one.shape.dtype[0] in "su":
        return int(one.inside)
    if one.op == "parameter" and given is not None:
        return given[int(one.inside)]
    if one.op == "get-tuple-element" and body.by_name[one.operands[0]].op == "parameter":
        return _Element(int(re.search(r"index=(\d+)", one.attributes)[1]))
    if one.op in ("bitcast", "copy", "convert", "reshape"):
        return of(0)
    if one.op == "add":
        left, right = of(0), of(1)
        if isinstance(left, int):
            left, right = right, left
        return dataclasses.replace(left, added=left.added + right) if _is_sum(left, right) else None
    if one.op == "compare":
        direction = re.search(r"direction=(\w+)", one.attributes)[1]
        return _Test(of(0), of(1), direction) if direction in ("LT", "LE", "NE") else None
    if one.op in ("fusion", "call"):
        inner = module.computations[one.called("calls") or one.called("to_apply")]
        return value_of(module, inner.name, inner.root, tuple(of(place) for place in range(len(one.operands))))
    return None
