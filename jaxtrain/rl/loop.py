"""One iteration of PPO: sample, score, estimate advantages, update.  B rollouts, T positions.

An iteration is a pure function of the states and of ``(seed, iteration)``, so a resumed run
repeats it bit for bit.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxtrain.distributed import beat, fetch
from jaxtrain.generate.sampling import Sampling
from jaxtrain.rl.advantages import updated_kl_coef
from jaxtrain.rl.config import PPOConfig
from jaxtrain.rl.rewards import ModelReward, Reward, score_completions
from jaxtrain.rl.rollout import (
    Generated,
    PromptBatch,
    check_gate,
    chunks,
    completion_ids,
    completion_tokens,
    estimate_advantages,
    gate_difference,
    make_sampler,
    prompt_lists,
    sampler_logps,
    score,
    take_rows,
)
from jaxtrain.sharding import put_batch
from jaxtrain.types import Array, Params, Rollout, TrainState, record

Step = Callable[[TrainState, Any], tuple[TrainState, dict[str, Array]]]
Metrics = dict[str, float]
LAST = ("skipped", "streak")  # counters: their last value is the iteration's


@record
class LoopState:
    """What the loop itself changes.  iteration: int32, the next one.  kl_coef: float32, the reward's."""

    iteration: Array
    kl_coef: Array


def new_loop_state(config: PPOConfig) -> LoopState:
    """The state before the first iteration."""
    return LoopState(iteration=jnp.int32(0), kl_coef=jnp.float32(config.kl_coef))


