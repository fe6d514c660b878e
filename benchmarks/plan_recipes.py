"""The shipped recipes, planned by the real TPU compiler for the slices that they are meant for.

    pip install 'jaxtrain[tpu]'
    python benchmarks/plan_recipes.py [--only NAME] [--json FILE]

Nothing runs: memory, FLOPs and collectives are the compiler's, seconds are those of the roofline over its schedule.
Beside them stands what is counted by hand, which takes no compiler: ``memory_error`` and ``flops_error`` are how far
that is off.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

# name -> (recipe, slice, bindings)
CASES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "8B on v5p-128": ("llama3_8b_pretrain", "v5p:4x4x4", ()),
    "8B on v5e-256": ("llama3_8b_pretrain", "v5e:16x16", ("Stage.batch_size = 256", "MeshConfig.data = 16")),
    "70B on v5p-512": ("llama3_70b_pretrain", "v5p:4x8x8", ()),
    "70B on v6e-256": ("llama3_70b_pretrain", "v6e:16x16", ("MeshConfig.data = 1", "MeshConfig.fsdp = 256")),
}


def measure(name: str) -> dict[str, Any]:
    """One case's row."""
    from jaxtrain import gin_edge
    from jaxtrain.config import CONFIGURABLES, Recipe
    from jaxtrain.plan.chips import parse_topology
    from jaxtrain.plan.compile import missing
    from jaxtrain.plan.estimate import plan_stage

    file, topology, bindings = CASES[name]
    where = parse_topology(topology)
    if reason := missing(where):
        raise SystemExit(reason)
    recipe = gin_edge.load(Recipe, CONFIGURABLES, [f"recipes/{file}.gin"], bindings).config
    began = time.perf_counter()
    by_hand = plan_stage(recipe.stages[0], recipe, where, compiler=False)
    hand_seconds = time.perf_counter() - began
    found = plan_stage(recipe.stages[0], recipe, where, compiler=True)
    (part,) = found.parts
    return {
        "benchmark": "plan_recipes",
        "case": name,
        "topology": topology,
        "fits": found.fits,
        "gib_by_compiler": found.compiler_bytes_per_chip / 2**30,
        "gib_by_hand": found.hbm_bytes_per_chip / 2**30,
        "memory_error": found.hbm_bytes_per_chip / found.compiler_bytes_per_chip - 1,
        "flops": found.flops_per_step,
        "flops_error": by_hand.flops_per_step / found.flops_per_step - 1,
        "seconds": found.seconds_per_step,
        "seconds_by_hand": by_hand.seconds_per_step,
        "mfu": found.mfu(),
        "mfu_non_causal": found.mfu(causal=False),
        "tokens_per_second_per_chip": found.tokens_per_second_per_chip,
        "collectives_share": part.times.exposed / part.times.seconds,
        "days": found.days,
        "compile_seconds": part.compiled.seconds,
        "hand_seconds": hand_seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=CASES, help="one case alone")
    parser.add_argument("--json", type=Path, help="append the rows to this file")
    args = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    for name in CASES:
        if args.only not in (None, name):
            continue
        row = measure(name)
        print("  ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), flush=True)
        if args.json:
            with args.json.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
