"""Compiles MaxText's train step ahead of time and writes down what the compiler made of it.

Runs in MaxText's own environment, started by ``plan_vs_maxtext.py``: MaxText's ``train_compile`` keeps the compiled
object to itself, so its last step is wrapped here.

    python benchmarks/maxtext_compile.py FOLDER KEY=VALUE...

FOLDER gets ``program.hlo`` (the scheduled text) and ``compiled.json``: bytes of a device by part, the mesh, CPU seconds
of lowering and compiling, the most resident memory and versions.  KEY=VALUE are MaxText's own settings.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import jax
from compiled import cpu_seconds, write
from maxtext.configs import pyconfig
from maxtext.trainers.pre_train import train_compile


def main(folder: Path, settings: list[str]) -> None:
    original = train_compile.jit_and_compile

    def jit_and_compile(func, args, kwargs, mesh, *rest):
        before = cpu_seconds()
        compiled = original(func, args, kwargs, mesh, *rest)
        seconds = cpu_seconds() - before
        write(folder, compiled, mesh, seconds, ("maxtext", "jax", "libtpu"))
        return compiled

    train_compile.jit_and_compile = jit_and_compile
    jax.config.update("jax_enable_compilation_cache", False)
    base = Path(pyconfig.__file__).with_name("base.yml")
    train_compile.main([sys.argv[0], os.fspath(base), *settings])


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
