"""The one train step: accumulation and order (T5), clipping, skipping, donation, metrics."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtrain.objectives import LM
from jaxtrain.optim import OPTIMIZERS, SCHEDULES
from jaxtrain.sharding import MeshConfig, make_mesh, put_batch
from jaxtrain.train.state import abstract_state, init_params, init_state, new_state, state_bytes
from jaxtrain.train.step import divide, loss_and_grads, make_train_step, split_rows
from jaxtrain.types import Loss, Outputs, Sum


def rows(batch, order):
    return jax.tree.map(lambda x: x[np.asarray(order)], batch)


@pytest.fixture(scope="session")
def model(tools):
    return tools.model(num_heads=4, num_kv_heads=2, head_dim=4)


@pytest.fixture(scope="session")
def mean_grads(tools):
    """``(objective, batch, accumulate) -> (mean gradients, metrics as means)``, NumPy.

    The model is the smallest whose every output reads all tokens before it.
    """
    rng = np.random.default_rng(0)
    shapes = {"embed": (tools.V, 8), "logits": (8, tools.V), "rewards": (8,), "values": (8,)}
    params, compiled = {k: rng.normal(size=v).astype(np.float32) for k, v in shapes.items()}, {}

    def apply(params, tokens, *, cache=None, rng=None):
        x = params["embed"][tokens.ids] * (tokens.segments > 0)[..., None]
        hidden = jnp.tanh(jnp.cumsum(x, axis=1))
        return Outputs(hidden=hidden, **{k: hidden @ params[k] for k in ("logits", "rewards", "values")})

    def run(objective, batch, accumulate=1):
        if (objective, accumulate) not in compiled:
            compiled[objective, accumulate] = jax.jit(
                lambda p, b: loss_and_grads(apply, objective, p, b, jax.random.key(0), accumulate),
                compiler_options=tools.fast,
            )
        loss, grads = jax.device_get(compiled[objective, accumulate](params, batch))
        metrics = {name: float(divide(metric)) for name, metric in loss.metrics.items()}
        return jax.tree.map(lambda g: g / loss.weight, grads), metrics | {"loss": loss.total / loss.weight}

    return run


def test_microbatches_and_row_order_change_nothing(objective, mean_grads, tools):
    batch = tools.batch(objective)
    # Rows 1 and 5 of no weight: with four microbatches, rows i and i + 4 make one that is empty.
    kept = ~np.isin(np.arange(8), (1, 5))
    empty = jax.tree.map(lambda x: (x.T * kept).T.astype(x.dtype), batch)
    for data in (batch, empty):
        grads, metrics = mean_grads(objective, data)
        for accumulate in (4, 8):
            found, values = mean_grads(objective, data, accumulate)
            tools.assert_close(found, grads)
            assert values == pytest.approx(metrics, rel=1e-5, abs=1e-6)
        found, values = mean_grads(objective, rows(data, [3, 0, 7, 6, 1, 5, 2, 4]))
        tools.assert_close(found, grads)
        assert values == pytest.approx(metrics, rel=1e-5, abs=1e-6)


def test_microbatches_of_one_device_stay_on_it():
    parts = split_rows(np.arange(8), 4)
    assert parts.tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]]
    with pytest.raises(ValueError, match="8 rows is not divisible into 3"):
        split_rows(np.arange(8), 3)


@pytest.fixture(scope="session")
def lm_step(tools, model):
    """A compiled step of AdamW under a schedule, and a fresh state for it."""
    schedule = SCHEDULES["Linear"](peak=0.1, warmup_steps=2)
    optimizer = OPTIMIZERS["AdamW"](schedule=schedule)
    tx = optimizer.build(10, model.shapes(), model.axes)
    step = make_train_step(
        model.apply, LM(), tx, learning_rate=lambda done: optimizer.learning_rate(done, 10), clip_norm=1.0
    )

    def fresh():
        return new_state(jax.tree.map(jnp.asarray, tools.params(model)), tx, 0)

    fresh.rate = lambda done: float(optimizer.learning_rate(done, 10))
    return step, fresh


def tree_bytes(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


@pytest.mark.smoke
def test_a_bad_batch_changes_nothing_but_the_counters(lm_step, tools):
    step, fresh = lm_step
    batch = tools.batch(LM())
    poisoned = dataclasses.replace(batch, weights=np.where(batch.weights > 0, np.inf, 0).astype(np.float32))
    state, first = step(fresh(), batch)
    before = tree_bytes((state.params, state.opt_state))
    for bad in (1, 2):
        state, metrics = step(state, poisoned)
        assert not np.isfinite(metrics["loss"])
        assert tree_bytes((state.params, state.opt_state)) == before
        assert (int(state.step), int(state.skipped), int(state.streak)) == (1 + bad, bad, bad)
        assert (float(metrics["skipped"]), float(metrics["streak"])) == (bad, bad)
    state, metrics = step(state, batch)
    assert tree_bytes((state.params, state.opt_state)) != before
    assert (int(state.step), int(state.skipped), int(state.streak)) == (4, 2, 0)
    assert float(metrics["loss"]) < float(first["loss"])
    # The schedule counts updates that were made: the second one, not the fourth.
    rates = [float(first["learning_rate"]), float(metrics["learning_rate"])]
    assert rates == pytest.approx([fresh.rate(0), fresh.rate(1)]) and rates[0] != rates[1]


def test_a_batch_of_no_weight_is_no_news(lm_step, tools):
    step, fresh = lm_step
    batch = tools.batch(LM())
    state = fresh()
    state, metrics = step(state, dataclasses.replace(batch, weights=np.zeros_like(batch.weights)))
    assert (float(metrics["loss"]), float(metrics["weight"]), float(metrics["grad_norm"])) == (0, 0, 0)
    assert int(state.skipped) == 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


def test_the_old_state_is_donated(lm_step, tools):
    step, fresh = lm_step
    old = fresh()
    new, _ = step(old, tools.batch(LM()))
    large = [leaf for leaf in jax.tree.leaves((old.params, old.opt_state)) if leaf.ndim > 1]
    assert large and all(leaf.is_deleted() for leaf in large)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(new))


def quadratic(apply, params, batch, rng):
    """Gradient of the mean: ``params['w'] * mean(weights * x) / mean(weights)``."""
    total = jnp.sum(batch["weights"] * batch["x"]) * jnp.sum(params["w"])
    metrics = {"x": Sum(jnp.sum(batch["x"]), jnp.float32(4))}
    return Loss(total=total, weight=jnp.sum(batch["weights"]), metrics=metrics)


@pytest.mark.parametrize(
    ("scale", "clip", "factor"), [(3.0, 1.0, 1 / 6), (3.0, 6.0, 1.0), (3.0, None, 1.0), (0.1, 1.0, 1)]
)
def test_clipping_is_exact(scale, clip, factor):
    """Four parameters, each with gradient ``scale``: a norm of twice that."""
    params = {"w": jnp.ones((4,), jnp.float32)}
    batch = {"weights": np.array([1, 3, 0, 4], np.float32), "x": np.full(4, scale, np.float32)}
    step = make_train_step(None, quadratic, optax.sgd(1.0), clip_norm=clip)
    state, metrics = step(new_state(params, optax.sgd(1.0), 0), batch)
    assert float(metrics["grad_norm"]) == pytest.approx(2 * scale, rel=1e-6)
    assert float(metrics["weight"]) == 8.0
    assert float(metrics["x"]) == pytest.approx(scale)
    np.testing.assert_allclose(np.asarray(state.params["w"]), 1 - scale * factor, rtol=1e-6)


def test_settings_are_checked():
    for settings, message in [
        ({"accumulate": 0}, "accumulate must be at least 1, found 0"),
        ({"clip_norm": 0.0}, "clip_norm must be positive"),
        ({"clip_norm": float("nan")}, "clip_norm must be positive"),
    ]:
        with pytest.raises(ValueError, match=message):
            make_train_step(None, quadratic, optax.sgd(1.0), **settings)


@pytest.mark.smoke
def test_a_sharded_step_equals_a_plain_one_and_stays_where_it_was(tools, model):
    """Two updates on fsdp 2 x tensor 2, with the optimizer's moments sharded."""
    optimizer = OPTIMIZERS["AdamW"](schedule=SCHEDULES["Constant"](peak=1e-2))
    tx = optimizer.build(4, model.shapes(), model.axes)
    batch = tools.batch(LM())
    results = []
    for config in (MeshConfig(), MeshConfig(fsdp=2, tensor=2)):
        mesh = make_mesh(config)
        target = abstract_state(model, tx, mesh)
        shardings = jax.tree.map(lambda x: x.sharding, target)
        step = make_train_step(model.apply, LM(), tx, mesh=mesh, shardings=shardings, accumulate=2)
        state = init_state(model, tx, mesh, 0)
        for _ in range(2):
            state, metrics = step(state, put_batch(batch, mesh))
        for leaf, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True):
            assert leaf.sharding.is_equivalent_to(wanted, leaf.ndim)
        results.append((jax.device_get(state.params), float(metrics["loss"])))
        assert state_bytes(state) == state_bytes(target)
    # Adam's first updates have the size of the rate whatever the gradient's, so small differences grow.
    tools.assert_close(results[1][0], results[0][0], tolerance=1e-3)
    assert results[1][1] == pytest.approx(results[0][1], rel=1e-5)


def test_fresh_parameters_do_not_depend_on_the_mesh(model):
    one = tree_bytes(init_params(model, make_mesh(MeshConfig()), 3))
    for config in (MeshConfig(data=8), MeshConfig(fsdp=2, tensor=2)):
        assert tree_bytes(init_params(model, make_mesh(config), 3)) == one
