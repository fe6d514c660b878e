"""The smallest task PPO can learn: repeat the prompt's first token."""

from __future__ import annotations

import functools

import jax
import numpy as np
import optax
import pytest

from jaxtrain.models import DecoderConfig, build_model
from jaxtrain.objectives.ppo import PPOCritic, PPOPolicy, PPOShared
from jaxtrain.rl.config import PPOConfig
from jaxtrain.rl.loop import PPOLoop, new_loop_state
from jaxtrain.rl.rollout import PromptBatch
from jaxtrain.train.state import abstract_state, init_state, new_state
from jaxtrain.train.step import make_train_step

VOCABULARY = 16


def copy_prompts(count: int, width: int = 4, seed: int = 0):
    """Prompts of 2 to ``width`` tokens, a pure function of the iteration."""

    def prompts(iteration: int) -> PromptBatch:
        rng = np.random.default_rng([seed, iteration])
        lengths = rng.integers(2, width + 1, count).astype(np.int32)
        ids = rng.integers(1, VOCABULARY, (count, width)).astype(np.int32)
        return PromptBatch(ids=np.where(np.arange(width) < width - lengths[:, None], 0, ids), lengths=lengths)

    return prompts


def copied_share(prompts, completions, completion_ids, rows):
    """The share of sampled tokens that equal the prompt's first."""
    return [
        sum(i == row["prompt_ids"][0] for i in ids) / len(ids) for ids, row in zip(completion_ids, rows, strict=True)
    ]


@functools.cache
def model_and_step(heads, objective, lr, mesh, size):
    """Shared by the runs of a session: what is compiled for one serves all."""
    layers, width = size
    config = DecoderConfig(
        vocab_size=VOCABULARY, num_layers=layers, d_model=width, num_heads=2, num_kv_heads=1, d_ff=2 * width,
        max_positions=16, init_std=0.1, heads=heads,
    )  # fmt: skip
    model, tx = build_model(config), optax.adam(lr, eps=1e-5)
    shardings = None
    if mesh is not None:
        shardings = jax.tree.map(lambda x: x.sharding, abstract_state(model, tx, mesh))
    return model, tx, make_train_step(model.apply, objective, tx, mesh=mesh, shardings=shardings)


class CopyRun:
    """A PPO run on the copy task, with its states."""

    def __init__(self, config, *, seed, lr, rewards, stop_ids, mesh, size):
        shared = config.critic == "shared"
        objective = config.objective(PPOShared() if shared else PPOPolicy())
        heads = ("lm", "value") if shared else ("lm",)
        model, tx, policy_step = model_and_step(heads, objective, lr, mesh, size)
        critic, critic_step = None, None
        if not shared:
            critic, _, critic_step = model_and_step(("value",), PPOCritic(), lr, mesh, size)

        def fresh(model, seed):
            if mesh is None:
                return new_state(model.init(jax.random.key(seed)), tx, seed)
            return init_state(model, tx, mesh, seed)

        self.policy = fresh(model, seed)
        self.critic = None if shared else fresh(critic, seed + 1)
        self.state = new_loop_state(config)
        self.loop = PPOLoop(
            config,
            policy=model,
            critic=critic,
            reference_params=jax.tree.map(lambda x: x.copy(), self.policy.params),
            prompts=copy_prompts(config.prompts_per_iteration, seed=seed),
            decode=lambda ids: " ".join(map(str, ids)),
            stop_ids=stop_ids,
            rewards=rewards,
            weights=[1.0] * len(rewards),
            policy_step=policy_step,
            critic_step=critic_step,
            seed=seed,
            mesh=mesh,
        )

    def iterate(self):
        self.policy, self.critic, self.state, metrics = self.loop.iterate(self.policy, self.critic, self.state)
        return metrics


@pytest.fixture
def copy_run():
    def run(*, seed=0, lr=3e-3, rewards=(copied_share,), stop_ids=(), mesh=None, size=(1, 16), **settings):
        settings = {
            "iterations": 4,
            "prompts_per_iteration": 8,
            "max_new_tokens": 5,
            "minibatch_size": 4,
            "epochs": 2,
        } | settings
        config = PPOConfig(**settings)
        return CopyRun(config, seed=seed, lr=lr, rewards=rewards, stop_ids=stop_ids, mesh=mesh, size=size)

    return run
