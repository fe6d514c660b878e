"""jaxtrain and MaxText, compiled by the same TPU compiler for the same work, and read by the same walker.

    python3.12 -m venv jaxtrain && jaxtrain/bin/pip install 'jax==0.12.0.1' 'jaxtrain[tpu]'
    python3.12 -m venv maxtext
    maxtext/bin/pip install jax==0.12.0.1 libtpu==0.0.50.1 flax==0.12.12 optax orbax-checkpoint grain qwix tokamax \\
        aqtp drjax omegaconf pydantic pathwaysutils transformers datasets sentencepiece tiktoken tensorboardX gcsfs \\
        jinja2 pillow sympy
    maxtext/bin/pip install --no-deps maxtext==0.2.5
    jaxtrain/bin/python benchmarks/plan_vs_maxtext.py --maxtext maxtext/bin/python --folder compiled [--json FILE]

Same model, rows a chip, length, slice and full remat; nothing runs and no TPU is needed.  Both should have the same
libtpu: the versions stand in every row.  jaxtrain takes its shipped recipes.  MaxText takes its defaults (``fsdp`` over
all chips, float32 parameters and moments, bfloat16 products) with splash attention; "maxtext, flags" also what its own
scripts for the chip set, see ``FLAGS``; "maxtext, our options" what jaxtrain's train step tells the compiler of this
chip (``jaxtrain.train.compiler``: to let sparse cores carry collectives).  What was compiled stays in ``--folder`` and
is not compiled again.

Counted alike: HBM a chip is arguments + temporaries + outputs - what outputs take over.  Attention kernels are custom
calls, which the compiler counts as nothing: their products are counted by hand from their names (``PRODUCTS``), and
their bytes are those of their operands and results, whatever they declare.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from compiled import cpu_seconds, write
from plan_recipes import CASES as RECIPES

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Case:
    """recipe, topology, bindings: of jaxtrain.  rows: of 8,192 tokens a chip.  model, slice: as MaxText names them."""

    recipe: str
    topology: str
    bindings: tuple[str, ...]
    model: str
    slice: str
    rows: int = 1


V6E_4_ROWS = ("Stage.batch_size = 1024", "MeshConfig.data = 1")
CASES = {
    "8B on v5p-128": Case(*RECIPES["8B on v5p-128"], "llama3-8b", "v5p-128"),
    "8B on v5e-256": Case(*RECIPES["8B on v5e-256"], "llama3-8b", "v5e-256"),
    "8B on v6e-256, 4 rows": Case("llama3_8b_pretrain", "v6e:16x16", V6E_4_ROWS, "llama3-8b", "v6e-256", 4),
    "70B on v5p-512": Case(*RECIPES["70B on v5p-512"], "llama3-70b", "v5p-512"),
    "70B on v6e-256": Case(*RECIPES["70B on v6e-256"], "llama3-70b", "v6e-256"),
}

# What MaxText 0.2.5's own scripts for dense models set: maxtext/configs/tpu/v5p/llama2_70b.sh, v5e/llama2_7b.sh and
# v6e/llama2_7b_4096.sh; (LIBTPU_INIT_ARGS, settings).  v5p and v6e go without fused all-gathers, which libtpu 0.0.50
# refuses there ("not supported/recommended on platforms other than TPU v5e").
_FUSED = (
    "--xla_tpu_enable_async_collective_fusion=true --xla_tpu_enable_async_collective_fusion_multiple_steps=true "
    "--xla_tpu_overlap_compute_collective_tc=true --xla_enable_async_all_gather=true"
)
_DATA_PARALLEL = (
    "--xla_tpu_enable_data_parallel_all_reduce_opt=true --xla_tpu_data_parallel_opt_different_sized_ops=true"
)
FLAGS: dict[str, tuple[str, tuple[str, ...]]] = {
    "v5p": (
        f"{_FUSED} {_DATA_PARALLEL} --xla_tpu_megacore_fusion_allow_ags=false "
        "--xla_enable_async_collective_permute=true --xla_tpu_enable_ag_backward_pipelining=true",
        (),
    ),
    "v5e": (f"{_FUSED} {_DATA_PARALLEL} --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true", ()),
    "v6e": (
        f"{_FUSED} --xla_tpu_scoped_vmem_limit_kib=98304",
        ("sa_block_q=1024", "sa_block_q_dkv=2048", "sa_block_q_dq=2048"),
    ),
}
SYSTEMS = ("jaxtrain", "maxtext", "maxtext, flags", "maxtext, our options")

# Products of two matrices for each tile of scores, by the kernel's name, first match: our kernels (kernels/attention)
# and splash attention's.  Forward: scores and their sum of values.  dq: scores, their gradient and that of queries.
# dkv: the first two and the gradients of keys and values.  One kernel for all three gradients: five.
PRODUCTS = (
    (r"flash_forward|splash_\w*fwd", 2),
    (r"flash_dq|splash_\w*dq", 3),
    (r"flash_dkv|splash_\w*dkv", 4),
    (r"flash_backward", 5),
)


def compile_jaxtrain(case: Case, folder: Path) -> None:
    """Writes what ``maxtext_compile.py`` writes of MaxText."""
    import jax

    from jaxtrain.plan.chips import parse_topology
    from jaxtrain.plan.compile import topology_mesh
    from jaxtrain.plan.programs import programs

    recipe = load(case)
    (stage,) = recipe.stages
    mesh = topology_mesh(stage.mesh, parse_topology(case.topology))
    (program,) = programs(stage, recipe, mesh)
    before = cpu_seconds()
    with jax.set_mesh(mesh):
        compiled = program.jitted.lower(*program.args).compile()
    seconds = cpu_seconds() - before
    write(folder, compiled, mesh, seconds, ("jax", "libtpu"))


def maxtext_flags(system: str, chip: str) -> tuple[str, tuple[str, ...]]:
    """(LIBTPU_INIT_ARGS, settings) of one of ``SYSTEMS``."""
    from jaxtrain.plan.programs import KINDS
    from jaxtrain.train.compiler import OPTIONS

    if system == "maxtext, flags":
        return FLAGS[chip]
    ours = OPTIONS.get(KINDS[chip], {}) if system == "maxtext, our options" else {}
    return " ".join(f"--{name}={value}" for name, value in ours.items()), ()


def compile_maxtext(case: Case, folder: Path, python: str, system: str) -> None:
    """Runs MaxText's ``train_compile`` with the interpreter of its environment."""
    from jaxtrain.plan.compile import ENVIRONMENT

    arguments, settings = maxtext_flags(system, case.topology.split(":")[0])
    # DECOUPLE_GCLOUD: MaxText without Google Cloud's libraries.
    environment = {**os.environ, **ENVIRONMENT, "DECOUPLE_GCLOUD": "TRUE", "LIBTPU_INIT_ARGS": arguments}
    environment.pop("PYTHONPATH", None)
    command = [python, str(Path(__file__).with_name("maxtext_compile.py")), str(folder)]
    command += [*maxtext_settings(case, folder), *settings]
    log = folder / "log.txt"
    with log.open("w", encoding="utf-8") as file:
        done = subprocess.run(command, env=environment, stdout=file, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        raise SystemExit(f"MaxText's compilation ended with {done.returncode}; its last words, of {log}:\n" + tail(log))


def maxtext_settings(case: Case, folder: Path) -> list[str]:
    return [
        f"model_name={case.model}",
        f"compile_topology={case.slice}",
        "compile_topology_num_slices=1",
        "ici_fsdp_parallelism=-1",
        f"per_device_batch_size={case.rows}",
        "max_target_length=8192",
        "remat_policy=full",
        "attention=flash",
        "dataset_type=synthetic",
        "enable_checkpointing=false",
        "log_config=false",
        "run_name=plan",
        f"base_output_directory={folder}",
    ]


def load(case: Case) -> Any:
    from jaxtrain import gin_edge
    from jaxtrain.config import CONFIGURABLES, Recipe

    return gin_edge.load(Recipe, CONFIGURABLES, [f"recipes/{case.recipe}.gin"], case.bindings).config


def row(name: str, system: str, folder: Path) -> dict[str, Any]:
    """What was compiled, walked.  Bytes, FLOPs and seconds are of one step on one chip."""
    from jaxtrain.plan import hlo
    from jaxtrain.plan.chips import parse_topology
    from jaxtrain.plan.programs import abstract_mesh, programs
    from jaxtrain.plan.roofline import Network, walk_times

    case = CASES[name]
    where = parse_topology(case.topology)
    recipe = load(case)
    (ours,) = programs(recipe.stages[0], recipe, abstract_mesh(recipe.stages[0].mesh, where))
    config = ours.model.config
    found = json.loads((folder / "compiled.json").read_text(encoding="utf-8"))
    text = (folder / "program.hlo").read_text(encoding="utf-8")
    walked = hlo.walk(without_estimates(text), found["mesh"])
    assert not walked.unknown, f"loops whose turns the text does not tell: {walked.unknown}"
    # A token sees itself and what stands before it.
    scores = case.rows * config.num_heads * ours.length * (ours.length + 1) / 2
    items = tuple(priced(item, 2 * scores * config.spec().layers()[0].attention.head_dim) for item in walked.items)
    totals = dataclasses.replace(walked, items=items).totals()
    times = walk_times(items, Network(where, found["mesh"]))
    sent: Counter[str] = Counter()
    for start, count in walked.collectives():
        kind = start.collective.kind
        sent["all-gather by all-reduce" if start.collective.emulated else kind] += count * start.collective.wire_bytes
    return {
        "benchmark": "plan_vs_maxtext",
        "case": name,
        "system": system,
        "gib": found["allocated"] / GIB,
        "gib_added_up": (found["arguments"] + found["temporaries"] + found["outputs"] - found["aliased"]) / GIB,
        "gib_arguments": found["arguments"] / GIB,
        "gib_temporaries": found["temporaries"] / GIB,
        "flops": totals.flops + totals.kernel_flops,
        "flops_of_kernels": totals.kernel_flops,
        "hbm_bytes": totals.bytes + totals.kernel_bytes,
        "sent_bytes": sum(sent.values()),
        "sent_by_kind": dict(sent.most_common()),
        "seconds": times.seconds,
        "exposed": times.exposed / times.seconds,
        "mfu": ours.model_flops / times.seconds / (where.chips * where.chip.flops),
        "compile_cpu_seconds": found["cpu_seconds"],
        "compile_peak_gib": found["peak_bytes"] / GIB,
        "mesh": {axis: size for axis, size in found["mesh"].items() if size > 1},
        "versions": found["versions"],
    }


def without_estimates(text: str) -> str:
    """A program's text without what kernels say of their own cost, so that all are counted alike."""
    return re.sub(r'"cost_estimate":\{[^}]*\},?', "", text)


def priced(item: Any, product: float) -> Any:
    """A walked item with the FLOPs of the attention kernels in it.

    product: FLOPs of one product of matrices over all scores that a layer's tokens have, on one chip.
    Raises ValueError for a kernel that ``PRODUCTS`` does not know.
    """
    from jaxtrain.plan.hlo import Loop, Work

    if isinstance(item, Loop):
        return dataclasses.replace(item, items=tuple(priced(one, product) for one in item.items))
    if not (isinstance(item, Work) and item.kernel):
        return item
    for pattern, products in PRODUCTS:
        if re.search(pattern, item.name):
            return dataclasses.replace(item, flops=products * product)
    raise ValueError(f"the program calls {item.name}, a kernel that PRODUCTS does not know; add it there")


def table(rows: list[dict[str, Any]]) -> str:
    """As in README.md."""
    head = ("case", "system", "GiB a chip", "added up", "TFLOPs", "HBM GB", "sent GB, by kind")
    head = (*head, "seconds", "exposed", "MFU, causal")
    lines = [(*head, "compile, CPU s (GiB)")]
    lines.append(("---",) * len(lines[0]))
    for one in rows:
        sent = ", ".join(f"{kind} {size / 1e9:.1f}" for kind, size in one["sent_by_kind"].items() if size >= 5e7)
        lines.append(
            (
                one["case"],
                one["system"],
                f"{one['gib']:.2f}",
                f"{one['gib_added_up']:.2f}",
                f"{one['flops'] / 1e12:.1f}",
                f"{one['hbm_bytes'] / 1e9:.0f}",
                f"{one['sent_bytes'] / 1e9:.1f}: {sent}",
                f"{one['seconds']:.3f}",
                f"{one['exposed']:.1%}",
                f"{one['mfu']:.1%}",
                f"{one['compile_cpu_seconds']:.0f} ({one['compile_peak_gib']:.1f})",
            )
        )
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def tail(path: Path) -> str:
    return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--maxtext", metavar="PYTHON", help="the interpreter of MaxText's environment")
    parser.add_argument("--folder", type=Path, required=True, help="where compiled programs are kept")
    parser.add_argument("--case", action="append", choices=CASES, help="these cases alone")
    parser.add_argument("--system", action="append", choices=SYSTEMS, help="these systems alone")
    parser.add_argument("--json", type=Path, help="append the rows to this file")
    args = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    rows = []
    for name in args.case or CASES:
        for system in args.system or SYSTEMS:
            folder = (args.folder / re.sub(r"\W+", "_", f"{name} {system}")).resolve()
            if not (folder / "compiled.json").exists():
                folder.mkdir(parents=True, exist_ok=True)
                if system != "jaxtrain":
                    if args.maxtext is None:
                        parser.error(
                            f"{name} is not in {args.folder} yet for {system}: name its interpreter, --maxtext"
                        )
                    compile_maxtext(CASES[name], folder, args.maxtext, system)
                elif args.case == [name] and args.system == [system]:
                    compile_jaxtrain(CASES[name], folder)
                else:  # in a process of its own, so that its CPU seconds and memory are of this program alone
                    own = ["--folder", str(args.folder), "--case", name, "--system", system]
                    subprocess.run([sys.executable, __file__, *own], check=True, stdout=subprocess.DEVNULL)
            rows.append(row(name, system, folder))
            if args.json:
                with args.json.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
