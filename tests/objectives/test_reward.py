from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxtrain.objectives import RewardModel
from jaxtrain.objectives.reward import bradley_terry, ranks_right
from jaxtrain.types import Outputs, Pairs, Tokens


def table_apply(params, tokens, *, cache=None, rng=None):
    """The reward of a position is its token's; only the last valid one should be read."""
    return Outputs(hidden=None, rewards=params[tokens.ids])


def side(last_ids) -> Tokens:
    """Rows of two tokens and a padding one: token 0, which is worth 100, then the one given, then 0 again."""
    n = len(last_ids)
    ids = np.stack([np.zeros(n, np.int32), np.asarray(last_ids, np.int32), np.zeros(n, np.int32)], 1)
    segments = np.tile(np.array([1, 1, 0], np.int32), (n, 1))
    return Tokens(ids=ids, targets=ids, weights=segments.astype(np.float32), positions=ids, segments=segments)


def pairs(chosen, rejected, *, weight, margin=0.0) -> Pairs:
    n = len(chosen)
    zeros = np.zeros(n)
    return Pairs(
        chosen=side(chosen),
        rejected=side(rejected),
        reference_chosen=zeros,
        reference_rejected=zeros,
        margin=np.full(n, margin),
        weight=np.asarray(weight, float),
    )


SCORES = np.array([100.0, 2.0, 1.0, 0.5])


@pytest.mark.parametrize(
    ("objective", "golden"),
    [
        (RewardModel(), 0.313261688),
        (RewardModel(use_margin=True), 0.474076984),
        (RewardModel(centering=0.01), 0.313261688 + 0.09),
    ],
)
def test_golden(objective, golden):
    with jax.enable_x64(True):
        batch = pairs([1], [2], weight=[1], margin=0.5)
        loss = objective(table_apply, jnp.asarray(SCORES), batch, None)
        np.testing.assert_allclose(loss.total / loss.weight, golden, atol=1e-6, rtol=0)


def test_three_ranked_completions_golden():
    """K = 3 as three pairs of weight 1/3; a second prompt with one pair weighs as much as all three."""
    with jax.enable_x64(True):
        third = 1 / 3
        loss = RewardModel()(table_apply, jnp.asarray(SCORES), pairs([1, 1, 2], [2, 3, 3], weight=[third] * 3), None)
        np.testing.assert_allclose(loss.total / loss.weight, 0.329584, atol=1e-6, rtol=0)
        two = RewardModel()(
            table_apply,
            jnp.asarray(SCORES),
            pairs([1, 1, 2, 1], [2, 3, 3, 2], weight=[third] * 3 + [1]),
            None,
        )
        expected = (0.329584 + 0.313261688) / 2
        np.testing.assert_allclose(two.total / two.weight, expected, atol=1e-6, rtol=0)


def test_metrics():
    batch = pairs([1, 3, 2, 1], [2, 1, 2, 3], weight=[1, 1, 1, 0])
    metrics = RewardModel()(table_apply, jnp.asarray(SCORES), batch, None).metrics
    means = {name: float(metric.total / metric.weight) for name, metric in metrics.items()}
    # Rewards 2 > 1, .5 < 2 and 1 = 1; the fourth pair has no weight.
    np.testing.assert_allclose(means["accuracy"], 0.5)
    np.testing.assert_allclose(means["margin"], (1 - 1.5 + 0) / 3, rtol=1e-6)
    np.testing.assert_allclose(means["mean_reward"], (3 + 2.5 + 2) / 6, rtol=1e-6)
    np.testing.assert_allclose(means["reward/chosen"], (2 + 0.5 + 1) / 3, rtol=1e-6)
    np.testing.assert_allclose(means["reward/rejected"], (1 + 2 + 1) / 3, rtol=1e-6)


def test_ties_count_half():
    np.testing.assert_array_equal(ranks_right(jnp.array([2.0, 1, 1]), jnp.array([1.0, 2, 1])), [1, 0, 0.5])


def test_extreme_rewards_stay_finite():
    value, grad = jax.value_and_grad(bradley_terry)(-1e4, 1e4)
    assert value == 2e4 and grad == -1
    assert bradley_terry(1e4, -1e4) == 0


def test_gradient_matches_differences():
    with jax.enable_x64(True):
        batch = pairs([1, 1, 2], [2, 3, 3], weight=[1 / 3] * 3, margin=0.5)
        objective = RewardModel(centering=0.01, use_margin=True)

        def total(scores):
            return objective(table_apply, scores, batch, None).total

        check_grads(total, (jnp.asarray(SCORES),), 1, ["rev"], rtol=1e-4)
        grads = jax.grad(total)(jnp.asarray(SCORES))
        assert grads[0] == 0 and all(grads[1:] != 0)


def test_fields_are_checked():
    with pytest.raises(ValueError, match=r"RewardModel\.centering is -0\.1"):
        RewardModel(centering=-0.1)
