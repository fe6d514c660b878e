"""Compiles MaxText's train step ahead of time and writes down what the compiler made of it.

Runs in MaxText's own environment, started by ``plan_vs_maxtext.py``: MaxText's ``train_compile`` keeps the compiled
object to itself, so its last step is wrapped here.

    python benchmarks/maxtext_compile.py FOLDER KEY=VALUE...

FOLDER gets ``program.hlo`` (the scheduled text) and ``compiled.json``: bytes of a device by part, the mesh, CPU seconds
of lowering and compiling, the most resident memory and versions.  KEY=VALUE are MaxText's own settings.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import resource
import sys
from pathlib import Path

import jax
from maxtext.configs import pyconfig
from maxtext.trainers.pre_train import train_compile


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main(folder: Path, settings: list[str]) -> None:
    original = train_compile.jit_and_compile

    def jit_and_compile(func, args, kwargs, mesh, *rest):
        before = cpu_seconds()
        compiled = original(func, args, kwargs, mesh, *rest)
        seconds = cpu_seconds() - before
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
            "versions": {name: importlib.metadata.version(name) for name in ("maxtext", "jax", "libtpu")},
        }
        (folder / "program.hlo").write_text(compiled.as_text(), encoding="utf-8")
        (folder / "compiled.json").write_text(json.dumps(found), encoding="utf-8")
        return compiled

    train_compile.jit_and_compile = jit_and_compile
    jax.config.update("jax_enable_compilation_cache", False)
    base = Path(pyconfig.__file__).with_name("base.yml")
    train_compile.main([sys.argv[0], os.fspath(base), *settings])


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
