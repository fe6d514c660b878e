"""Checks configuration values against the annotations of the dataclass fields they are meant for.

gin hands over whatever literal the file holds: ``'abc'`` for an int, ``1e6`` for an int, ``True`` for an int.
``convert`` is where such a value is refused, naming where in the value it stands.  Standard library only.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import types
import typing
from typing import Any, Literal


class Mismatch(Exception):
    """A value does not fit its annotation.  ``path`` leads into the value ('' or ``[2]``, ``['a']`` …)."""

    def __init__(self, expected: str, found: Any, *, path: str = "", hint: str = ""):
        super().__init__(expected)
        self.expected, self.found, self.path, self.hint = expected, found, path, hint


def convert(value: Any, annotation: Any, *, default: Any = dataclasses.MISSING) -> Any:
    """Returns ``value`` in the form that ``annotation`` asks for, or raises ``Mismatch``.

    Two conversions are made, both without loss: an int where a float is wanted, and a list where a tuple is.
    A Protocol, a Callable or Any takes only dataclass instances (components, made by references); there None
    passes when ``default``, the field's own, is None.
    """
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is None or annotation is type(None):
        if value is None:
            return None
    elif origin is typing.Union or origin is types.UnionType:
        return _convert_union(value, annotation, arguments)
    elif origin is Literal:
        if any(value == choice and type(value) is type(choice) for choice in arguments):
            return value
    elif annotation is float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    elif annotation is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        if isinstance(value, float) and value.is_integer():
            raise Mismatch("int", value, hint=f"write {int(value)}")
    elif annotation in (bool, str):
        if isinstance(value, annotation):
            return value
    elif annotation is tuple or origin in (tuple, collections.abc.Sequence):
        if isinstance(value, list | tuple):
            return _convert_items(tuple(value), annotation, origin, arguments)
    elif annotation is dict or origin in (dict, collections.abc.Mapping):
        if isinstance(value, dict):
            return _convert_mapping(value, arguments)
    elif annotation is Any or origin is collections.abc.Callable or _is_protocol(annotation):
        return _convert_component(value, annotation, origin, default)
    elif isinstance(annotation, type):
        if isinstance(value, annotation):
            return value
    else:
        raise TypeError(f"configuration fields cannot be annotated {annotation!r}")
    raise Mismatch(describe(annotation), value)


def describe(annotation: Any) -> str:
    """Names an annotation as its author wrote it: ``int``, ``tuple[Stage, ...]``, ``LM | SFT``."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return " | ".join(describe(arm) for arm in typing.get_args(annotation))
    if typing.get_origin(annotation) is Literal:
        return " or ".join(repr(choice) for choice in typing.get_args(annotation))
    if arguments := [a for a in typing.get_args(annotation) if not isinstance(a, list)]:
        name = getattr(typing.get_origin(annotation), "__name__", str(annotation))
        return f"{name}[{', '.join('...' if a is Ellipsis else describe(a) for a in arguments)}]"
    return "None" if annotation is type(None) else getattr(annotation, "__name__", str(annotation))


def _convert_union(value: Any, annotation: Any, arms: tuple[Any, ...]) -> Any:
    found, mismatches = [], []
    for arm in arms:
        try:
            found.append(convert(value, arm))
        except Mismatch as error:
            mismatches.append(error)
    # 3 for ``float | int`` stays an int: an arm that keeps the value as it is wins over one that converts it.
    for candidate in found:
        if type(candidate) is type(value):
            return candidate
    if found:
        return found[0]
    # ``tuple[int, ...] | None`` given (1, 'a'): the arm that got furthest into the value says most.
    deepest = max(mismatches, key=lambda error: (len(error.path), len(error.hint)))
    if deepest.path:
        raise deepest
    raise Mismatch(describe(annotation), value, hint=deepest.hint)


def _convert_items(value: tuple, annotation: Any, origin: Any, arguments: tuple[Any, ...]) -> tuple:
    if not arguments:
        wanted = [Any] * len(value)
    elif origin is not tuple or arguments[-1] is Ellipsis:
        wanted = [arguments[0]] * len(value)
    else:
        wanted = list(arguments)
    if len(wanted) != len(value):
        raise Mismatch(f"{describe(annotation)} of length {len(wanted)}", value)
    return tuple(_nested(item, kind, f"[{i}]") for i, (item, kind) in enumerate(zip(value, wanted, strict=True)))


def _convert_mapping(value: dict, arguments: tuple[Any, ...]) -> dict:
    key_kind, item_kind = arguments or (str, Any)
    return {_nested(key, key_kind, " key"): _nested(item, item_kind, f"[{key!r}]") for key, item in value.items()}


def _nested(value: Any, annotation: Any, where: str) -> Any:
    try:
        return convert(value, annotation)
    except Mismatch as error:
        error.path = where + error.path
        raise


def _convert_component(value: Any, annotation: Any, origin: Any, default: Any) -> Any:
    if value is None and default is None:
        return None
    name = "component" if annotation is Any else describe(annotation)
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        raise Mismatch(name, value, hint="refer to one as @Name()")
    needed = {"__call__"} if origin is collections.abc.Callable else _protocol_members(annotation)
    if missing := sorted(member for member in needed if not hasattr(value, member)):
        raise Mismatch(name, value, hint=f"{type(value).__name__} has no {', '.join(missing)}")
    return value


def _is_protocol(annotation: Any) -> bool:
    return isinstance(annotation, type) and getattr(annotation, "_is_protocol", False)


def _protocol_members(annotation: Any) -> set[str]:
    # typing.get_protocol_members is Python 3.13's.
    if annotation is Any:
        return set()
    bases = [base for base in annotation.__mro__ if base is not typing.Protocol and _is_protocol(base)]
    names = {name for base in bases for name in [*vars(base), *vars(base).get("__annotations__", {})]}
    return {name for name in names if name == "__call__" or not name.startswith("_")}
