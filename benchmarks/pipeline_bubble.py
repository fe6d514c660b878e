"""How much of a pipelined step is bubble: counted from the program that the real TPU compiler made, beside the formula.

    pip install 'jaxtrain[tpu]'
    python benchmarks/pipeline_bubble.py [--json FILE]

Nothing runs.  Idle stages compute what nobody reads, so that the bubble is what a device computes in its layers beyond
its share: the same model without stages, at two depths, tells layers from embedding and head.  Seconds are those of the
roofline over the compiled schedule (``jaxtrain plan``), for a step of as many tokens on as many chips.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

TOPOLOGY = "v5e:2x4"
DEPTH = 8
SIZES = ("d_model = 1024", "num_heads = 8", "num_kv_heads = 8", "d_ff = 2048", "max_positions = 2048")
ROWS = 64
# (stages, rounds, microbatches)
SCHEDULES = ((2, 1, 8), (4, 1, 4), (4, 1, 16), (4, 2, 16), (2, 4, 8))


def planned(depth: int, stages: int, rounds: int, microbatches: int) -> Any:
    """The plan of a step, by the compiler."""
    from jaxtrain import gin_edge
    from jaxtrain.config import CONFIGURABLES, Recipe
    from jaxtrain.plan.chips import parse_topology
    from jaxtrain.plan.compile import missing
    from jaxtrain.plan.estimate import plan_stage

    where = parse_topology(TOPOLOGY)
    if reason := missing(where):
        raise SystemExit(reason)
    model = (*SIZES, f"num_layers = {depth}", f"pipeline_rounds = {rounds}", f"pipeline_microbatches = {microbatches}")
    bindings = [f"LlamaConfig.{binding}" for binding in model]
    bindings += [f"Stage.batch_size = {ROWS}", "TextDataset.seq_len = 2048"]
    mesh = {"data": where.devices // stages, "fsdp": 1, "stage": stages, "zero_data": True}
    bindings += [f"MeshConfig.{name} = {value}" for name, value in mesh.items()]
    recipe = gin_edge.load(Recipe, CONFIGURABLES, ["recipes/llama3_8b_pretrain.gin"], bindings).config
    return plan_stage(recipe.stages[0], recipe, where, compiler=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="append the rows to this file")
    args = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from jaxtrain.models.pipeline import bubble

    whole, half = (planned(depth, 1, 1, 0).parts[0] for depth in (DEPTH, DEPTH // 2))
    layers = 2 * (whole.flops - half.flops)
    for stages, rounds, microbatches in SCHEDULES:
        found = planned(DEPTH, stages, rounds, microbatches)
        (part,) = found.parts
        row = {
            "benchmark": "pipeline_bubble",
            "topology": TOPOLOGY,
            "stages": stages,
            "rounds": rounds,
            "microbatches": microbatches,
            "bubble": bubble(stages, microbatches, rounds),
            "bubble_compiled": 1 - layers / (part.flops - (whole.flops - layers)),
            "gib": found.compiler_bytes_per_chip / 2**30,
            "seconds": found.seconds_per_step,
            "seconds_without_stages": whole.times.seconds,
        }
        print("  ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), flush=True)
        if args.json:
            with args.json.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
