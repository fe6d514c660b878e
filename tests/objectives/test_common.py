"""Log-probabilities, masks and KL estimators, in float64 where a number is known exactly."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxtrain.objectives import common

LOGPS = np.log([0.7, 0.2, 0.1])
REFERENCE = np.log([0.5, 0.3, 0.2])


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_token_logps(temperature):
    with jax.enable_x64(True):
        logits = np.random.default_rng(0).normal(size=(2, 3, 5)) * 4
        targets = np.array([[0, 1, 4], [3, 3, 2]])
        p = np.exp(logits / temperature)
        expected = np.log(np.take_along_axis(p, targets[..., None], -1)[..., 0] / p.sum(-1))
        found = common.token_logps(jnp.asarray(logits), jnp.asarray(targets), temperature)
        assert found.dtype == jnp.float64
        np.testing.assert_allclose(found, expected, rtol=1e-12)
        check_grads(lambda x: common.token_logps(x, targets, temperature), (logits,), 1, ["rev"], rtol=1e-4)


def test_token_logps_of_bfloat16_are_computed_in_float32():
    logits = jnp.array([[4.0, 1.0, 0.5, -2.0]], jnp.bfloat16)  # each exact in bfloat16
    found = common.token_logps(logits, jnp.array([1]))
    exact = 1.0 - np.log(np.exp(np.array([4.0, 1.0, 0.5, -2.0])).sum())
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, [exact], rtol=1e-6)


def test_token_logps_of_large_logits_are_finite():
    found = common.token_logps(jnp.array([[1e4, -1e4, 0.0]]), jnp.array([1]))
    np.testing.assert_allclose(found, [-2e4])


def entropy(logits, temperature=1.0):
    zeros = jnp.zeros(logits.shape[:-1], jnp.int32)
    return common.score(logits, zeros, temperature=temperature, entropy=True).entropy


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_entropy(temperature):
    with jax.enable_x64(True):
        p = np.exp(LOGPS / temperature)
        p /= p.sum()
        found = entropy(jnp.asarray(LOGPS), temperature)
        np.testing.assert_allclose(found, -(p * np.log(p)).sum(), rtol=1e-12)
        check_grads(lambda x: entropy(x, temperature), (LOGPS,), 1, ["rev"], rtol=1e-4)


def test_entropy_of_an_impossible_token_is_finite():
    value, grad = jax.value_and_grad(entropy)(jnp.array([0.0, 0.0, -jnp.inf]))
    np.testing.assert_allclose(value, np.log(2), rtol=1e-6)
    np.testing.assert_allclose(grad, [0, 0, 0], atol=1e-7)


def test_weighted_total_ignores_what_has_no_weight():
    def f(values):
        return common.weighted_total(values, jnp.array([0.5, 0.0, 2.0]))

    value, grad = jax.value_and_grad(f)(jnp.array([2.0, jnp.nan, 3.0]))
    assert value == 7.0
    np.testing.assert_array_equal(grad, [0.5, 0.0, 2.0])


def test_weighted_sum_of_nothing():
    assert common.weighted_sum(jnp.array([jnp.inf]), jnp.array([0.0])) == (0.0, 0.0)


def test_last_valid_reads_either_padding_and_empty_rows():
    values = jnp.arange(1.0, 13.0).reshape(3, 4)
    segments = jnp.array([[1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 0, 0]])
    np.testing.assert_array_equal(common.last_valid(values, segments), [2.0, 8.0, 0.0])


def test_sequence_logps():
    logps = jnp.array([[-1.0, -2.0, jnp.nan], [-4.0, -5.0, -6.0]])
    sums, counts = common.sequence_logps(logps, jnp.array([[0.0, 1.0, 0.0], [1.0, 1.0, 1.0]]))
    np.testing.assert_array_equal(sums, [-2.0, -15.0])
    np.testing.assert_array_equal(counts, [1.0, 3.0])


def test_interleave_and_back(tools):
    pairs = tools.make_pairs(np.random.default_rng(0))
    both = common.interleave(pairs.chosen, pairs.rejected)
    assert both.ids.shape == (16, 19)
    np.testing.assert_array_equal(both.ids[0::2], pairs.chosen.ids)
    np.testing.assert_array_equal(both.ids[1::2, :12], pairs.rejected.ids)
    assert not both.segments[1::2, 12:].any() and not both.weights[1::2, 12:].any()
    first, second = common.deinterleave(both.ids[:, 0])
    np.testing.assert_array_equal(first, pairs.chosen.ids[:, 0])
    np.testing.assert_array_equal(second, pairs.rejected.ids[:, 0])


@pytest.mark.parametrize(("estimator", "golden"), [("k1", 0.5), ("k2", 0.125), ("k3", 0.106530660)])
def test_kl_golden(estimator, golden):
    with jax.enable_x64(True):
        found = common.kl_estimate(jnp.float64(-1.0), jnp.float64(-1.5), estimator)
        np.testing.assert_allclose(found, golden, atol=1e-6, rtol=0)
        check_grads(lambda x: common.kl_estimate(x, -1.5, estimator), (-1.0,), 1, ["rev"], rtol=1e-4)


def test_unknown_kl_estimator():
    with pytest.raises(ValueError, match="'k4'; choose one of k1, k2, k3"):
        common.kl_estimate(0.0, 0.0, "k4")


def test_k3_is_bounded_with_a_gradient_of_the_right_sign():
    def k3(d):
        return common.kl_estimate(d, 0.0, "k3")

    for d in (-11.0, -200.0, -1e4):
        value, slope = jax.value_and_grad(k3)(d)
        assert np.isfinite(value) and value > 0
        np.testing.assert_allclose(slope, 1 - np.exp(10.0), rtol=1e-6)  # e^{-d} stops steepening at -d = 10
    np.testing.assert_allclose(k3(-9.9), np.exp(9.9) - 1 - 9.9, rtol=1e-6)


def expected_kl_gradient(sampler, *, value="k1", gradient, importance):
    """E over the sampler's tokens of ∇ kl_loss at the logits LOGPS, exactly."""
    actions = jnp.arange(3)

    def expected(logits):
        logps = common.token_logps(jnp.broadcast_to(logits, (3, 3)), actions)
        ratio = jnp.exp(logps - sampler)
        terms = common.kl_loss(logps, REFERENCE, ratio, value=value, gradient=gradient, importance=importance)
        return jnp.sum(jnp.exp(sampler) * terms)

    return jax.value_and_grad(expected)(jnp.asarray(LOGPS))


