"""What a model adds to every objective: balance of experts, further tokens, and biases that loads move."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtrain.evaluate.heldout import make_eval_step
from jaxtrain.models import DeepseekV3Config, MixtralConfig, build_model
from jaxtrain.models.mtp import ahead
from jaxtrain.objectives import LM
from jaxtrain.sharding import MeshConfig, make_mesh, put_batch
from jaxtrain.train.state import abstract_state, init_state, new_state
from jaxtrain.train.step import divide, loss_and_grads, make_train_step, with_auxiliary
from jaxtrain.types import Auxiliary, Loss, Outputs, Sum

SIZES = {"num_layers": 2, "d_model": 16, "num_heads": 2, "num_kv_heads": 2, "d_ff": 8, "max_positions": 32}
SIZES |= {"num_experts": 8, "top_k": 2}
LATENT = {"expert_d_ff": 8, "latent_size": 4, "plain_dim": 2, "rope_dim": 2, "value_dim": 2}
RATE = 0.125


@pytest.fixture(scope="module")
def mixtral(tools):
    config = MixtralConfig(vocab_size=tools.V, load_balance_coef=0.5, router_z_coef=0.25, **SIZES)
    model = build_model(config)
    return model, tools.params(model)


@pytest.fixture(scope="module")
def deepseek(tools):
    coefs = {"mtp_layers": 2, "mtp_coef": 0.5, "router_bias_rate": RATE, "sequence_balance_coef": 0.25}
    model = build_model(DeepseekV3Config(vocab_size=tools.V, **SIZES | {"num_layers": 1}, **LATENT, **coefs))
    return model, tools.params(model)


def fake(params, tokens, *, cache=None, rng=None):
    """A model of one number that says what it wants: losses with means of 2 p and 3 p, counts of its tokens."""
    rows = jnp.sum(tokens.weights)
    shape = (*tokens.ids.shape, 24)
    return Outputs(
        hidden=None,
        logits=params * jnp.ones(shape),
        rewards=params * jnp.ones(shape[:2]),
        values=params * jnp.ones(shape[:2]),
        auxiliary=Auxiliary(
            losses={"a": Sum(2 * params * rows, rows), "b": Sum(3 * params * 7, jnp.asarray(7.0))},
            metrics={"moe/a": Sum(rows, jnp.ones(()))},
            counts={"layers": jnp.ones((1, 2))},
        ),
    )


def silent(params, tokens, **kwargs):
    return dataclasses.replace(fake(params, tokens, **kwargs), auxiliary=None)


def test_every_objective_gets_them_for_all_its_weight(objective, tools):
    batch, p = tools.batch(objective), jnp.asarray(0.5)
    rng = jax.random.key(0)
    (loss, grad), (plain, plain_grad) = (loss_and_grads(apply, objective, p, batch, rng) for apply in (fake, silent))
    assert plain.weight > 0 and loss.weight == plain.weight and plain.counts is None
    assert loss.total == pytest.approx(float(plain.total + plain.weight * 5 * p), rel=1e-5)
    assert grad == pytest.approx(float(plain_grad + plain.weight * 5), rel=1e-5)
    assert loss.metrics.keys() - plain.metrics.keys() == {"moe/a"}
    assert loss.counts["layers"].tolist() == [[1, 1]]


def objective_of(*calls):
    """An objective that calls the model on each of these rows of its batch, and has a loss of 0 and a weight of 10."""

    def objective(apply, params, batch, rng):
        for rows in calls:
            apply(params, jax.tree.map(lambda x, rows=rows: x[rows], batch))
        return Loss(total=jnp.zeros(()), weight=jnp.asarray(10.0), metrics={})

    return objective


def test_several_calls_count_by_their_own_weights(tools):
    batch = tools.tokens(np.random.default_rng(0))
    first, rest = slice(0, 1), slice(1, None)

    def apply(params, tokens, **kwargs):
        rows = jnp.sum(tokens.weights)
        mean = jnp.max(tokens.positions).astype(jnp.float32)  # another one in each call
        said = Auxiliary(losses={"a": Sum(mean * rows, rows)}, metrics={"m": Sum(mean, 1.0)}, counts={"l": rows})
        return Outputs(hidden=None, auxiliary=said)

    batch = dataclasses.replace(batch, positions=np.where(np.arange(8)[:, None] == 0, 3, 5) * (batch.segments > 0))
    loss = with_auxiliary(apply, objective_of(first, rest), None, batch, None)
    weights = [batch.weights[rows].sum() for rows in (first, rest)]
    assert loss.total == pytest.approx(10 * (3 * weights[0] + 5 * weights[1]) / sum(weights))
    assert loss.metrics["m"] == (8, 2) and loss.counts["l"] == sum(weights)


@pytest.mark.parametrize("wrap", [jax.checkpoint, jax.jit], ids=["checkpoint", "jit"])
def test_a_call_out_of_reach_is_refused(wrap, tools):
    def objective(apply, params, batch, rng):
        total = wrap(lambda p: jnp.sum(apply(p, batch).logits))(params)
        return Loss(total=total, weight=jnp.ones(()), metrics={})

    batch = tools.tokens(np.random.default_rng(0))
    with pytest.raises(ValueError, match=r"inside a transformation .* \['a', 'b'\] would be lost"):
        loss_and_grads(fake, objective, jnp.ones(()), batch, jax.random.key(0))
    loss, _ = loss_and_grads(silent, objective, jnp.ones(()), batch, jax.random.key(0))
    assert loss.total == batch.ids.size * 24


def test_microbatches_count_by_the_objectives_weight(mixtral, tools):
    """A loss of balance is taken of each microbatch; counts and routing statistics are those of the whole batch."""
    model, params = mixtral
    batch = tools.batch(LM())
    run = jax.jit(
        lambda p, b, n: loss_and_grads(model.apply, LM(), p, b, jax.random.key(0), n)[0],
        static_argnums=2,
        compiler_options=tools.fast,
    )
    whole, halves = run(params, batch, 1), run(params, batch, 2)
    parts = [run(params, jax.tree.map(lambda x, i=i: x[i::2], batch), 1) for i in range(2)]
    np.testing.assert_allclose(halves.total, sum(part.total for part in parts), rtol=1e-5)
    np.testing.assert_array_equal(halves.counts["layers"], whole.counts["layers"])
    assert whole.counts["layers"].sum() == 2 * 2 * (batch.segments > 0).sum()
    np.testing.assert_allclose(divide(halves.metrics["moe/router_z"]), divide(whole.metrics["moe/router_z"]), rtol=1e-5)
    assert halves.total != pytest.approx(float(whole.total), rel=1e-6)


def test_training_only(mixtral, tools):
    """An evaluation says what the objective says; training adds coefficient * value, and the router feels it."""
    model, params = mixtral
    quiet = build_model(dataclasses.replace(model.config, load_balance_coef=0.0, router_z_coef=0.0))
    batch = tools.batch(LM())
    sums = make_eval_step(model.apply, LM())(params, batch)
    assert set(sums) == {"loss", "accuracy"}
    found, without = (
        jax.jit(lambda p, m=m: loss_and_grads(m.apply, LM(), p, batch, jax.random.key(0)), compiler_options=tools.fast)(
            params
        )
        for m in (model, quiet)
    )
    metrics = {name: float(divide(value)) for name, value in found[0].metrics.items()}
    extra = 0.5 * metrics["moe/load_balance"] + 0.25 * metrics["moe/router_z"]
    np.testing.assert_allclose(without[0].total, sums["loss"].total, rtol=1e-5)
    np.testing.assert_allclose(found[0].total, sums["loss"].total + extra * found[0].weight, rtol=1e-5)
    assert metrics["loss"] == pytest.approx(float(divide(sums["loss"])), rel=1e-5)
    grads = [x[1]["layers"]["mlp"]["router"]["kernel"] for x in (found, without)]
    assert np.abs(grads[0] - grads[1]).max() > 1e-3


def bias_of(params):
    return {"layers": params["layers"]["mlp"]["router"]["bias"], "mtp": params["mtp"]["block"]["mlp"]["router"]["bias"]}


def test_loads_alone_move_biases(deepseek, tools, capfd):
    """Not the optimizer or its decay; the whole batch's, all devices and microbatches; and not in a refused step."""
    model, params = deepseek
    batch = tools.batch(LM())
    loss, grads = jax.jit(
        lambda p: loss_and_grads(model.apply, LM(), p, batch, jax.random.key(0)), compiler_options=tools.fast
    )(params)
    assert not any(np.any(x) for x in bias_of(grads).values())
    counts = {"layers": loss.counts["layers"], "mtp": loss.counts["mtp/block"]}
    wanted = {
        name: bias + RATE * np.sign(counts[name].mean(1, keepdims=True) - counts[name])
        for name, bias in bias_of(params).items()
    }
    assert all(len(set(np.sign(w - b).ravel())) >= 2 for w, b in zip(wanted.values(), bias_of(params).values()))

    tx = optax.chain(optax.add_decayed_weights(0.5), optax.scale_by_sign(), optax.scale(-0.1))
    mesh = make_mesh(MeshConfig(expert=2, data=2))
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(model, tx, mesh))
    step = make_train_step(model.apply, LM(), tx, accumulate=2, balance=model.balance, mesh=mesh, shardings=shardings)
    state = init_state(model, tx, mesh, 0, jax.tree.map(jnp.asarray, params))
    state, metrics = step(state, put_batch(batch, mesh))
    assert "Involuntary full rematerialization" not in capfd.readouterr().err
    for name, bias in bias_of(state.params).items():
        np.testing.assert_allclose(bias, wanted[name], atol=1e-6, err_msg=name)
    assert {"moe/load_balance", "moe/max_load", "moe/dropped", "mtp/nll"} <= metrics.keys()
    assert metrics["moe/max_load"] > 1 and metrics["moe/dropped"] == 0

    before = jax.device_get(bias_of(state.params))
    spoilt = dataclasses.replace(batch, weights=np.full_like(batch.weights, np.nan))
    state, metrics = step(state, put_batch(spoilt, mesh))
    assert metrics["skipped"] == 1
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(bias_of(state.params)), before)


