from __future__ import annotations

import pytest

from jaxtrain.objectives.ppo import PPOPolicy, PPOShared
from jaxtrain.rl.config import PPOConfig


def config(**settings):
    return PPOConfig(
        **{"iterations": 3, "prompts_per_iteration": 10, "max_new_tokens": 4, "minibatch_size": 4} | settings
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"minibatch_size": 11}, "minibatch_size=11 exceeds prompts_per_iteration=10"),
        ({"kl_estimator": "k4"}, "kl_estimator"),
        ({"kl_placement": "both"}, "kl_placement"),
        ({"kl_placement": "loss", "kl_target": 1.0}, "kl_target steers the KL in the reward"),
        ({"missing_eos_penalty": 1.0, "missing_eos_score": -1.0}, "leave one at None"),
        ({"truncation": "drop"}, "truncation"),
        ({"critic": "none"}, "critic"),
        ({"gamma": 1.5}, "gamma"),
        ({"epochs": 0}, "epochs"),
        ({"sampler_slots": -1}, "sampler_slots"),
        ({"gate_threshold": 0.0}, "gate_threshold"),
        ({"target_kl_stop": -1.0}, "target_kl_stop"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        config(**settings)


def test_updates_counts_the_unfilled_minibatch():
    assert config(epochs=2).updates == 3 * 2 * 3


def test_the_objective_gets_the_loops_temperature_and_kl():
    assert config(temperature=0.7).objective(PPOPolicy(clip_low=0.1)) == PPOPolicy(clip_low=0.1, temperature=0.7)
    in_loss = config(kl_placement="loss", kl_coef=0.3)
    assert in_loss.objective(PPOPolicy()).kl_coef == 0.3
    shared = config(critic="shared", temperature=0.7).objective(PPOShared(vf_coef=0.5))
    assert shared == PPOShared(vf_coef=0.5, policy=PPOPolicy(temperature=0.7))


@pytest.mark.parametrize(
    ("settings", "objective", "message"),
    [
        ({"temperature": 0.7}, PPOPolicy(temperature=0.5), "set only the latter"),
        ({}, PPOPolicy(kl_coef=0.1), "kl_placement='reward'"),
        ({}, PPOShared(), "needs the objective PPOPolicy"),
        ({"critic": "shared"}, PPOPolicy(), "needs the objective PPOShared"),
    ],
)
def test_an_objective_that_contradicts_the_loop_is_refused(settings, objective, message):
    with pytest.raises(ValueError, match=message):
        config(**settings).objective(objective)
