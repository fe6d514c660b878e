"""Products in 8 bits: their rule by hand, and models, objectives and meshes that use them."""

from __future__ import annotations

import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.models import DecoderConfig, MixtralConfig, build_model, quantize
from jaxtrain.models.decoder_config import remat_policy
from jaxtrain.optim import AdamW, Constant
from jaxtrain.sharding import MeshConfig, make_mesh, param_shardings, put_batch
from jaxtrain.train.state import new_state
from jaxtrain.train.step import loss_and_grads, make_train_step

pytest.importorskip("qwix")
NAMES = ("LM", "SFT", "RewardModel", "DPO", "PPOPolicy", "PPOCritic")


def rounded(x, axis):
    """int8 and scales: the largest magnitude along ``axis`` becomes 127.5."""
    scale = np.max(np.abs(x), axis=axis, keepdims=True) / 127.5
    return np.clip(np.round(x / scale), -128, 127), scale


def test_the_rule_in_int8():
    rng = np.random.default_rng(0)
    x, w, g = (rng.normal(size=size).astype(np.float32) for size in ((6, 5), (5, 4), (6, 4)))
    # The largest magnitudes are positive: -127.5 is rounded either way.
    x[:, 0], w[0], g[:, 0], g[0] = 4 + np.arange(6), 4 + np.arange(4), 20 + np.arange(6), 20 + np.arange(4)
    y, back = jax.vjp(lambda x, w: quantize.matmul("int8", x, w), x, w)
    dx, dw = back(g)
    (xq, xs), (wq, ws) = rounded(x, 1), rounded(w, 0)
    np.testing.assert_allclose(y, xq @ wq * xs * ws, rtol=1e-5)
    gq, gs = rounded(g * ws, 1)
    np.testing.assert_allclose(dx, gq @ wq.T * gs, rtol=1e-5)
    gq, gs = rounded(g * xs, 0)
    np.testing.assert_allclose(dw, xq.T @ gq * gs, rtol=1e-5)
    assert np.max(np.abs(y - x @ w)) > 1e-3


@pytest.mark.parametrize(("kind", "tolerance"), [("int8", 0.02), ("fp8", 0.08)])
def test_groups(kind, tolerance):
    """Each to within its rounding of the exact product and its gradients, and 0 beyond the groups."""
    rng = np.random.default_rng(0)
    x, w, g = (rng.normal(size=size).astype(np.float32) for size in ((16, 32), (3, 32, 24), (16, 24)))
    sizes = jnp.array([5, 0, 8], jnp.int32)
    y, back = jax.vjp(lambda x, w: quantize.grouped_matmul(kind, x, w, sizes), x, w)
    exact, exact_back = jax.vjp(lambda x, w: jnp.concatenate([x[:5] @ w[0], x[5:13] @ w[2], 0 * x[13:] @ w[0]]), x, w)
    for found, expected in zip((y, *back(g)), (exact, *exact_back(g)), strict=True):
        assert np.linalg.norm(found - expected) < tolerance * np.linalg.norm(expected)
    np.testing.assert_array_equal(y[13:], 0)


@pytest.fixture(scope="module")
def compute(tools):
    """(quantize, mesh config) -> {objective: (Loss, gradients)}"""
    batches = {name: tools.batch(tools.objectives[name]) for name in NAMES}

    def run(kind, config):
        model = tools.model(quantize=kind, remat="dots", d_model=32, d_ff=64, num_layers=1)
        params = jax.tree.map(lambda x: 0.3 * x, tools.params(model))
        mesh = make_mesh(config)

        def all_of_them(params, batches, rng):
            return {
                name: loss_and_grads(model.apply, tools.objectives[name], params, batch, rng)
                for name, batch in batches.items()
            }

        shardings = param_shardings(model.axes, params, mesh, model.rules)
        function = jax.jit(all_of_them, compiler_options=tools.fast)
        with jax.set_mesh(mesh):
            placed = {name: put_batch(batch, mesh) for name, batch in batches.items()}
            return jax.device_get(function(jax.device_put(params, shardings), placed, jax.random.key(0)))

    exact, one = run("none", MeshConfig()), run("int8", MeshConfig())
    return exact, one, run("int8", MeshConfig(fsdp=2, tensor=2, data=2))


def distance(found, expected):
    square = lambda trees: sum(float(np.sum(np.square(x))) for x in jax.tree.leaves(trees))  # noqa: E731  (one line)
    return (square(jax.tree.map(np.subtract, found, expected)) / square(expected)) ** 0.5


@pytest.mark.parametrize("name", NAMES)
def test_every_objective_on_one_device_and_on_eight(name, compute):
    (exact, exact_grads), (one, one_grads), (mesh, mesh_grads) = (found[name] for found in compute)
    assert 1e-4 < distance(one_grads, exact_grads) < 0.1
    assert abs(one.total - exact.total) < 0.02 * abs(exact.total) + 0.02 * one.weight
    # Sums in another order round a few numbers the other way.
    assert distance(mesh_grads, one_grads) < 0.02
    assert abs(mesh.total - one.total) < 2e-3 * abs(one.total) + 2e-3 * one.weight


