"""Configuration as JSON: what run directories record and stages are hashed by.  Standard library only."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
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


def hash_json(value: Any) -> str:
    """sha256 of canonical JSON, 64 hex digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Writes whole or not at all."""
    scratch = path.with_name(path.name + ".tmp")
    with scratch.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1, ensure_ascii=False)
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, path)


def read_json(path: Path) -> Any | None:
    """The value, or None where there is no such file.  Raises ValueError for a damaged one."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged ({error}); delete it and run again") from error
