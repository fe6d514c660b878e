"""The folder of a run: where things lie, written so that a kill at any moment leaves it readable."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jaxtrain

# Changing these changes no number of a finished stage, so they are no part of the code version.
PRESENTATION = ("report", "main.py", "commands.py", "gin_edge.py", "config_text.py", "config_build.py")


def hash_json(value: Any) -> str:
    """sha256 of canonical JSON, 64 hex digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def code_version() -> str:
    """A digest of the package's sources (presentation left out): a stage trained by other code is not up to date."""
    root = Path(jaxtrain.__file__).parent
    digest = hashlib.sha256(jaxtrain.__version__.encode())
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if name.parts[0] not in PRESENTATION:
            digest.update(f"{name.as_posix()}\0".encode() + path.read_bytes())
    return digest.hexdigest()


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


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Holds the run's folder; raises ValueError when another process does.  A killed holder lets go by itself."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{out} is in use by another jaxtrain process; wait for it, or choose another --out"
            ) from None
        yield


def stage_folder(out: Path, name: str) -> Path:
    """Where a stage of the run in ``out`` lies."""
    return out / "stages" / name


def claim_folder(folder: Path, key: str) -> None:
    """Makes ``folder`` the place of the stage whose inputs hash to ``key``.

    What other inputs left there is moved aside, never deleted.
    """
    record = folder / "inputs.json"
    found = read_json(record)
    if folder.exists() and (found is None or found["hash"] != key):
        old = "unknown" if found is None else found["hash"][:12]
        aside = folder.parent / "superseded" / f"{folder.name}-{old}"
        number = 0
        while aside.exists():
            number += 1
            aside = aside.with_name(f"{folder.name}-{old}-{number}")
        aside.parent.mkdir(parents=True, exist_ok=True)
        os.replace(folder, aside)
    folder.mkdir(parents=True, exist_ok=True)
