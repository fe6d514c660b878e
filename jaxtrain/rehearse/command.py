"""``jaxtrain rehearse``: every stage of a recipe, shrunk, on virtual CPU devices, stopped and continued once each."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from jaxtrain import config_text, distributed
from jaxtrain.config import PPOStage, Recipe, trained_models
from jaxtrain.recipe.chain import run_recipe
from jaxtrain.rehearse.checks import check_full_size
from jaxtrain.rehearse.loading import load
from jaxtrain.rehearse.models import ON_CPU
from jaxtrain.rehearse.shrink import Shrunk, shrink
from jaxtrain.sharding import AXES
from jaxtrain.train.metrics import read_rows

Say = Callable[[str], None]
# Programs are compiled, run a few times, and thrown away.
COMPILE_FAST = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
# XLA aborts the process where one virtual device comes 40 s later than the others, as happens on a busy machine.
PATIENT = "--xla_cpu_collective_call_terminate_timeout_seconds=1200"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One stage as it ran.  resumed: the step or iteration after which it was stopped and continued; 0: it was not."""

    stage: str
    what: str
    steps: int
    resumed: int
    seconds: float
    first_loss: float | None
    last_loss: float | None


def run(file: str, bindings: list[str], *, devices: int, out: Path | None, show: Say, say: Say) -> int:
    """Rehearses a recipe; 0, or raises what a stage raised, told which.  show: takes the result, say: progress.

    out: an empty or new folder to keep the miniature's run in; None: a temporary one.
    """
    began = time.perf_counter()
    loaded = load(file, bindings)
    small = shrink(loaded.recipe, devices)
    _make_devices(devices)
    checked = check_full_size(loaded.recipe)
    for line in small.made_up:
        say(f"jaxtrain: NOT THE REAL THING: {line}")
    for folder in loaded.unknown:
        say(f"jaxtrain: NOT THE REAL THING: the model of {folder}, which is not here: a Llama")
    with _folder(out) as folder:
        rows = [rehearse(small.recipe, number, folder, say) for number in range(len(small.recipe.stages))]
    show(table(rows))
    for title, lines in report(loaded.recipe, small, checked, loaded.unknown):
        show("\n" + title)
        for line in lines:
            show(f"  {line}")
    show(f"\n{time.perf_counter() - began:.0f} s in all" + (f"; the run is in {out}" if out else ""))
    return 0


def rehearse(recipe: Recipe, number: int, out: Path, say: Say) -> Row:
    """Runs stage ``number``, whose predecessors have run: to its middle, and from the checkpoint there to its end.

    Raises ValueError, naming the stage, for a mistake of the user's and for a loss that is no number.
    """
    stage, began = recipe.stages[number], time.perf_counter()
    part = dataclasses.replace(recipe, stages=recipe.stages[: number + 1])
    text = config_text.write(part, {})
    stop, told = stage.steps // 2, []

    def listen(line: str) -> None:
        told.append(line)
        if line.startswith(f"{stage.name}: "):
            say(line)

    say(f"{stage.name}: {describe(stage)}")
    try:
        if stop:
            with contextlib.suppress(distributed.Preempted), distributed.job(stop_after=stop):
                run_recipe(part, text, out, listen)
        with distributed.job():
            run_recipe(part, text, out, listen)
    except (ValueError, OSError) as error:
        raise ValueError(f"stage {stage.name} failed in its rehearsal: {error}") from error
    except Exception:
        say(f"jaxtrain: stage {stage.name} failed in its rehearsal:")
        raise
    if stop and not any(line.startswith(f"{stage.name}: continuing after ") for line in told):
        raise ValueError(
            f"stage {stage.name} began anew, instead of continuing where it was stopped: have files of the package, "
            "or the stage's data, changed meanwhile?"
        )
    rows = read_rows(out / "stages" / stage.name / "metrics.jsonl")
    # What is no number is logged as none; the update was skipped.
    losses = [row["loss"] for row in rows if "step" in row and "skipped" in row]
    if None in losses or any(row.get("skipped") for row in rows):
        raise ValueError(
            f"stage {stage.name} failed in its rehearsal: of its losses {losses} or their gradients some are no "
            "numbers; look at its learning rate, its objective and its data"
        )
    return Row(
        stage=stage.name,
        what=describe(stage),
        steps=stage.steps,
        resumed=stop,
        seconds=time.perf_counter() - began,
        first_loss=losses[0] if losses else None,
        last_loss=losses[-1] if losses else None,
    )