def int8_products(function, *args):
    return len(re.findall(r":i32\S* = (?:ragged_)?dot_general", str(jax.make_jaxpr(function)(*args))))


def test_which_products_and_that_nothing_else_changes(tools):
    plain, model = tools.model(), tools.model(quantize="int8")
    assert model.axes == plain.axes and model.shapes() == plain.shapes() and model.dtypes == plain.dtypes
    params, batch = tools.params(model), tools.batch(tools.objectives["LM"])
    # Queries, keys, values, output, gate, up, down; one loop over layers.
    assert int8_products(model.apply, params, batch) == 7
    grads = lambda p: loss_and_grads(model.apply, tools.objectives["LM"], p, batch, jax.random.key(0))  # noqa: E731
    assert int8_products(grads, params) == 21
    assert int8_products(plain.apply, params, batch) == 0


def test_experts(tools):
    sizes = dict(vocab_size=tools.V, num_layers=1, d_model=32, num_heads=4, num_kv_heads=2, d_ff=32, max_positions=32)
    batch = tools.batch(tools.objectives["LM"])
    logits = {}
    for kind in ("none", "int8"):
        model = build_model(MixtralConfig(**sizes, num_experts=4, top_k=2, quantize=kind))
        params = jax.jit(model.init)(jax.random.key(0))
        assert int8_products(model.apply, params, batch) == (7 if kind == "int8" else 0)
        logits[kind] = {
            mesh: jax.device_get(run_logits(model, params, batch, MeshConfig(expert=mesh))) for mesh in (1, 2)
        }
    assert 1e-4 < distance(logits["int8"][1], logits["none"][1]) < 0.05
    assert distance(logits["int8"][2], logits["int8"][1]) < 0.02


def run_logits(model, params, batch, config):
    mesh = make_mesh(config)
    with jax.set_mesh(mesh):
        return jax.jit(lambda p, b: model.apply(p, b).logits)(params, put_batch(batch, mesh))


def test_remat_keeps_results_rather_than_sums(tools):
    model = tools.model(quantize="int8", remat="dots")
    policy = remat_policy(model.config)

    def layer(x, w):
        return jnp.sum(jnp.sin(quantize.matmul("int8", jnp.sin(x), w)))

    x, w = jnp.ones((8, 4), jnp.bfloat16), jnp.ones((4, 16), jnp.bfloat16)
    for chosen, kept in ((policy, "bfloat16"), (remat_policy(tools.model(remat="dots").config), "int32")):
        residuals = jax.eval_shape(lambda x, w, p=chosen: jax.vjp(jax.checkpoint(layer, policy=p), x, w)[1], x, w)
        assert {str(r.dtype) for r in jax.tree.leaves(residuals) if r.shape == (8, 16)} == {kept}


@pytest.mark.parametrize("kind", ["int8", pytest.param("fp8", marks=pytest.mark.slow)])
def test_training_follows_bfloat16(kind, tools):
    """The mean loss of the last of 40 updates to within 3%, of a model that learns one batch."""
    losses = {}
    batch = tools.batch(tools.objectives["LM"])
    for each in ("none", kind):
        model = tools.model(quantize=each, d_model=32, d_ff=64, num_layers=1, compute_dtype="bfloat16")
        tx = AdamW(schedule=Constant(peak=0.01)).build(40, model.shapes(), model.axes)
        step = make_train_step(model.apply, tools.objectives["LM"], tx)
        state = jax.jit(lambda m=model, t=tx: new_state(m.init(jax.random.key(0)), t, 0))()
        step = step.lower(state, batch).compile(compiler_options=tools.fast)
        said = []
        for _ in range(40):
            state, metrics = step(state, batch)
            said.append(float(metrics["loss"]))
        assert metrics["skipped"] == 0
        losses[each] = said
    assert losses["none"][-1] < 0.6 * losses["none"][0]
    np.testing.assert_allclose(np.mean(losses[kind][-5:]), np.mean(losses["none"][-5:]), rtol=0.03)
    assert losses[kind] != losses["none"]


def test_mistakes_are_named(monkeypatch):
    sizes = dict(vocab_size=8, num_layers=1, d_model=8, num_heads=2, num_kv_heads=1, d_ff=8, max_positions=8)
    with pytest.raises(ValueError, match=r"quantize='int4'; one of \('none', 'int8', 'fp8'\)"):
        DecoderConfig(**sizes, quantize="int4")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs qwix, which is not installed: pip install 'jaxtrain\[quantize\]'"):
        DecoderConfig(**sizes, quantize="int8")
    DecoderConfig(**sizes)
