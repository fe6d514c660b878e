"""All-gathers that a compiled program does by all-reduce, at twice the traffic: parts among zeros, added up.

TPUs' compiler does so where it has no all-gather for the axes, as over all three of v5p's torus together.
"""

from __future__ import annotations

from jaxtrain.plan.hlo_text import Computation, Instruction, Module


def among_zeros(module: Module, body: Computation, name: str) -> bool:
    """Whether a value is a part of an array, written into a whole one that holds one number."""
    one = _origin(body, name)
    if one.op != "fusion":
        return one.op == "dynamic-update-slice" and _is_filled(module, body, one.operands[0])
    inner = module.computations[one.called("calls")]
    root = _origin(inner, inner.root)
    if root.op != "dynamic-update-slice":
        return False
    whole = _origin(inner, root.operands[0])
    if whole.op == "parameter":
        return _is_filled(module, body, one.operands[int(whole.inside)])
    return _is_filled(module, inner, whole.name)


def _is_filled(module: Module, body: Computation, name: str) -> bool:
    one = _origin(body, name)
    if one.op == "fusion":
        inner = module.computations[one.called("calls")]
        one = _origin(inner, inner.root)
    return one.op == "broadcast"


def _origin(body: Computation, name: str) -> Instruction:
    """Where a value comes from, past copies."""
    one = body.by_name[name]
    while one.op in ("copy", "copy-start", "copy-done", "bitcast"):
        one = body.by_name[one.operands[0]]
    return one
