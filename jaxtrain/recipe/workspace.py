"""The folder of a run: where things lie, written so that a kill at any moment leaves it readable."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import jaxtrain
from jaxtrain.config_json import read_json
from jaxtrain.distributed import is_writer

# Changing these changes no number of a finished stage, so they are no part of the code version.  (What was imported is
# known by its digests.)
PRESENTATION = (
    "report",
    "plan",
    "rehearse",
    "interop",
    "main.py",
    "commands.py",
    "gin_edge.py",
    "config_text.py",
    "config_build.py",
)


def code_version() -> str:
    """A digest of the package's sources (presentation left out): a stage trained by other code is not up to date."""
    root = Path(jaxtrain.__file__).parent
    digest = hashlib.sha256(jaxtrain.__version__.encode())
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if name.parts[0] not in PRESENTATION:
            digest.update(f"{name.as_posix()}\0".encode() + path.read_bytes())
    return digest.hexdigest()


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Holds the run's folder; raises ValueError when another run does.  A killed holder lets go by itself.

    Of a run's processes the one that writes its files holds it.
    """
    if not is_writer():
        yield
        return
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
