"""T12: PPO with a separate critic learns to repeat the prompt's first token."""

from __future__ import annotations

import numpy as np
import pytest


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ppo_learns_to_copy(copy_run, seed):
    run = copy_run(
        seed=seed,
        lr=2e-3,
        size=(2, 32),
        prompts_per_iteration=256,
        minibatch_size=128,
        max_new_tokens=8,
        epochs=2,
        kl_coef=0.0,
        iterations=100,
    )
    rewards = [run.iterate()["rewards/copied_share/mean"] for _ in range(100)]
    assert rewards[0] < 0.1
    assert np.mean(rewards[-5:]) >= 0.95
