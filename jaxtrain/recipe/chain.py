"""The chain: each stage in turn, skipped when its inputs have not changed, continued when it was killed."""

from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxtrain.checkpoint import read_meta
from jaxtrain.config import PPOStage, Recipe, Samples
from jaxtrain.config_json import hash_json, read_json, to_json, write_json
from jaxtrain.data.datasets import TextDataset
from jaxtrain.distributed import check_same, check_shared, from_writer, process
from jaxtrain.models import build_model
from jaxtrain.recipe.ppo import PPOJob
from jaxtrain.recipe.runtime import Runtime
from jaxtrain.recipe.samples import take_samples
from jaxtrain.recipe.supervised import SupervisedJob
from jaxtrain.recipe.workspace import claim_folder, locked, stage_folder
from jaxtrain.report import write_report
from jaxtrain.sharding import batch_sharding, make_mesh, ways
from jaxtrain.train.metrics import read_rows
from jaxtrain.train.state import abstract_params, init_params

Summary = list[dict[str, Any]]
# Where and how safely a stage runs, not what it computes (but for the order in which floats are added): no part of
# its hash, so that a run stopped on one machine continues on another.
PLACEMENT = ("mesh", "checkpoint_every", "keep", "max_skipped")


def run_recipe(recipe: Recipe, config_text: str, out: Path, say: Callable[[str], None]) -> tuple[Summary, list[str]]:
    """Runs every stage, writes ``summary.json`` and ``report.html``; returns the summary and what failed to improve.

    config_text: the resolved gin, kept as ``config.gin``.  say: prints a line for the user.
    """
    recipe.check_folders()
    for stage in recipe.stages:
        _check_mesh(stage)
    with locked(out):
        check_shared(out)
        check_same("configuration", hash_json(to_json(recipe)))
        from_writer(lambda: _write_config(recipe, config_text, out))
        runtime = Runtime(recipe, out, say)
        _untrained_samples(runtime)
        summary: Summary = []
        failures: list[str] = []
        for stage in recipe.stages:
            result = _run_stage(runtime, stage)
            failures += shortfalls(stage.name, result["evaluation"])
            for row in result["evaluation"]:
                figures = {name: row[name] for name in ("metric", "before", "after", "better")}
                summary.append({"stage": stage.name, **figures, "seconds": result["seconds"]})
            from_writer(lambda: _write_summary(summary, out))
        return summary, failures


def _write_config(recipe: Recipe, text: str, out: Path) -> None:
    (out / "config.gin").write_text(text, encoding="utf-8")
    write_json(out / "config.json", to_json(recipe))


def _write_summary(summary: Summary, out: Path) -> None:
    write_json(out / "summary.json", summary)
    write_report(out)


def _check_mesh(stage: Any) -> None:
    """Raises ValueError for a mesh that the machine, the batches or the parameters do not fit: before any training, not
    when the stage's turn has come."""
    mesh = make_mesh(stage.mesh)
    axes = batch_sharding(mesh).spec[0]
    if isinstance(stage, PPOStage):
        models = (stage.model, stage.critic)
        sizes = {f"ppo.{name}": getattr(stage.ppo, name) for name in ("prompts_per_iteration", "minibatch_size")}
    else:
        models, sizes = (stage.model,), {"batch_size": stage.batch_size}
    for name, size in sizes.items():
        if size % ways(mesh, axes):
            raise ValueError(
                f"stage {stage.name}: {name}={size} is not divisible by the {ways(mesh, axes)} devices of the mesh's "
                f"row axes {axes}; make it a multiple of {ways(mesh, axes)}"
            )
    for model in models:
        if model is not None:
            abstract_params(build_model(model), mesh)


