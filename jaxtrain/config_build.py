"""Builds a tree of dataclasses from bindings: gin's scopes, references and macros, with every type checked.

What the statements of a configuration mean, apart from how they are written (``gin_edge`` reads that).
Standard library only.
"""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Iterable
from typing import Any

from jaxtrain import config_types

Key = tuple[str, str, str]  # scope ('' or 'a/b'), class name, field; a macro is (scope, macro name, '')


@dataclasses.dataclass(frozen=True)
class Reference:
    scope: str
    name: str
    called: bool

    def __repr__(self):
        return "@" + _join(self.scope, self.name) + "()" * self.called


@dataclasses.dataclass(frozen=True)
class Macro:
    name: str

    def __repr__(self):
        return f"%{self.name}"


@dataclasses.dataclass(frozen=True)
class Binding:
    value: Any
    where: str


class Builder:
    """Builds what references ask for.  What (scope, class) gives is built once: bindings fix it entirely."""

    def __init__(self, classes: dict[str, type], bindings: dict[Key, Binding]):
        self.classes, self.bindings = classes, bindings
        self.built: dict[tuple[str, str], Any] = {}
        self.used: set[Key] = set()
        self.active: list[str] = []
        for (scope, name, field), binding in bindings.items():
            if field and field not in (known := _fields(classes[name])):
                raise ValueError(
                    f"{binding.where}: {_join(scope, name)}.{field}: {name} has no field {field!r}"
                    f"{nearest(field, known)}"
                )

    def build(self, scope: str, name: str, where: str) -> Any:
        label = _join(scope, name)
        if name not in self.classes:
            raise ValueError(f"unknown name {name!r} in @{label}(), {where}{nearest(name, self.classes)}")
        if (scope, name) in self.built:
            return self.built[scope, name]
        if label in self.active:
            raise ValueError(f"reference cycle {' -> '.join((*self.active, label))}, {where}")
        self.active.append(label)
        cls = self.classes[name]
        annotations = typing.get_type_hints(cls)
        values = {}
        for field in _fields(cls).values():
            binding = self.lookup(scope, name, field.name)
            if binding is not None:
                values[field.name] = self.value(binding, scope, f"{label}.{field.name}", annotations[field.name], field)
            elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
                expected = config_types.describe(annotations[field.name])
                raise ValueError(f"{label}.{field.name} ({expected}) is required and not bound; {label} is {where}")
        try:
            self.built[scope, name] = cls(**values)
        except ValueError as error:
            raise ValueError(f"{label}: {error}") from error
        self.active.pop()
        return self.built[scope, name]

    def lookup(self, scope: str, name: str, field: str) -> Binding | None:
        """The binding of the longest prefix of ``scope`` that has one.  Shorter ones count as used, too."""
        found = None
        for prefix in _prefixes(scope):
            if (prefix, name, field) in self.bindings:
                self.used.add((prefix, name, field))
                found = self.bindings[prefix, name, field]
        return found

    def value(self, binding: Binding, scope: str, label: str, annotation: Any, field: dataclasses.Field) -> Any:
        value = self.resolve(binding.value, scope, f"{label}, bound at {binding.where}")
        try:
            return config_types.convert(value, annotation, default=field.default)
        except config_types.Mismatch as error:
            hint = f" ({error.hint})" if error.hint else ""
            found = type(error.found).__name__
            if not dataclasses.is_dataclass(error.found):
                found = f"{error.found!r} ({found})"
            message = f"{label}{error.path}: expected {error.expected}, found {found}{hint}"
            raise ValueError(f"{message}, bound at {binding.where}") from error

    def resolve(self, value: Any, scope: str, where: str) -> Any:
        """Replaces references and macros, at any depth, by what they stand for."""
        if isinstance(value, Reference):
            if not value.called:
                raise ValueError(f"{where}: {value!r} refers to a class; write {value!r}() for an instance")
            return self.build(value.scope or scope, value.name, f"referred to by {where}")
        if isinstance(value, Macro):
            return self.macro(value.name, where)
        if isinstance(value, list | tuple):
            return type(value)(self.resolve(item, scope, where) for item in value)
        if isinstance(value, dict):
            items = value.items()
            return {self.resolve(k, scope, where): self.resolve(v, scope, where) for k, v in items}
        return value

    def macro(self, name: str, where: str) -> Any:
        scope, _, last = name.rpartition("/")
        macros = [_join(s, n) for s, n, field in self.bindings if not field]
        binding = self.lookup(scope, last, "")
        if binding is None:
            raise ValueError(f"{where}: unknown macro %{name}{nearest(name, macros)}")
        if f"%{name}" in self.active:
            raise ValueError(f"{where}: macro cycle: {' -> '.join((*self.active, f'%{name}'))}")
        self.active.append(f"%{name}")
        value = self.resolve(binding.value, name, f"%{name}, bound at {binding.where}")
        self.active.pop()
        return value

    def refuse_unused(self) -> None:
        problems = []
        for (scope, name, field), binding in self.bindings.items():
            if (scope, name, field) in self.used:
                continue
            if not field:
                problems.append(f"macro {_join(scope, name)} is never used, bound at {binding.where}")
                continue
            built = sorted(_join(s, n) for s, n in self.built if n == name)
            why = f"{name} is built as {', '.join(built)}" if built else f"nothing refers to @{_join(scope, name)}()"
            problems.append(f"{_join(scope, name)}.{field} has no effect: {why}; bound at {binding.where}")
        if problems:
            raise ValueError("unused bindings:\n  " + "\n  ".join(problems))


def _fields(cls: type) -> dict[str, dataclasses.Field]:
    return {field.name: field for field in dataclasses.fields(cls) if field.init}


def _prefixes(scope: str) -> list[str]:
    parts = scope.split("/") if scope else []
    return ["/".join(parts[:i]) for i in range(len(parts) + 1)]


def _join(scope: str, name: str) -> str:
    return f"{scope}/{name}" if scope else name


def nearest(name: str, known: Iterable[str]) -> str:
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3)
    folded = [k for k in known if k.lower() == name.lower() and k not in close]
    if folded or close:
        return f"; did you mean {' or '.join([*folded, *close])}?"
    return f"; known: {', '.join(known)}" if known else ""
