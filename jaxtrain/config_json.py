"""Configuration as JSON: what run directories record and stages are hashed by.  Standard library only."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any


def to_json(value: Any) -> Any:
    """Turns a tree of dataclasses into plain JSON values, the same for equal trees in every process.

    A dataclass becomes ``{"@": "ClassName", field: ...}`` with its fields in order, a tuple or list becomes a
    list, a mapping keeps its string keys, sorted.  Numbers keep their type (``1`` and ``1.0`` differ, as they
    must in a hash).  Infinities become ``{"@": "float", "value": "inf"}``, since JSON has none.

    Raises:
        ValueError: a float is NaN, which equals nothing and so can be neither hashed nor compared; or a
            mapping has a key that is no string, or is ``"@"``.
        TypeError: a value of any other type, such as an array or a function.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"@": type(value).__name__, **fields}
    if isinstance(value, float):
        if math.isnan(value):
            raise ValueError("a configuration value is NaN; give it a number")
        return value if math.isfinite(value) else {"@": "float", "value": str(value)}
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, tuple | list):
        return [to_json(item) for item in value]
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) and key != "@" for key in value):
            raise ValueError(f"a mapping in a configuration needs string keys other than '@', found {list(value)}")
        return {key: to_json(value[key]) for key in sorted(value)}
    raise TypeError(f"a configuration cannot hold a {type(value).__name__}: {value!r}")


def from_json(value: Any, classes: Mapping[str, type]) -> Any:
    """The inverse of ``to_json`` for trees of ``classes``, by name.  Lists become tuples.

    Raises ValueError for a class that is not among them, and what the class raises for its fields.
    """
    if isinstance(value, list):
        return tuple(from_json(item, classes) for item in value)
    if not isinstance(value, dict):
        return value
    if value.get("@") == "float":
        return float(value["value"])
    if "@" not in value:
        return {key: from_json(item, classes) for key, item in value.items()}
    if value["@"] not in classes:
        raise ValueError(f"cannot rebuild a {value['@']!r}; known: {sorted(classes)}")
    fields = {key: from_json(item, classes) for key, item in value.items() if key != "@"}
    try:
        return classes[value["@"]](**fields)
    except TypeError as error:
        raise ValueError(f"a {value['@']} saved by another version of the code: {error}") from error
