"""Published step times beside what the plan predicts for the same model, batch, sequence, remat and slice.

    python benchmarks/plan_published.py [--only NAME] [--compile] [--json FILE]

Without ``--compile`` the plan counts by hand; with it, the TPU compiler (the ``tpu`` extra) is asked as well, for about
a minute a row.  Every row gives its source.  What a source leaves open is said under ``open``; where our model, mesh or
optimizer cannot be the published one, under ``differs``.  Nothing in the plan is fitted to these rows.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

RECIPE = "recipes/llama3_8b_pretrain.gin"
TPU_RECIPES = "https://github.com/AI-Hypercomputer/tpu-recipes/blob/main/training"
MAXTEXT = "https://github.com/AI-Hypercomputer/maxtext/blob/0ed7bd529b9d690570473c3525d1efeda6b6c944/MaxText/configs"
TIERING = "https://maxtext.readthedocs.io/en/maxtext-v0.2.0/reference/models/tiering.html"
FLAGS = "MaxText's XLA flags"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Published:
    """One measurement.

    model: bindings for LlamaConfig.  rows, length: of a batch, over all chips.
    remat: bindings that keep what the source says was kept.  mesh: of MeshConfig; fields that are not named are 1.
    seconds: measured, of a step; None where the source gives only tokens_per_second (a chip) or tflops (a chip, counted
        as ``non_causal`` says).  These are kept beside it as a check on how FLOPs are counted.
    """

    topology: str
    model: dict[str, Any]
    rows: int
    length: int
    remat: dict[str, Any]
    mesh: dict[str, Any]
    source: str
    seconds: float | None = None
    tokens_per_second: float | None = None
    tflops: float | None = None
    non_causal: bool = True
    more: tuple[str, ...] = ()
    open: str = ""
    differs: str = FLAGS

    def bindings(self) -> list[str]:
        model = {"max_positions": self.length, **self.model, **self.remat}
        return [
            *(f"LlamaConfig.{name} = {value!r}" for name, value in model.items()),
            f"SentencePieceBPE.vocab_size = {self.model['vocab_size']}",
            f"TextDataset.seq_len = {self.length}",
            f"Stage.batch_size = {self.rows}",
            *(
                f"MeshConfig.{name} = {value!r}"
                for name, value in ({"data": 1, "zero_data": False} | self.mesh).items()
            ),
            *self.more,
        ]


def _sizes(layers: int, width: int, heads: int, kv: int, mlp: int, vocab: int, **more: Any) -> dict[str, Any]:
    names = ("num_layers", "d_model", "num_heads", "num_kv_heads", "d_ff", "vocab_size")
    return dict(zip(names, (layers, width, heads, kv, mlp, vocab), strict=True)) | more


LLAMA3_8B = _sizes(32, 4096, 32, 8, 14336, 128256)
LLAMA3_70B = _sizes(80, 8192, 64, 8, 28672, 128256)
LLAMA2_70B = _sizes(80, 8192, 64, 8, 28672, 32000)
MISTRAL_7B = _sizes(32, 4096, 32, 8, 14336, 32000)
# MaxText's default model at global_parameter_scale 16 and 32: base.yml's sizes times powers of two, see
# get_individual_scales in its pyconfig.py.
MAXTEXT_16B = _sizes(32, 4096, 64, 64, 28672, 32000, head_dim=128)
MAXTEXT_32B = _sizes(32, 8192, 64, 64, 28672, 32000, head_dim=128)
OFFLOAD_5 = {"remat_offload": ("stream", "query", "key", "value", "attention_out")}
FLAT = {"fsdp": -1}
OWN_MESH = "MaxText's fsdp is flat; ours leaves a torus axis to data, with the state split over it"

ROWS: dict[str, Published] = {
    "Llama 3.1 8B, v6e-256": Published(
        topology="v6e:16x16",
        model=LLAMA3_8B,
        rows=4 * 256,
        length=8192,
        remat=OFFLOAD_5,
        mesh=FLAT,
        seconds=4.546,
        tokens_per_second=7207.336,
        tflops=417.397,
        source=f"{TPU_RECIPES}/trillium/Llama3.1-8B-MaxText/v6e-256/README.md",
    ),
    "Llama 3.1 8B, v6e-8": Published(
        topology="v6e:2x4",
        model=LLAMA3_8B,
        rows=3 * 8,
        length=8192,
        remat=OFFLOAD_5,
        mesh=FLAT,
        seconds=3.443,
        tokens_per_second=7138.890,
        tflops=413.433,
        source=f"{TPU_RECIPES}/trillium/Llama3.1-8B-MaxText/v6e-8/README.md",
    ),
    "Mistral 7B, v6e-8": Published(
        topology="v6e:2x4",
        model=MISTRAL_7B,
        rows=6 * 8,
        length=8192,
        remat=OFFLOAD_5,
        mesh=FLAT,
        seconds=6.320,
        tokens_per_second=7776.813,
        tflops=431.981,
        source=f"{TPU_RECIPES}/trillium/Mistral-7B-MaxText/README.md",
        open="whether attention had a window: the TFLOP/s count none, nor do we",
    ),
    "Llama 3.1 70B, v6e-256": Published(
        topology="v6e:16x16",
        model=LLAMA3_70B,
        rows=5 * 256,
        length=8192,
        remat={"remat_offload": ("stream", "query", "key", "value")},
        mesh=FLAT,
        seconds=42.656,
        tokens_per_second=960.248,
        tflops=462.297,
        source=f"{TPU_RECIPES}/trillium/Llama3.1-70B-MaxText/v6e-256/README.md",
    ),
    "Llama 2 70B, v6e-256": Published(
        topology="v6e:16x16",
        model=LLAMA2_70B,
        rows=2 * 256,
        length=4096,
        remat={"remat_offload": ("query", "key", "value")},
        mesh=FLAT,
        seconds=9.052,
        tokens_per_second=905.021,
        tflops=402.274,
        source=f"{TPU_RECIPES}/trillium/Llama2-70B-MaxText/README.md",
        open="rows a chip: the configuration says 3, the logged tokens 2, which is taken",
    ),
    "Llama 2 70B, v5p-512": Published(
        topology="v5p:4x8x8",
        model=LLAMA2_70B,
        rows=4 * 256,
        length=4096,
        remat={"remat_save": ("query", "key", "value", "attention_out", "mlp_out")},
        mesh={"data": 4, "fsdp": -1, "zero_data": True},
        tokens_per_second=692.0,
        source=f"{TIERING} and https://github.com/AI-Hypercomputer/maxtext/blob/"
        "ad10ed0fa3ced5585efdfc8802021838648c7b5e/MaxText/configs/v5p/llama2_70b.sh",
        open="which script was run: taken is the one of the repository, 4 rows a chip; the table says 512 chips, where "
        "v5p-512 has 256",
        differs=f"{OWN_MESH}; {FLAGS}",
    ),
    "MaxText 16B, v5e-256": Published(
        topology="v5e:16x16",
        model=MAXTEXT_16B,
        rows=6 * 256,
        length=2048,
        remat={"remat": "full"},
        mesh=FLAT,
        tflops=120.0,
        source=f"{MAXTEXT}/v5e/README.md and 16b.sh beside it",
        open="step time: from TFLOP/s; sizes from base.yml",
    ),
    "MaxText 32B, v5p-128": Published(
        topology="v5p:4x4x4",
        model=MAXTEXT_32B,
        rows=7 * 64,
        length=2048,
        remat={"remat": "dots"},
        mesh={"fsdp": -1, "tensor": 4},
        tflops=328.0,
        source=f"{MAXTEXT}/v5p/README.md and 32b.sh beside it",
        open="step time: from TFLOP/s; sizes from base.yml",
    ),
    "Llama 3.1 70B, tpu7x-128": Published(
        topology="tpu7x:4x4x4",
        model=LLAMA3_70B,
        rows=256,
        length=8192,
        remat={"remat_save": ("query", "key", "value", "attention")},
        mesh={"data": 4, "fsdp": -1, "zero_data": True},
        more=("AdamW.mu_dtype = 'bfloat16'",),
        seconds=12.20,
        tokens_per_second=2686.98,
        tflops=1207.05,
        non_causal=False,
        source=f"{TPU_RECIPES}/ironwood/README.md and llama3.1-70b/8k-bf16-tpu7x-4x4x4 beside it",
        differs=f"{OWN_MESH}; {FLAGS}",
    ),
    "Llama 3.1 70B at 128k, tpu7x-512": Published(
        topology="tpu7x:4x8x8",
        model=LLAMA3_70B,
        rows=64,
        length=131072,
        remat={"remat_save": ("query", "key", "value", "attention", "mlp_out")},
        mesh={"fsdp": -1, "context": 8},
        seconds=34.02,
        tokens_per_second=963.03,
        tflops=897.94,
        non_causal=False,
        source=f"{TPU_RECIPES}/ironwood/README.md and llama3.1-70b/128k-bf16-tpu7x-4x8x8 beside it",
        open="how the sequence is balanced over the ring",
    ),
}


def plan(name: str, compiler: bool) -> dict[str, Any]:
    """The row's prediction beside the measurement; errors are predicted / measured - 1."""
    from jaxtrain import gin_edge
    from jaxtrain.config import CONFIGURABLES, Recipe
    from jaxtrain.plan.chips import parse_topology
    from jaxtrain.plan.estimate import plan_stage

    row = ROWS[name]
    where = parse_topology(row.topology)
    recipe = gin_edge.load(Recipe, CONFIGURABLES, [RECIPE], row.bindings()).config
    stage = recipe.stages[0]
    found = {"hand": plan_stage(stage, recipe, where, compiler=False)}
    if compiler:
        found["compiler"] = plan_stage(stage, recipe, where, compiler=True, by_hand=found["hand"])
    (part,) = found["hand"].parts
    flops = part.program.model_flops_non_causal if row.non_causal else part.program.model_flops
    tokens = row.rows * row.length
    measured = row.seconds
    if measured is None and row.tokens_per_second:
        measured = tokens / where.chips / row.tokens_per_second
    if measured is None:
        measured = flops / where.chips / (row.tflops * 1e12)
    causal = part.program.model_flops / measured / (where.chips * where.chip.flops)
    result: dict[str, Any] = {
        "benchmark": "plan_published",
        "case": name,
        "topology": row.topology,
        "rows_a_chip": row.rows / where.chips,
        "length": row.length,
        "measured_seconds": measured,
        "measured_mfu": causal,
        "measured_tokens_per_second_per_chip": tokens / measured / where.chips,
        # 1 where the source counts FLOPs as we do.
        "our_flops_over_theirs": flops / where.chips / measured / (row.tflops * 1e12) if row.tflops else None,
    }
    for by, one in found.items():
        (part,) = one.parts
        result |= {
            f"seconds_by_{by}": one.seconds_per_step,
            f"error_by_{by}": one.seconds_per_step / measured - 1,
            f"mfu_by_{by}": one.mfu(),
            f"seconds_of_matmul_by_{by}": part.times.matmul,
            f"seconds_of_kernels_by_{by}": part.times.kernels,
            f"seconds_of_memory_by_{by}": part.times.memory,
            f"seconds_exposed_by_{by}": part.times.exposed,
        }
    result["gib_by_hand"] = found["hand"].hbm_bytes_per_chip / 2**30
    if compiler:
        result["gib_by_compiler"] = found["compiler"].compiler_bytes_per_chip / 2**30
        result["fits"] = found["compiler"].fits
    return result | {"source": row.source, "open": row.open, "differs": row.differs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=ROWS, help="one row alone, in this process")
    parser.add_argument("--compile", action="store_true", help="ask the TPU compiler too")
    parser.add_argument("--json", type=Path, help="append the rows to this file")
    args = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if args.compile and args.only is None:
        rest = [] if args.json is None else ["--json", str(args.json)]
        for name in ROWS:
            subprocess.run([sys.executable, __file__, "--only", name, "--compile", *rest], check=True)
        return
    for name in [args.only] if args.only else ROWS:
        row = plan(name, args.compile)
        print("  ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), flush=True)
        if args.json:
            with args.json.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