def describe(stage: Any) -> str:
    """A stage in a few words."""
    objective = "PPO" if isinstance(stage, PPOStage) else type(stage.objective).__name__
    model = type(stage.model).__name__.removesuffix("Config")
    axes = " ".join(f"{axis}={size}" for axis in AXES if (size := getattr(stage.mesh, axis)) != 1) or "one device"
    return f"{objective}, {model}, {axes}"


def table(rows: list[Row]) -> str:
    """Of all stages, stand-ins included."""
    cells = [("stage", "what", "steps", "stopped after", "loss", "time")]
    for row in rows:
        loss = "" if row.first_loss is None else f"{row.first_loss:.4g} -> {row.last_loss:.4g}"
        stop = str(row.resumed) if row.resumed else ""
        cells.append((row.stage, row.what, str(row.steps), stop, loss, f"{row.seconds:.0f} s"))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, tuple("-" * width for width in widths))
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in cells)


def report(full: Recipe, small: Shrunk, checked: list[str], unknown: tuple[str, ...]) -> list[tuple[str, list[str]]]:
    """Headings and lines: what was checked at full size, what was made up, shrunk, and so not tested."""
    parts = [("Checked at full size, without computing:", checked)]
    made_up = [*small.made_up, *(f"the model of {folder}: a Llama" for folder in unknown)]
    if made_up:
        parts.append(("Made up:", made_up))
    return [*parts, ("Shrunk:", list(small.changes)), ("Not tested:", not_tested(full, made_up))]


def not_tested(full: Recipe, made_up: list[str]) -> list[str]:
    """What a miniature on CPUs cannot say of this recipe."""
    models = [model for stage in full.stages for model in trained_models(stage).values()]
    lines = ["memory and speed on the real chips (jaxtrain plan says what they should be)"]
    kernels = sorted({model.attention for model in models if model.attention not in ON_CPU})
    asked = f", those asked for too: {', '.join(kernels)}" if kernels else ""
    lines.append(f"kernels of TPUs and GPUs: XLA's CPU code computes the same in their place{asked}")
    if any(getattr(stage.mesh, axis) == -1 for stage in full.stages for axis in AXES):
        lines.append("axes of size -1 at full size: how many devices they will have is not known here")
    lines += [
        "several processes and hosts: one process has all the virtual devices",
        "a network or a shared file system",
    ]
    lines.append("whether it learns: some steps from random parameters say nothing of that")
    lines.append("the real vocabulary, the lengths of real rows, and data beyond the first rows")
    if made_up:
        lines.append("everything under 'Made up'")
    return lines


@contextlib.contextmanager
def _folder(out: Path | None) -> Iterator[Path]:
    if out is None:
        with tempfile.TemporaryDirectory(prefix="jaxtrain-rehearsal-") as name:
            yield Path(name)
        return
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"--out {out} is not empty: a rehearsal runs every stage anew, so give it a folder of its own")
    yield out


def _make_devices(count: int) -> None:
    """Virtual CPU devices, where JAX has not begun to use devices yet.

    Raises ValueError where it has too few, and for a job of several processes.
    """
    if "JAXTRAIN_COORDINATOR" in os.environ or "JAXTRAIN_DISTRIBUTED" in os.environ:
        raise ValueError("a rehearsal is one process: unset JAXTRAIN_COORDINATOR and JAXTRAIN_DISTRIBUTED")
    with contextlib.suppress(RuntimeError):  # too late
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", count)
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {COMPILE_FAST} {PATIENT}".strip()
    if jax.default_backend() != "cpu" or jax.device_count() < count:
        raise ValueError(
            f"{count} virtual CPU devices are needed, but JAX already has {jax.device_count()} of "
            f"{jax.default_backend()}; unset XLA_FLAGS and JAX_NUM_CPU_DEVICES, or start a process of its own"
        )