def _run_stage(runtime: Runtime, stage: Any) -> dict[str, Any]:
    job = (PPOJob if isinstance(stage, PPOStage) else SupervisedJob)(runtime, stage)
    for parent in job.parents():
        runtime.check_tokenizer(parent)
    data = job.data_fingerprint()
    inputs = {
        "config": {name: value for name, value in to_json(stage).items() if name not in PLACEMENT},
        "seed": runtime.recipe.seed,
        "samples": to_json(runtime.recipe.samples),
        "data": data,
        "tokenizer": runtime.tokenizer.digest,
        "code": runtime.code_version,
        "parents": [parent.checkpoint for parent in job.parents()],
    }
    key = hash_json(inputs)
    check_same(f"code, data or parent of stage {stage.name}", key)
    result = from_writer(lambda: read_json(job.folder / "result.json"))
    if result is not None and result["hash"] == key:
        runtime.say(f"{stage.name}: unchanged, skipped")
        return result

    ancestry: dict[str, dict[str, str]] = {}
    for parent in job.parents():
        ancestry |= {record["hash"]: record for record in parent.ancestry}
    chat = not isinstance(stage.data, TextDataset) or any(parent.chat for parent in job.parents())
    meta = {
        "stage": stage.name,
        "hash": key,
        "model": to_json(stage.model),
        "data": data,
        "tokenizer": runtime.tokenizer.digest,
        "ancestry": list(ancestry.values()),
        "chat": chat,
    }

    def begin() -> Any:
        claim_folder(job.folder, key)
        write_json(job.folder / "inputs.json", {"hash": key, **inputs})
        runtime.tokenizer.save(job.folder / "tokenizer")
        return read_json(job.folder / "before.json")

    before = from_writer(begin)
    if before is None:
        before = job.figures_before()
        from_writer(lambda: write_json(job.folder / "before.json", before))
    params = job.train(meta)
    after = job.figures(params)
    # A reward model cannot write.
    wanted = runtime.recipe.samples if "lm" in stage.model.heads else Samples()
    samples = take_samples(stage.name, job.model, params, runtime.tokenizer, wanted, chat=chat, mesh=job.mesh)

    def end() -> dict[str, Any]:
        write_json(job.folder / "samples.json", samples)
        return _write_result(runtime, stage, job, meta, before, after)

    return from_writer(end)


def _write_result(runtime: Runtime, stage: Any, job: Any, meta: Any, before: Any, after: Any) -> dict[str, Any]:
    rows = read_rows(job.folder / "metrics.jsonl")
    speeds = [row["tokens_per_second"] for row in rows if row.get("tokens_per_second")]
    result = {
        "stage": stage.name,
        "hash": meta["hash"],
        "checkpoint": hash_json(read_meta(job.folder / "checkpoints")["digests"]),
        "parents": meta["ancestry"],
        "tokenizer": runtime.tokenizer.digest,
        "chat": meta["chat"],
        "steps": stage.steps,
        "seconds": rows[-1]["seconds"] if rows else 0.0,
        "tokens_per_second": float(np.median(speeds)) if speeds else None,
        "parameters": job.model.num_params(),
        "evaluation": [
            {name: row[name] for name in ("metric", "better", "required")}
            | {"before": old["value"], "after": row["value"]}
            for old, row in zip(before, after, strict=True)
        ],
        "environment": environment(),
    }
    write_json(job.folder / "result.json", result)
    return result


def _untrained_samples(runtime: Runtime) -> None:
    """What the first stage's model writes before any training; nothing where it starts from another run."""
    stage, samples = runtime.recipe.stages[0], runtime.recipe.samples
    inputs = {"model": to_json(stage.model), "samples": to_json(samples), "seed": runtime.recipe.seed}
    key = hash_json({**inputs, "tokenizer": runtime.tokenizer.digest, "init": stage.init})
    path = stage_folder(runtime.out, "untrained") / "samples.json"
    if (from_writer(lambda: read_json(path)) or {}).get("hash") == key:
        return
    taken: dict[str, Any] = {"stage": "untrained", "samples": [], "next_tokens": []}
    if stage.init is None and "lm" in stage.model.heads:
        model = build_model(stage.model)
        mesh = make_mesh(stage.mesh)
        params = init_params(model, mesh, runtime.recipe.seed)
        taken = take_samples("untrained", model, params, runtime.tokenizer, samples, chat=False, mesh=mesh)

    def write() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {**taken, "hash": key})

    from_writer(write)


def environment() -> dict[str, str]:
    """Where numbers were made."""
    device = jax.devices()[0]
    hosts = f" in {process()[1]} processes" if process()[1] > 1 else ""
    return {
        "jax": jax.__version__,
        "python": platform.python_version(),
        "devices": f"{jax.device_count()} × {device.device_kind or device.platform}{hosts}",
        "machine": f"{platform.system()} {platform.machine()}",
    }


def shortfalls(stage: str, evaluation: list[dict[str, Any]]) -> list[str]:
    """Why a stage cannot be said to have worked: its own figure, the first that has a direction, did not improve, or
    one that is required was not reached.  Empty if it worked."""
    lines = []
    directed = [row for row in evaluation if row["better"] != "none"]
    for row in directed[:1]:
        if not _better(row["after"], row["before"], row["better"]):
            lines.append(
                f"{stage}: {row['metric']} went from {row['before']:.4g} to {row['after']:.4g}; it should be "
                f"{row['better']}"
            )
    for row in directed:
        wanted = row["required"]
        if wanted is not None and row["after"] != wanted and not _better(row["after"], wanted, row["better"]):
            lines.append(f"{stage}: {row['metric']} is {row['after']:.4g}, and {wanted:g} is required")
    return lines


def _better(new: float, old: float, direction: str) -> bool:
    return new < old if direction == "lower" else new > old
