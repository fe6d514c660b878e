from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxtrain.objectives import PPOCritic, PPOPolicy, PPOShared
from jaxtrain.objectives.common import score, token_logps
from jaxtrain.objectives.ppo import clipped_policy_loss, clipped_value_loss


def mean(metric):
    return float(metric.total / metric.weight)


@pytest.mark.parametrize(
    ("ratio", "advantage", "dual_clip", "golden", "binds"),
    [
        (4.0, -1.0, None, 4.0, 0),
        (4.0, -1.0, 3.0, 3.0, 1),
        (2.0, -1.0, 3.0, 2.0, 0),
        (4.0, 1.0, 3.0, -1.3, 1),  # clip_high = .3
        (0.5, 1.0, None, -0.5, 0),
        (0.5, -1.0, None, 0.8, 1),  # clip_low = .2
        (1.25, 1.0, None, -1.25, 0),
    ],
)
def test_policy_loss_golden(ratio, advantage, dual_clip, golden, binds):
    with jax.enable_x64(True):

        def loss(ratio):
            return clipped_policy_loss(ratio, jnp.float64(advantage), 0.2, 0.3, dual_clip)

        found, clipped = loss(jnp.float64(ratio))
        np.testing.assert_allclose(found, golden, atol=1e-12)
        assert clipped == binds
        check_grads(lambda ratio: loss(ratio)[0], (ratio,), 1, ["rev"], rtol=1e-4)


@pytest.mark.parametrize(
    ("value", "clip", "golden", "binds"),
    [(1.2, 0.2, 0.845, 1), (1.2, None, 0.32, 0), (0.6, 0.2, 0.98, 0), (-1.0, 0.2, 4.5, 0)],
)
def test_value_loss_golden(value, clip, golden, binds):
    with jax.enable_x64(True):
        found, clipped = clipped_value_loss(jnp.float64(value), jnp.float64(0.5), jnp.float64(2.0), clip)
        np.testing.assert_allclose(found, golden, atol=1e-12)
        assert clipped == binds
        check_grads(lambda v: clipped_value_loss(v, 0.5, 2.0, clip)[0], (value,), 1, ["rev"], rtol=1e-4)


