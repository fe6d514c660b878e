from __future__ import annotations

import math

import jax
import numpy as np
import pytest

from jaxtrain.models import DecoderConfig, build_model
from jaxtrain.rl.rewards import FormatReward, LengthReward, ModelReward, reward_names, score_completions
from jaxtrain.types import Tokens


def scored(*rewards, weights=None, completions=("a", "b"), ids=((1,), (2,))):
    rows = [{} for _ in completions]
    return score_completions(rewards, weights or [1.0] * len(rewards), ["p"] * len(rows), completions, ids, rows)


def constant(*scores):
    def reward(prompts, completions, completion_ids, rows):
        return list(scores)

    return reward


def test_overlong_penalty_by_hand():
    reward = LengthReward(maximum=80, ramp=20)  # DAPO's, limit 100 and cache 20
    scores = reward([], [], [[0] * n for n in (1, 80, 90, 100, 101)], [])
    np.testing.assert_allclose(scores, [0, 0, -0.5, -1, -1])


def test_too_short_is_penalised_too():
    assert LengthReward(minimum=4, maximum=6, ramp=2)([], [], [[0] * n for n in (1, 3, 4, 6, 7)], []) == [
        -1, -0.5, 0, 0, -0.5,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("completion", "stopped", "missed"),
    [
        ("Return the sum of two numbers.", True, set()),
        ("Return the sum of two numbers.", False, {"stopped"}),
        ("Return the sum\nof two numbers.", True, {"one_line"}),
        ("return the sum of two numbers.", True, {"capital"}),
        ("Return the sum of two numbers", True, {"full_stop"}),
        ("Return it.", True, {"words"}),
        ("Return " + "a b " * 10 + "c.", True, {"words"}),
        ("Return the The sum.", True, {"no_repetition"}),
        ("return return", False, {"stopped", "capital", "full_stop", "words", "no_repetition"}),
        ("  ", True, {"one_line", "capital", "full_stop", "words", "no_repetition"}),
    ],
)
def test_format_criteria(completion, stopped, missed):
    reward = FormatReward(min_words=3, max_words=20)
    assert {name for name, met in reward.criteria(completion, stopped).items() if not met} == missed
    (score,) = reward([""], [completion], [[1]], [{"stopped": stopped}])
    assert score == pytest.approx(1 - len(missed) / 6)


def test_scores_stay_fractions_and_are_weighted():
    total, applicable, metrics = scored(constant(0.7, 0.1), constant(1, -1), weights=[1.0, 0.25])
    assert total.dtype == np.float32 and applicable.all()
    np.testing.assert_allclose(total, [0.95, -0.15], atol=1e-7)
    assert metrics == pytest.approx(
        {
            "rewards/reward/mean": 0.4,
            "rewards/reward/std": 0.3,
            "rewards/reward_2/mean": 0,
            "rewards/reward_2/std": 1,
        }
    )


def test_none_is_left_out():
    total, applicable, metrics = scored(constant(None, 0.5), constant(None, None))
    assert total.tolist() == [0.0, 0.5] and applicable.tolist() == [False, True]
    assert metrics == {"rewards/reward/mean": 0.5, "rewards/reward/std": 0.0}


def test_names_are_distinct():
    assert reward_names([FormatReward(), LengthReward(maximum=3), FormatReward(), constant()]) == [
        "FormatReward", "LengthReward", "FormatReward_2", "reward",
    ]  # fmt: skip


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, "high", np.float32("nan")])
def test_a_bad_score_names_reward_row_and_completion(bad):
    with pytest.raises(ValueError, match=r"reward reward returned .* for row 1.*None where.*'the culprit'"):
        scored(constant(0.5, bad), completions=("fine", "the culprit"))


def test_a_wrong_number_of_scores_is_named():
    with pytest.raises(ValueError, match="reward reward returned 1 scores for 2 completions"):
        scored(constant(0.5))
    with pytest.raises(ValueError, match="one weight for each reward"):
        scored(constant(0.5, 0.5), weights=[1.0, 2.0])


@pytest.fixture(scope="module")
def reward_model():
    config = DecoderConfig(
        vocab_size=20, num_layers=1, d_model=16, num_heads=2, num_kv_heads=1, d_ff=16, max_positions=16,
        init_std=0.3, heads=("reward",),
    )  # fmt: skip
    model = build_model(config)
    return ModelReward(model=model, params=model.init(jax.random.key(0)), length=12, batch_size=4)


PROMPTS = [[3, 4], [5], [6, 7, 8], [9, 1, 2], [2, 2]]
COMPLETIONS = [[5, 6], [7, 0, 0], [1], [4, 4, 4, 4], [11, 0]]


def test_model_reward_reads_the_last_sampled_token(reward_model):
    """Id 0 is an ordinary sampled id: padding comes from lengths, not from ids."""
    raw = reward_model.raw(PROMPTS, COMPLETIONS)
    assert raw.dtype == np.float32
    for prompt, completion, found in zip(PROMPTS, COMPLETIONS, raw, strict=True):
        ids = np.array([prompt + completion], np.int32)
        tokens = Tokens(
            ids=ids,
            targets=ids,
            weights=np.zeros(ids.shape, np.float32),
            positions=np.arange(ids.shape[1], dtype=np.int32)[None],
            segments=np.ones_like(ids),
        )
        alone = reward_model.model.apply(reward_model.params, tokens).rewards[0, -1]
        np.testing.assert_allclose(found, alone, atol=1e-5)
    rows = [{"prompt_ids": prompt, "stopped": True} for prompt in PROMPTS]
    np.testing.assert_allclose(reward_model([], [], COMPLETIONS, rows), raw, atol=1e-6)


def test_model_reward_is_normalised(reward_model):
    reward = reward_model.normalised(PROMPTS, COMPLETIONS)
    rows = [{"prompt_ids": prompt, "stopped": True} for prompt in PROMPTS]
    scores = np.array(reward([], [], COMPLETIONS, rows))
    assert abs(scores.mean()) < 1e-5 and abs(scores.std() - 1) < 1e-5
    raw = reward_model.raw(PROMPTS, COMPLETIONS)
    assert (np.argsort(scores) == np.argsort(raw)).all(), "the order of the completions must stay"
    with pytest.raises(ValueError, match="scores that differ"):
        reward_model.normalised(PROMPTS[:1] * 3, COMPLETIONS[:1] * 3)


def test_model_reward_names_mistakes(reward_model):
    with pytest.raises(ValueError, match="row 1 has 13 tokens"):
        reward_model.raw([[1], [1] * 12], [[2], [3]])
    with pytest.raises(ValueError, match="max_positions=16"):
        ModelReward(model=reward_model.model, params={}, length=17, batch_size=1)
    language = build_model(
        DecoderConfig(vocab_size=8, num_layers=1, d_model=8, num_heads=1, num_kv_heads=1, d_ff=8, max_positions=8)
    )
    with pytest.raises(ValueError, match="no 'reward'"):
        ModelReward(model=language, params={}, length=8, batch_size=1)
