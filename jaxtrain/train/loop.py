"""The loop around the step: batches in, metrics out, checkpoints between."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp

from jaxtrain import distributed
from jaxtrain.checkpoint import Checkpoints
from jaxtrain.distributed import Preempted
from jaxtrain.train.metrics import MetricLog
from jaxtrain.train.step import Step
from jaxtrain.types import TrainState


class DivergedError(ValueError):
    """Too many updates in a row had a NaN or Inf loss or gradient."""


def state_trees(state: TrainState) -> dict[str, Any]:
    """A state as the named trees of a checkpoint: parameters apart, so that they can be loaded alone."""
    rest = {name: getattr(state, name) for name in ("step", "skipped", "streak", "opt_state", "rng")}
    return {"params": state.params, "rest": rest}


def from_trees(trees: dict[str, Any]) -> TrainState:
    """The inverse of ``state_trees``."""
    return TrainState(params=trees["params"], **trees["rest"])


def to_floats(metrics: dict[str, Any]) -> dict[str, float]:
    """Device scalars as Python floats; waits for them."""
    return {name: float(value) for name, value in jax.device_get(metrics).items()}


@jax.jit
def count_tokens(batch: Any) -> jax.Array:
    """Tokens of a batch that are not padding, on all hosts together: int32."""
    leaves = jax.tree_util.tree_leaves_with_path(batch)
    return sum(
        (jnp.count_nonzero(leaf) for path, leaf in leaves if str(path[-1]).strip(".") == "segments"), jnp.int32(0)
    )


def check_streak(values: dict[str, float], step: int, max_streak: int) -> None:
    """Raises DivergedError once ``max_streak`` updates in a row were refused."""
    if values["streak"] >= max_streak:
        raise DivergedError(
            f"step {step}: {int(values['streak'])} updates in a row had a NaN or Inf loss or gradient "
            f"(loss {values['loss']}, gradient norm {values['grad_norm']}); lower the learning rate, lengthen the "
            "warm-up, or look at the data of these steps"
        )


def fit(
    *,
    step: Step,
    state: TrainState,
    start: int,
    steps: int,
    load: Callable[[int], Any],
    place: Callable[[Any], Any],
    checkpoints: Checkpoints,
    meta: dict[str, Any],
    log: MetricLog,
    checkpoint_every: int = 0,
    evaluate: Callable[[Any], dict[str, float]] | None = None,
    evaluate_every: int = 0,
    max_streak: int = 10,
) -> TrainState:
    """Trains from update ``start`` to ``steps`` and returns the last state, saved.

    Raises Preempted, with the state saved, when the machine is taken away (see ``distributed.preempted``).

    load: update number -> NumPy batch (this host's rows of it), a pure function, called one update ahead on a thread of
        its own.
    place: NumPy batch -> global arrays (and whatever else the objective needs computed, such as a reference).
    meta: the record stored with every checkpoint.
    evaluate: parameters -> held-out metrics, logged under "eval/" every ``evaluate_every`` updates.
    checkpoint_every: 0 saves only the last state.
    """
    pending: tuple[int, dict[str, Any]] | None = None
    clock = time.perf_counter()

    def flush() -> None:
        # One update behind the device, so that reading numbers never makes it wait.
        nonlocal pending, clock
        if pending is None:
            return
        number, metrics = pending
        pending = None
        values = to_floats(metrics)
        now = time.perf_counter()
        values["tokens_per_second"] = values.pop("tokens_per_second") / max(now - clock, 1e-9)
        clock = now
        log.write(number, values)
        check_streak(values, number, max_streak)

    with ThreadPoolExecutor(1) as pool, distributed.loop():
        ahead = pool.submit(load, start) if start < steps else None
        for number in range(start + 1, steps + 1):
            batch = ahead.result()
            if number < steps:
                ahead = pool.submit(load, number)
            batch = place(batch)
            state, metrics = step(state, batch)
            flush()
            distributed.beat(compiling=number == start + 1)
            pending = (number, metrics | {"tokens_per_second": count_tokens(batch)})
            leaving = distributed.preempted()
            saving = leaving or number == steps or (checkpoint_every and number % checkpoint_every == 0)
            evaluating = evaluate is not None and evaluate_every and number % evaluate_every == 0
            if saving or evaluating:
                flush()
            if evaluating and number < steps:
                log.write(number, {f"eval/{k}": v for k, v in evaluate(state.params).items()}, advance=False)
            if saving:
                log.sync()
                checkpoints.save(number, state_trees(state), meta)
            if leaving:
                checkpoints.wait()
                raise Preempted(f"step {number} of {steps} is saved")
            if saving or evaluating:
                clock = time.perf_counter()
    if start == 0 and steps == 0:
        checkpoints.save(0, state_trees(state), meta)
    checkpoints.wait()
    return state
