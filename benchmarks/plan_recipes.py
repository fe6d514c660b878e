"""The shipped recipes, planned by the real TPU compiler for the slices that they are meant for.

    pip install 'jaxtrain[tpu]'
    python benchmarks/plan_recipes.py [--only NAME] [--layers N ...] [--json FILE]

Nothing runs: memory, FLOPs and collectives are the compiler's, seconds are those of the roofline over its schedule.
Beside them stands what is counted by hand, which takes no compiler: ``memory_error`` and ``flops_error`` are how far
that is off.  Every case is planned in a process of its own, whose CPU seconds and memory are printed too; with
``--layers`` it is planned once for each depth.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

# name -> (recipe, slice, bindings)
CASES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "8B on v5p-128": ("llama3_8b_pretrain", "v5p:4x4x4", ()),
    "8B on v5e-256": ("llama3_8b_pretrain", "v5e:16x16", ("Stage.batch_size = 256", "MeshConfig.data = 16")),
    "70B on v5p-512": ("llama3_70b_pretrain", "v5p:4x8x8", ()),
    "70B on v6e-256": ("llama3_70b_pretrain", "v6e:16x16", ("MeshConfig.data = 1", "MeshConfig.fsdp = 256")),
    "MoE 16B on v5p-128": ("deepseek_v2_lite_pretrain", "v5p:4x4x4", ()),
    "Qwen3 8B SFT on v5e-64": ("qwen3_8b_sft", "v5e:8x8", ()),
    "Qwen3 8B DPO on v5e-64": ("qwen3_8b_dpo", "v5e:8x8", ()),
    "Qwen3 1.7B PPO on v5p-32": ("qwen3_1_7b_ppo", "v5p:2x2x4", ()),
    "8B at 128k on v5p-128": ("llama3_8b_long", "v5p:4x4x4", ()),
}


def cpu_seconds() -> float:
    """Of this process, all threads."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def measure(name: str, layers: int | None = None) -> list[dict[str, Any]]:
    """A row of the case, then one of each of its programs where it has several."""
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
    if layers:
        kind = type(recipe.stages[0].model).__name__
        bindings = (*bindings, f"{kind}.num_layers = {layers}")
        recipe = gin_edge.load(Recipe, CONFIGURABLES, [f"recipes/{file}.gin"], bindings).config
    began = cpu_seconds()
    by_hand = plan_stage(recipe.stages[0], recipe, where, compiler=False)
    hand_seconds = cpu_seconds() - began
    began = cpu_seconds()
    found = plan_stage(recipe.stages[0], recipe, where, compiler=True, by_hand=by_hand)
    compile_seconds = cpu_seconds() - began
    row = {
        "benchmark": "plan_recipes",
        "case": name,
        "layers": recipe.stages[0].model.num_layers,
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
        "collectives_share": sum(part.program.calls * part.times.exposed for part in found.parts)
        / found.seconds_per_step,
        "emulated_all_gathers": sum(_emulated(part) for part in found.parts),
        "unpriced_kernels": sum(len(part.compiled.program.unpriced) for part in found.parts if part.compiled.program),
        "days": found.days,
        "compile_cpu_seconds": compile_seconds,
        "hand_cpu_seconds": hand_seconds,
        "peak_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }
    parts = [
        {
            "benchmark": "plan_recipes",
            "case": name,
            "program": part.program.name,
            "calls": part.program.calls,
            "gib_by_compiler": where.chip.devices * part.bytes_by_compiler / 2**30,
            "gib_by_hand": where.chip.devices * part.memory.total / 2**30,
            "seconds": part.program.calls * part.times.seconds,
            "collectives_share": part.times.exposed / part.times.seconds if part.times.seconds else 0.0,
            "emulated_all_gathers": _emulated(part),
        }
        for part in found.parts
    ]
    return [row, *(parts if len(parts) > 1 else [])]


def _emulated(part: Any) -> int:
    """How often a call sends an all-reduce where an all-gather would do."""
    return sum(row["count"] for row in part.collectives if row["emulates_all_gather"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=CASES, help="one case alone, in this process")
    parser.add_argument("--layers", type=int, nargs="+", default=[0], help="other depths than the recipe's")
    parser.add_argument("--json", type=Path, help="append the rows to this file")
    args = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if args.only is None or len(args.layers) > 1:
        rest = [] if args.json is None else ["--json", str(args.json)]
        for name in [args.only] if args.only else CASES:
            for layers in args.layers:
                argv = [sys.executable, __file__, "--only", name, "--layers", str(layers), *rest]
                subprocess.run(argv, check=True)
        return
    for row in measure(args.only, args.layers[0] or None):
        print("  ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), flush=True)
        if args.json:
            with args.json.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