def test_a_model_without_biases_moves_nothing(mixtral):
    assert mixtral[0].balance is None


def test_ahead_stays_in_its_segment(tools):
    batch = tools.batch(LM())
    for steps in (1, 2, 17):
        later = ahead(batch, steps)
        for b, t in np.ndindex(batch.ids.shape):
            inside = (
                t + steps < tools.T and batch.segments[b, t] and batch.segments[b, t + steps] == batch.segments[b, t]
            )
            there = {
                name: getattr(batch, name)[b, t + steps] if inside else 0 for name in ("ids", "targets", "weights")
            }
            assert later.segments[b, t] == (batch.segments[b, t] if inside else 0)
            assert all(getattr(later, name)[b, t] == value for name, value in there.items())


def test_multi_token_prediction_learns_what_stands_further_on(deepseek, tools):
    """Its loss falls, falls through shared embeddings too, and adds the mean over steps times its coefficient."""
    model, params = deepseek
    batch = tools.batch(LM())
    run = jax.jit(lambda p: loss_and_grads(model.apply, LM(), p, batch, jax.random.key(0)), compiler_options=tools.fast)
    loss, grads = run(params)
    nll, weight = loss.metrics["mtp/nll"]
    assert weight == sum(ahead(batch, steps).weights.sum() for steps in (1, 2))
    assert all(
        np.any(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(grads["mtp"]) if "bias" not in str(path)
    )
    found = jax.jit(model.apply, compiler_options=tools.fast)(params, batch).auxiliary.losses
    assert sum(found[f"mtp/{step}"].total for step in (0, 1)) == pytest.approx(0.5 / 2 * float(nll), rel=1e-5)
    # One small step downhill on everything lowers it.
    lower, _ = run(jax.tree.map(lambda p, g: p - 1e-4 * g, params, grads))
    assert lower.total < loss.total and lower.metrics["mtp/nll"].total < nll
    assert new_state(params, optax.sgd(0.1), 0).params.keys() >= {"mtp"}
