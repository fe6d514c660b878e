"""What the compiler made of a step, as files: written in two environments, so with nothing but JAX's own objects."""

from __future__ import annotations

import json
import resource
from importlib.metadata import version
from pathlib import Path
from typing import Any


def cpu_seconds() -> float:
    """Of this process, all threads."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def write(folder: Path, compiled: Any, mesh: Any, seconds: float, packages: tuple[str, ...]) -> None:
    """``program.hlo``, the scheduled text, and ``compiled.json``: bytes of a device by part, the mesh, CPU seconds of
    lowering and compiling, the process's most resident memory, and versions of packages."""
    memory = compiled.memory_analysis()
    found = {
        "allocated": memory.peak_memory_in_bytes,
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
        "mesh": dict(mesh.shape),
        "cpu_seconds": seconds,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "versions": {name: version(name) for name in packages},
    }
    (folder / "program.hlo").write_text(compiled.as_text(), encoding="utf-8")
    (folder / "compiled.json").write_text(json.dumps(found), encoding="utf-8")