class PPOLoop:
    """Runs iterations.  Everything that changes is in the states handed to ``iterate`` and handed back.

    policy: a model with an "lm" head, and with ``config.critic="shared"`` a "value" head.
    critic: with ``config.critic="separate"``, a model with a "value" head; otherwise None.
    reference_params: the frozen policy the KL is measured from.  Not the buffers of the policy's first state,
        which the step donates: a copy.
    prompts: iteration -> PromptBatch of ``config.prompts_per_iteration`` rows, a pure function.
    decode: ids -> text, for the rewards.  stop_ids: those that end a completion.
    rewards, weights: as for ``score_completions``.
    policy_step, critic_step: train steps of the objectives that ``config.objective`` returns.
    mesh: where the models live; rows are split over it.
    """

    def __init__(
        self,
        config: PPOConfig,
        *,
        policy: Any,
        critic: Any | None,
        reference_params: Params,
        prompts: Callable[[int], PromptBatch],
        decode: Callable[[Sequence[int]], str],
        stop_ids: Sequence[int],
        rewards: Sequence[Reward],
        weights: Sequence[float],
        policy_step: Step,
        critic_step: Step | None,
        seed: int,
        mesh: Mesh | None = None,
    ):
        shared = config.critic == "shared"
        if shared != (critic is None) or shared != (critic_step is None):
            given = "none" if critic is None else "one"
            raise ValueError(f"PPOConfig.critic is {config.critic!r}, but {given} was given beside the policy")
        valued = policy if shared else critic
        if "value" not in valued.config.heads:
            raise ValueError(f"the critic has the heads {valued.config.heads}: no 'value' among them")
        self.config, self.policy, self.critic = config, policy, critic
        self.reference_params, self.prompts, self.decode = reference_params, prompts, decode
        self.rewards, self.weights = list(rewards), list(weights)
        self.policy_step, self.critic_step = policy_step, critic_step
        self.seed, self.mesh = seed, mesh
        sampling = Sampling(temperature=config.temperature, stop_ids=tuple(stop_ids))
        self.sampler = make_sampler(policy, sampling, config.max_new_tokens, slots=config.sampler_slots, mesh=mesh)
        self.rollout_key, self.normalise_key = jax.random.split(jax.random.key(seed))
        self.normalised = not any(isinstance(reward, ModelReward) for reward in self.rewards)
        self.compiling = True

    def iterate(
        self, policy: TrainState, critic: TrainState | None, state: LoopState
    ) -> tuple[TrainState, TrainState | None, LoopState, Metrics]:
        """One iteration: the new states (the old ones' buffers are gone) and the iteration's metrics.

        Raises ValueError, before anything is updated, where sampler and trainer disagree on the first
        rollout, and where a reward function misbehaves.
        """
        iteration = int(state.iteration)
        with contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh):
            self.normalise_rewards()
            rollout, metrics = self.make_rollout(policy.params, critic and critic.params, iteration, state.kl_coef)
            policy, critic, updates = self.update(policy, critic, rollout, iteration)
        self.compiling = False
        kl_coef = state.kl_coef
        metrics["objective/kl_coef"] = float(kl_coef)
        if self.config.kl_target is not None:
            kl_coef = updated_kl_coef(
                kl_coef,
                metrics["objective/kl"],
                target=self.config.kl_target,
                samples=len(rollout.tokens.ids),
                horizon=self.config.kl_horizon,
            )
        state = LoopState(iteration=jnp.int32(iteration + 1), kl_coef=jnp.float32(kl_coef))
        return policy, critic, state, updates | metrics

    def place(self, batch: Any) -> Any:
        return batch if self.mesh is None else put_batch(batch, self.mesh)

    def sample(self, params: Params, iteration: int, key: Array) -> tuple[PromptBatch, Generated]:
        """An iteration's prompts and the policy's completions of them."""
        prompts = self.prompts(iteration)
        lengths = np.asarray(prompts.lengths)
        if len(lengths) != self.config.prompts_per_iteration or lengths.min() < 1:
            raise ValueError(
                f"iteration {iteration} has {len(lengths)} prompts, the shortest of {lengths.min(initial=0)}"
                f" tokens; PPO needs {self.config.prompts_per_iteration} of at least 1 token each"
            )
        generated = self.sampler(params, prompts.ids, lengths, jax.random.fold_in(key, iteration))
        beat(compiling=self.compiling)
        return prompts, generated

    def normalise_rewards(self) -> None:
        """Sets the reward models' shift and gain from the reference policy's samples: a pure function."""
        if self.normalised:
            return
        self.normalised = True
        if not self.config.normalise_batches:
            return
        prompt_ids, completions = [], []
        for number in range(self.config.normalise_batches):
            prompts, generated = self.sample(self.reference_params, number, self.normalise_key)
            prompt_ids += prompt_lists(prompts.ids, prompts.lengths)
            completions += completion_ids(generated)
        self.rewards = [
            reward.normalised(prompt_ids, completions) if isinstance(reward, ModelReward) else reward
            for reward in self.rewards
        ]

    def evaluate(self, params: Params, prompts: PromptBatch, key: Array, count: int) -> Metrics:
        """Mean "reward" and "kl" (nats a completion, to the reference) of fresh samples, and each reward.

        prompts: as many as an iteration's, of which the first ``count`` are counted.
        """
        with contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh):
            self.normalise_rewards()
            generated = self.sampler(params, prompts.ids, prompts.lengths, key)
            tokens = completion_tokens(prompts, generated)
            scored = partial(
                score,
                tokens=tokens,
                temperature=self.config.temperature,
                rows=self.config.minibatch_size,
                place=self.place,
            )
            logps, reference = scored(self.policy, params)[0], scored(self.policy, self.reference_params)[0]
        beat(compiling=self.compiling)
        counted = jax.tree.map(lambda x: x[:count], generated)
        some = dataclasses.replace(
            prompts,
            ids=prompts.ids[:count],
            lengths=prompts.lengths[:count],
            rows=prompts.rows and prompts.rows[:count],
        )
        scores, _, metrics = self.score_texts(some, counted)
        kl = ((logps - reference) * tokens.weights).sum(axis=1)[:count]
        means = {name: value for name, value in metrics.items() if name.endswith("/mean")}
        return {"reward": float(scores.mean()), "kl": float(kl.mean()), **means}

    def make_rollout(
        self, policy: Params, critic: Params | None, iteration: int, kl_coef: Array
    ) -> tuple[Rollout, Metrics]:
        """A rollout of NumPy arrays, complete with advantages, and its metrics."""
        config = self.config
        prompts, generated = self.sample(policy, iteration, self.rollout_key)
        tokens = completion_tokens(prompts, generated)
        scored = partial(
            score, tokens=tokens, temperature=config.temperature, rows=config.minibatch_size, place=self.place
        )
        old_logps, values = scored(self.policy, policy)
        if self.critic is not None:
            values = scored(self.critic, critic)[1]
        reference_logps, _ = scored(self.policy, self.reference_params)
        beat(compiling=self.compiling)

        mean, maximum = gate_difference(sampler_logps(generated, tokens), old_logps, tokens.weights)
        if iteration == 0:
            check_gate(mean, maximum, config.gate_threshold)

        scores, applicable, metrics = self.score_texts(prompts, generated)
        tokens = dataclasses.replace(tokens, weights=tokens.weights * applicable[:, None])
        last = tokens.ids.shape[1] - 1 - np.argmax(tokens.segments[:, ::-1], axis=1)
        advantages, returns, objective = estimate_advantages(
            config,
            scores,
            generated.stopped,
            tokens.weights,
            old_logps,
            reference_logps,
            values,
            values[np.arange(len(last)), last],
            kl_coef,
        )
        metrics |= {name: float(fetch(value)) for name, value in objective.items()} | {
            "completions/mean_length": float(generated.lengths.mean()),
            "completions/min_length": float(generated.lengths.min()),
            "completions/max_length": float(generated.lengths.max()),
            "completions/stopped_fraction": float(generated.stopped.mean()),
            "completions/truncated_fraction": float(1 - generated.stopped.mean()),
            "gate/mean": mean,
            "gate/max": maximum,
        }
        rollout = Rollout(
            tokens=tokens,
            old_logps=old_logps,
            reference_logps=reference_logps,
            advantages=fetch(advantages),
            returns=fetch(returns),
            old_values=values,
        )
        return rollout, metrics

    def score_texts(self, prompts: PromptBatch, generated: Generated) -> tuple[np.ndarray, np.ndarray, Metrics]:
        prompt_ids, ids = prompt_lists(prompts.ids, prompts.lengths), completion_ids(generated)
        columns = prompts.rows or [{}] * len(ids)
        rows = [
            {**column, "prompt_ids": prompt, "stopped": bool(stopped)}
            for column, prompt, stopped in zip(columns, prompt_ids, generated.stopped, strict=True)
        ]
        # The text ends before the stop token, which need not be a control token that decoding drops.
        texts = [self.decode(x[:-1] if row["stopped"] else x) for x, row in zip(ids, rows, strict=True)]
        asked = [row.get("prompt", None) or self.decode(row["prompt_ids"]) for row in rows]
        return score_completions(self.rewards, self.weights, asked, texts, ids, rows)

    def update(
        self, policy: TrainState, critic: TrainState | None, rollout: Rollout, iteration: int
    ) -> tuple[TrainState, TrainState | None, Metrics]:
        """Epochs of shuffled minibatches; metrics are means over the minibatches."""
        config, size = self.config, self.config.minibatch_size
        history: list[dict[str, float]] = []
        epochs = 0
        for epoch in range(config.epochs):
            order = np.random.default_rng([self.seed, iteration, epoch]).permutation(len(rollout.tokens.ids))
            steps = []
            for chosen in chunks(order, size):
                minibatch = self.place(take_rows(rollout, chosen, size))
                policy, metrics = self.policy_step(policy, minibatch)
                steps.append({POLICY_NAMES.get(name, name): value for name, value in metrics.items()})
                if self.critic_step is not None:
                    critic, metrics = self.critic_step(critic, minibatch)
                    steps[-1] |= {name if "/" in name else f"critic/{name}": x for name, x in metrics.items()}
                beat(compiling=self.compiling)
            steps = [{name: float(value) for name, value in step.items()} for step in jax.device_get(steps)]
            history += steps
            epochs += 1
            drift = np.mean([step["policy/approxkl_avg"] for step in steps])
            if config.target_kl_stop is not None and drift > 1.5 * config.target_kl_stop:
                break
        metrics = {
            name: history[-1][name] if name.split("/")[-1] in LAST else float(np.mean([x[name] for x in history]))
            for name in history[0]
        }
        metrics["val/ratio_var"] = float(np.var([x["val/ratio"] for x in history]))
        metrics["policy/epochs"] = float(epochs)
        return policy, critic, metrics


# The rollout's KL has the objective's name: it is a mean over completions, the policy's one over tokens.
POLICY_NAMES = {"objective/kl": "policy/kl_avg"}
