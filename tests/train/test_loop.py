"""The loop: what it logs and saves, how it resumes, and when it gives up."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtrain.checkpoint import Checkpoints, saved_steps
from jaxtrain.train.loop import DivergedError, count_tokens, fit, from_trees, state_trees
from jaxtrain.train.metrics import MetricLog, read_rows
from jaxtrain.train.state import new_state
from jaxtrain.train.step import make_train_step
from jaxtrain.types import Loss, Sum

TX = optax.adam(0.1)
META = {"hash": "x"}


def regression(apply, params, batch, rng):
    """With noise from ``rng``, so that a wrong key shows."""
    noise = 0.01 * jax.random.normal(rng, batch["x"].shape)
    error = batch["x"] * params["w"] + noise - batch["y"]
    total, weight = jnp.sum(error**2), jnp.float32(error.size)
    return Loss(total=total, weight=weight, metrics={"error": Sum(jnp.sum(jnp.abs(error)), weight)})


@pytest.fixture(scope="module")
def step():
    return make_train_step(None, regression, TX)


def load(number):
    rng = np.random.default_rng(number)
    x = rng.normal(size=8).astype(np.float32)
    return {"x": x, "y": 3 * x}


def fresh():
    return new_state({"w": jnp.zeros((), jnp.float32)}, TX, 0)


@pytest.fixture
def train(step, tmp_path):
    """Runs ``fit`` in ``folder``, from its newest checkpoint, and returns the rows of its log and the saved steps."""

    def run(folder, steps, *, load=load, **settings):
        checkpoints = Checkpoints(tmp_path / folder / "checkpoints", keep=10)
        try:
            state = fresh()
            target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
            found = checkpoints.restore_latest(state_trees(target), META)
            start, state = (0, state) if found is None else (found[0], from_trees(found[1]))
            with MetricLog(tmp_path / folder, start=start, steps=steps, title=folder) as log:
                state = fit(
                    step=step, state=state, start=start, steps=steps, load=load, place=lambda x: x,
                    checkpoints=checkpoints, meta=META, log=log, **settings,
                )  # fmt: skip
            return state, read_rows(tmp_path / folder / "metrics.jsonl"), checkpoints.steps()
        finally:
            checkpoints.close()

    return run


def numbers(rows):
    return [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second")} for row in rows]


@pytest.mark.smoke
def test_rows_and_checkpoints(train, tmp_path):
    evaluated = []

    def evaluate(params):
        evaluated.append(float(params["w"]))
        return {"w": evaluated[-1]}

    state, rows, saved = train("a", 7, checkpoint_every=3, evaluate=evaluate, evaluate_every=2)
    assert saved == [3, 6, 7]
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 8))
    for name in ("loss", "error", "weight", "grad_norm", "skipped", "streak", "tokens_per_second", "seconds"):
        assert all(isinstance(row[name], int | float) for row in steps)
    assert [row["step"] for row in rows if "eval/w" in row] == [
        2,
        4,
        6,
    ]  # after the last, the stage measures itself
    assert [row["eval/w"] for row in rows if "eval/w" in row] == evaluated
    assert 0.3 < float(state.params["w"]) < 1.0  # towards 3, by Adam's steps of 0.1
    assert [row["seconds"] for row in rows] == sorted(row["seconds"] for row in rows)
    assert int(state.step) == 7 and list((tmp_path / "a" / "events").iterdir())


def test_a_resumed_run_is_the_uninterrupted_one(train, tmp_path):
    whole_state, whole, _ = train("whole", 9, checkpoint_every=4)

    def fails(number):
        if number == 6:
            raise RuntimeError("the machine went down")
        return load(number)

    with pytest.raises(RuntimeError, match="went down"):
        train("cut", 9, checkpoint_every=4, load=fails)
    # Rows behind the newest checkpoint are there, and one that a kill cut short; the resumed run replaces them.
    log = tmp_path / "cut" / "metrics.jsonl"
    assert read_rows(log)[-1]["step"] > 4
    log.write_text(log.read_text() + '{"step": 7, "lo')
    state, rows, _ = train("cut", 9, checkpoint_every=4)
    assert numbers(rows) == numbers(whole)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(whole_state), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_bad_batches_are_skipped_until_there_are_too_many(train, tmp_path):
    def some(number):
        batch = load(number)
        return batch | {"y": np.full(8, np.nan, np.float32)} if number in (2, 3, 5) else batch

    state, rows, _ = train("some", 8, load=some, max_streak=3)
    assert [row["skipped"] for row in rows] == [0, 0, 1, 2, 2, 3, 3, 3]
    assert [row["streak"] for row in rows] == [0, 0, 1, 2, 0, 1, 0, 0]
    assert [row["loss"] is None for row in rows] == [False, False, True, True, False, True, False, False]
    assert int(state.skipped) == 3

    def rest(number):
        return load(number) if number < 4 else load(number) | {"y": np.full(8, np.inf, np.float32)}

    with pytest.raises(DivergedError, match=r"step 7: 3 updates in a row had a NaN or Inf loss .*lower the learning"):
        train("rest", 20, load=rest, max_streak=3, checkpoint_every=4)
    rows = [json.loads(line) for line in (tmp_path / "rest" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 7 and rows[-1]["loss"] is None
    assert saved_steps(tmp_path / "rest" / "checkpoints") == [4]


def test_no_steps_save_the_first_state(train):
    state, rows, saved = train("none", 0)
    assert (int(state.step), rows, saved) == (0, [], [0])


def test_tokens_are_counted_without_padding(tools):
    batch = tools.batch(tools.objectives["RewardModel"])
    assert count_tokens(batch) == 2 * sum(tools.lengths)  # both sides of every pair
    assert count_tokens(tools.tokens(np.random.default_rng(0))) == sum(tools.lengths)
    assert count_tokens({"x": np.ones(3)}) == 0
