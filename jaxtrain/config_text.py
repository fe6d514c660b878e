"""Writes a built configuration back as gin: the resolved config of a run, every field of every component.

The text is made from the objects, not from what was bound, so it holds every default and nothing without
effect; loading it again builds an equal tree.  Standard library only.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

from jaxtrain.config_json import to_json


def write(root: Any, names: Mapping[int, tuple[str, str]]) -> str:
    """Returns gin text that builds ``root``.

    Args:
        root: a tree of dataclasses.
        names: ``id(component) -> (scope, class name)`` of the components that gin built.  Others (a field's
            default that is itself a dataclass) are named here: by their owner's scope, with the field's name
            appended if that is taken by another value.
    """
    return _Writer(names).text(root)


class _Writer:
    def __init__(self, names: Mapping[int, tuple[str, str]]):
        self.names = names
        self.taken: dict[tuple[str, str], str | None] = dict.fromkeys(names.values())  # name -> the value's JSON
        self.blocks: dict[tuple[str, str], str] = {}

    def text(self, root: Any) -> str:
        self.component(root, ("", type(root).__name__))
        return "\n".join(block for block in self.blocks.values() if block)

    def component(self, value: Any, name: tuple[str, str]) -> None:
        """Writes one component under ``name``, then those it refers to."""
        if name in self.blocks:
            return
        self.taken[name] = _canonical(value)
        self.blocks[name] = ""  # its place: the root first, each component before those it refers to
        lines = []
        for field in dataclasses.fields(value):
            if field.init:
                literal = self.literal(getattr(value, field.name), name[0], field.name)
                lines.append(f"{'/'.join(filter(None, name))}.{field.name} = {literal}\n")
        self.blocks[name] = "".join(lines)

    def literal(self, value: Any, scope: str, field: str) -> str:
        if dataclasses.is_dataclass(value):
            name = self.names.get(id(value)) or self.free_name(value, scope, field)
            self.component(value, name)
            return f"@{'/'.join(filter(None, name))}()"
        if isinstance(value, tuple | list):
            items = [self.literal(item, scope, field) for item in value]
            return f"[{', '.join(items)}]"
        if isinstance(value, Mapping):
            items = [f"{key!r}: {self.literal(item, scope, field)}" for key, item in value.items()]
            return f"{{{', '.join(items)}}}"
        if isinstance(value, float) and math.isinf(value):
            return "1e999" if value > 0 else "-1e999"  # gin has no word for infinity, Python's reader overflows to it
        return repr(value)

    def free_name(self, value: Any, scope: str, field: str) -> tuple[str, str]:
        canonical, number = _canonical(value), 1
        candidate = (scope, type(value).__name__)
        while candidate in self.taken and self.taken[candidate] != canonical:
            inner = field if number == 1 else f"{field}_{number}"
            candidate, number = ("/".join(filter(None, (scope, inner))), type(value).__name__), number + 1
        return candidate


def _canonical(value: Any) -> str:
    return json.dumps(to_json(value), sort_keys=True)
