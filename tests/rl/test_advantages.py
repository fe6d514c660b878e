from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxtrain.rl.advantages import end_scores, gae, token_rewards, updated_kl_coef, whiten


def reference_gae(rewards, values, mask, gamma, lam, bootstrap):
    """One row at a time: take the masked-in tokens out, then sum the series of δ."""
    advantages = np.zeros_like(values)
    for b in range(len(values)):
        kept = np.flatnonzero(mask[b])
        v = np.append(values[b, kept], bootstrap[b])
        delta = rewards[b, kept] + gamma * v[1:] - v[:-1]
        for i, t in enumerate(kept):
            advantages[b, t] = sum((gamma * lam) ** k * d for k, d in enumerate(delta[i:]))
    return advantages


def test_gae_golden():
    with jax.enable_x64(True):
        advantages, returns = gae(jnp.array([[0.0, 0, 1]]), jnp.full((1, 3), 0.5), jnp.ones((1, 3)))
        np.testing.assert_allclose(advantages, [[0.45125, 0.475, 0.5]], atol=1e-12)
        np.testing.assert_allclose(returns, [[0.95125, 0.975, 1.0]], atol=1e-12)


@pytest.mark.parametrize("places", [[3, 4], [0], [1], [0, 2, 2, 3]])
def test_gae_masked_positions_change_nothing(places):
    """Values of 100 and rewards of 7 inserted before, between and after, under gamma < 1 too."""
    with jax.enable_x64(True):
        rewards, values, mask = (np.array([x]) for x in ([0.0, 0, 1], [0.5, 0.4, 0.3], [1, 1, 1]))
        expected = gae(rewards, values, mask, gamma=0.9)
        places = np.minimum(places, 3)
        padded = [np.insert(x, places, fill, axis=1) for x, fill in ((rewards, 7), (values, 100), (mask, 0))]
        found = gae(*padded, gamma=0.9)
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(np.asarray(one)[:, padded[2][0] == 1], other, atol=1e-12)
            assert not np.any(np.asarray(one)[:, padded[2][0] == 0])


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (0.99, 1.0), (1.0, 0.0)])
def test_gae_matches_the_series(gamma, lam):
    rng = np.random.default_rng(0)
    rewards, values = rng.normal(size=(2, 6, 12))
    mask = rng.random((6, 12)) < 0.6
    mask[0], mask[1] = True, False
    bootstrap = rng.normal(size=6) * np.array([1, 1, 0, 1, 0, 1])
    with jax.enable_x64(True):
        advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam, bootstrap=jnp.asarray(bootstrap))
        expected = reference_gae(rewards, values, mask, gamma, lam, bootstrap)
        np.testing.assert_allclose(advantages, expected, atol=1e-12)
        np.testing.assert_allclose(returns, np.where(mask, expected + values, 0), atol=1e-12)


def test_gae_gradient_matches_differences():
    rng = np.random.default_rng(0)
    rewards, values = rng.normal(size=(2, 2, 4))
    mask = np.array([[1, 0, 1, 1], [1, 1, 0, 0]])
    with jax.enable_x64(True):
        check_grads(lambda r, v: gae(r, v, mask), (rewards, values), 1, ["rev"], rtol=1e-4)


def test_truncated_rollouts_may_bootstrap():
    rewards, values, mask = jnp.zeros((2, 2)), jnp.zeros((2, 2)), jnp.ones((2, 2))
    ended, cut = gae(rewards, values, mask, bootstrap=jnp.array([0.0, 2.0]))[1]
    np.testing.assert_allclose(ended, [0, 0])
    np.testing.assert_allclose(cut, [0.95 * 2, 2], rtol=1e-6)


def test_whiten():
    rng = np.random.default_rng(0)
    values, mask = rng.normal(3, 2, size=(4, 9)), rng.random((4, 9)) < 0.7
    values[~mask] = np.nan
    kept = values[mask]
    with jax.enable_x64(True):
        found = np.asarray(whiten(values, mask))
        np.testing.assert_allclose(found[mask], (kept - kept.mean()) / np.sqrt(kept.var(ddof=1) + 1e-8), rtol=1e-12)
        assert not found[~mask].any()
        unshifted = np.asarray(whiten(values, mask, shift_mean=False))
        np.testing.assert_allclose(unshifted[mask], found[mask] + kept.mean(), rtol=1e-12)
        assert not unshifted[~mask].any()


