"""Compiles what the arguments name for chips that this machine does not have, and prints it as JSON; run by
test_compile.py in a process of its own, since libtpu is loaded once a process.

    python compile_tpu.py RECIPE.gin TOPOLOGY STAGE [BINDING ...]
"""

from __future__ import annotations

import json
import sys

import jax

from jaxtrain import gin_edge
from jaxtrain.config import CONFIGURABLES, Recipe
from jaxtrain.plan.analytic import executed_flops
from jaxtrain.plan.chips import parse_topology
from jaxtrain.plan.estimate import plan_stage
from jaxtrain.plan.programs import abstract_mesh


def main(file: str, topology: str, name: str, *bindings: str) -> None:
    jax.config.update("jax_platforms", "cpu")
    where = parse_topology(topology)
    recipe = gin_edge.load(Recipe, CONFIGURABLES, [file], bindings).config
    stage = next(one for one in recipe.stages if one.name == name)
    found = plan_stage(stage, recipe, where, compiler=True)
    mesh = abstract_mesh(stage.mesh, where)
    parts = [
        {
            "name": part.program.name,
            "by_hand": list(executed_flops(part.program, mesh)),
            "walked": list(part.compiled.program.totals()) if part.compiled and part.compiled.program else None,
            "unknown": part.compiled.program.unknown if part.compiled and part.compiled.program else None,
            "fits": part.compiled.fits if part.compiled else None,
            "bytes": part.bytes_by_compiler,
            "bytes_by_hand": part.memory.total,
            "collectives": part.collectives,
        }
        for part in found.parts
    ]
    print(json.dumps({"fits": found.fits, "parts": parts}))


if __name__ == "__main__":
    main(*sys.argv[1:])