def rollout(tools, apply, params, temperature):
    """A rollout whose old and reference log-probabilities are the model's own at that temperature."""
    batch = tools.make_rollout(np.random.default_rng(0))
    logps = token_logps(apply(params, batch.tokens).logits, batch.tokens.targets, temperature)
    return dataclasses.replace(batch, old_logps=logps, reference_logps=logps)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_first_minibatch_ratio_is_one(temperature, dropout_model, tools):
    """T9, with dropout configured."""
    apply, params = dropout_model
    batch = rollout(tools, apply, params, temperature)
    loss = PPOPolicy(temperature=temperature)(apply, params, batch, jax.random.key(0))
    np.testing.assert_allclose(mean(loss.metrics["val/ratio"]), 1, atol=1e-5)
    np.testing.assert_allclose(mean(loss.metrics["policy/approxkl_avg"]), 0, atol=1e-10)
    assert mean(loss.metrics["policy/clipfrac_avg"]) == 0
    weights, advantages = batch.tokens.weights, batch.advantages
    np.testing.assert_allclose(loss.total, -(weights * advantages).sum(), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(loss.weight, weights.sum())
    # The bug this is about: log-probabilities of another temperature.
    wrong = PPOPolicy(temperature=temperature + 0.3)(apply, params, batch, None)
    assert mean(wrong.metrics["policy/approxkl_avg"]) > 1e-3


def test_policy_terms_and_metrics(lookup, tools):
    """The whole loss against its formula, written out in NumPy."""
    apply, params = lookup
    batch = tools.make_rollout(np.random.default_rng(0))
    objective = PPOPolicy(entropy_coef=0.1, kl_coef=0.2, kl_estimator="k1", temperature=0.7)
    loss = objective(apply, params, batch, None)

    logits = params["logits"].astype(np.float64)[batch.tokens.ids] / 0.7
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    logps = np.take_along_axis(log_p, batch.tokens.targets[..., None], -1)[..., 0]
    w = batch.tokens.weights
    ratio = np.exp(logps - batch.old_logps)
    clipped = np.maximum(-ratio * batch.advantages, -np.clip(ratio, 0.8, 1.2) * batch.advantages)
    terms = {
        "loss/policy_avg": clipped,
        "policy/approxkl_avg": 0.5 * (logps - batch.old_logps) ** 2,
        "policy/clipfrac_avg": clipped != -ratio * batch.advantages,
        "policy/entropy_avg": -(np.exp(log_p) * log_p).sum(-1),
        "val/ratio": ratio,
        "objective/kl": logps - batch.reference_logps,
    }
    assert loss.metrics.keys() == terms.keys()
    for name, value in terms.items():
        np.testing.assert_allclose(mean(loss.metrics[name]), (w * value).sum() / w.sum(), rtol=1e-5, err_msg=name)
    expected = clipped - 0.1 * terms["policy/entropy_avg"] + 0.2 * terms["objective/kl"]
    np.testing.assert_allclose(loss.total, (w * expected).sum(), rtol=1e-5)


def test_entropy_bonus_reaches_the_gradient(lookup, tools):
    apply, params = lookup
    batch = tools.make_rollout(np.random.default_rng(0))

    def total(params, coefficient):
        return PPOPolicy(entropy_coef=coefficient)(apply, params, batch, None).total

    def bonus(params):
        logits = params["logits"][batch.tokens.ids]
        entropy = score(logits, batch.tokens.targets, entropy=True).entropy
        return -0.5 * (batch.tokens.weights * entropy).sum()

    params = jax.tree.map(jnp.asarray, params)
    with_bonus, without = (jax.grad(total)(params, c)["logits"] for c in (0.5, 0.0))
    np.testing.assert_allclose(with_bonus - without, jax.grad(bonus)(params)["logits"], atol=1e-4)


def test_rollout_fields_have_no_gradient(lookup, tools):
    apply, params = lookup
    batch = tools.make_rollout(np.random.default_rng(0))
    objective = PPOShared(policy=PPOPolicy(kl_coef=0.1, kl_estimator="k3", kl_gradient="k3"))
    fields = {f.name: jnp.asarray(getattr(batch, f.name)) for f in dataclasses.fields(batch)[1:]}

    def total(fields):
        return objective(apply, params, dataclasses.replace(batch, **fields), None).total

    assert all(not np.any(leaf) for leaf in jax.tree.leaves(jax.grad(total)(fields)))


def test_shared_is_the_sum_of_both(lookup, tools):
    apply, params = lookup
    batch = tools.make_rollout(np.random.default_rng(0))
    policy, critic = PPOPolicy(entropy_coef=0.1), PPOCritic(clip=0.1)
    shared = PPOShared(policy=policy, critic=critic, vf_coef=0.3)(apply, params, batch, None)
    one, other = policy(apply, params, batch, None), critic(apply, params, batch, None)
    np.testing.assert_allclose(shared.total, one.total + 0.3 * other.total, rtol=1e-6)
    assert shared.weight == one.weight == other.weight
    assert shared.metrics.keys() == one.metrics.keys() | other.metrics.keys()


def test_a_drifted_policy_stays_finite(lookup, tools):
    """A token the old policy all but excluded: ratio and k3 would overflow float32."""
    apply, params = lookup
    batch = tools.make_rollout(np.random.default_rng(0))
    batch = dataclasses.replace(batch, old_logps=batch.old_logps - 500, reference_logps=batch.old_logps + 500)

    def total(params):
        return PPOPolicy(kl_coef=0.1, kl_gradient="k3")(apply, params, batch, None).total

    value, grads = jax.value_and_grad(total)(params)
    assert np.isfinite(value) and all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: PPOPolicy(clip_low=1.0),
            "PPOPolicy.clip_low is 1.0; give it a number of at least 0 and below 1",
        ),
        (lambda: PPOPolicy(clip_high=-0.1), "PPOPolicy.clip_high is -0.1"),
        (lambda: PPOPolicy(dual_clip=1.0), "PPOPolicy.dual_clip is 1.0; give it a number above 1"),
        (lambda: PPOPolicy(temperature=0.0), "PPOPolicy.temperature is 0.0; give it a number above 0"),
        (
            lambda: PPOPolicy(kl_estimator="k4"),
            "PPOPolicy.kl_estimator is 'k4'; choose one of 'k1', 'k2', 'k3'",
        ),
        (lambda: PPOPolicy(kl_coef=0.1, kl_gradient="k1", kl_importance=False), "expected gradient is zero"),
        (lambda: PPOCritic(clip=0.0), "PPOCritic.clip is 0.0; give it a number above 0"),
        (lambda: PPOShared(vf_coef=-1.0), "PPOShared.vf_coef is -1.0"),
    ],
)
def test_fields_are_checked(build, message):
    with pytest.raises(ValueError, match=message):
        build()