def test_whitening_one_token_or_none():
    np.testing.assert_array_equal(whiten(jnp.array([[5.0, 9.0]]), jnp.array([[1, 0]])), [[0, 0]])
    np.testing.assert_array_equal(whiten(jnp.array([[5.0, 9.0]]), jnp.array([[0, 0]])), [[0, 0]])


def test_whitening_is_global_across_devices():
    """T6 for the statistics: one rollout batch over eight devices."""
    rng = np.random.default_rng(0)
    values, mask = rng.normal(size=(8, 5)).astype(np.float32), rng.random((8, 5)) < 0.6
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    sharded = jax.jit(whiten)(jax.device_put(values, rows), jax.device_put(mask, rows))
    np.testing.assert_allclose(sharded, whiten(values, mask), atol=1e-6)


MASK = np.array([[0, 1, 1, 1, 0], [0, 0, 1, 0, 1], [0, 0, 0, 0, 0]])


@pytest.mark.parametrize(
    ("one_past_end", "ends"),
    [(False, [3, 4]), (True, [4, 4])],  # the second row has no room for one more
)
def test_score_placement(one_past_end, ends):
    zeros = jnp.zeros(MASK.shape)
    rewards, mask = token_rewards(
        jnp.array([0.7, -2.0, 5.0]), zeros, zeros, MASK, kl_coef=0.1, one_past_end=one_past_end
    )
    expected = np.zeros(MASK.shape, np.float32)
    expected[0, ends[0]], expected[1, ends[1]] = 0.7, -2.0
    np.testing.assert_array_equal(rewards, expected)  # exactly: a score of .7 arrives as .7
    np.testing.assert_array_equal(mask, (MASK != 0) | (expected != 0))


@pytest.mark.parametrize(("estimator", "penalty"), [("k1", 0.5), ("k2", 0.125), ("k3", 0.106530660)])
def test_kl_penalty_in_the_reward(estimator, penalty):
    with jax.enable_x64(True):
        logps = np.where(MASK, -1.0, np.nan)
        rewards, _ = token_rewards(
            jnp.array([1, 2, 3]),
            logps,
            np.where(MASK, -1.5, np.inf),
            MASK,
            kl_coef=0.2,
            kl_estimator=estimator,
        )
        expected = -0.2 * penalty * MASK
        expected[0, 3] += 1
        expected[1, 4] += 2
        np.testing.assert_allclose(rewards, expected, atol=1e-9)


def test_integer_scores_do_not_truncate_the_penalty():
    rewards, _ = token_rewards(jnp.array([1]), jnp.array([[-1.0]]), jnp.array([[-1.7]]), jnp.array([[1]]), kl_coef=1.0)
    np.testing.assert_allclose(rewards, [[0.3]], rtol=1e-6)


def test_unfinished_completions():
    scores, stopped = jnp.array([0.7, 0.7]), jnp.array([True, False])
    np.testing.assert_allclose(end_scores(scores, stopped), [0.7, 0.7])
    np.testing.assert_allclose(end_scores(scores, stopped, missing_eos_penalty=1.0), [0.7, -0.3], rtol=1e-6)
    np.testing.assert_allclose(end_scores(scores, stopped, missing_eos_score=-1.0), [0.7, -1.0])
    with pytest.raises(ValueError, match="both missing_eos_penalty=1 and missing_eos_score=0"):
        end_scores(scores, stopped, missing_eos_penalty=1, missing_eos_score=0)


@pytest.mark.parametrize(("kl", "factor"), [(6.0, 1.0), (6.6, 1.01), (60.0, 1.02), (0.0, 0.98)])
def test_adaptive_kl(kl, factor):
    found = updated_kl_coef(0.1, kl, target=6.0, samples=1000, horizon=10000)
    np.testing.assert_allclose(found, 0.1 * factor, rtol=1e-6)


def test_adaptive_kl_needs_a_target():
    with pytest.raises(ValueError, match="positive target and horizon; got 0 and 10"):
        updated_kl_coef(0.1, 1.0, target=0, samples=1, horizon=10)