def test_kl_gradients_in_expectation():
    """T13: which KL each estimator's gradient descends, on-policy and after the policy has moved."""
    with jax.enable_x64(True):
        p, q = np.exp(LOGPS), np.exp(REFERENCE)
        kl = (p * (LOGPS - REFERENCE)).sum()
        reverse = p * (LOGPS - REFERENCE - kl)  # ∇ KL(π ‖ π_ref) by the logits
        forward = p - q  # ∇ KL(π_ref ‖ π)
        moved = np.log([0.4, 0.4, 0.2])
        expectations = [
            (LOGPS, "k1", False, 0 * p),
            (LOGPS, "k2", False, reverse),
            (LOGPS, "k3", False, forward),
            (LOGPS, "k1", True, reverse),
            (LOGPS, "k2", True, reverse),
            (LOGPS, "k3", True, reverse),
            (moved, "k1", True, reverse),
            (moved, "k2", True, reverse),
            (moved, "k3", True, reverse),
        ]
        for sampler, gradient, importance, expected in expectations:
            value, found = expected_kl_gradient(sampler, gradient=gradient, importance=importance)
            np.testing.assert_allclose(found, expected, atol=1e-12)
            np.testing.assert_allclose(value, (np.exp(sampler) * (LOGPS - REFERENCE)).sum(), atol=1e-12)


def test_kl_value_is_chosen_apart_from_its_gradient():
    with jax.enable_x64(True):
        value, _ = expected_kl_gradient(LOGPS, value="k3", gradient="k2", importance=False)
        np.testing.assert_allclose(value, (np.exp(LOGPS) * (LOGPS - REFERENCE)).sum(), atol=1e-12)
        value, _ = expected_kl_gradient(LOGPS, value="k2", gradient="k3", importance=False)
        np.testing.assert_allclose(value, (np.exp(LOGPS) * (LOGPS - REFERENCE) ** 2 / 2).sum(), atol=1e-12)
