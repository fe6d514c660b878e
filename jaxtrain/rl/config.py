"""The settings of the PPO loop."""

from __future__ import annotations

import dataclasses

from jaxtrain.objectives.common import KL_ESTIMATORS, check_choice, check_range
from jaxtrain.objectives.ppo import PPOPolicy, PPOShared


@dataclasses.dataclass(frozen=True, kw_only=True)
class PPOConfig:
    """What one iteration does, and how many there are.

    iterations: of the whole run.  prompts_per_iteration: prompts, each with one sampled completion, per
        iteration.
    max_new_tokens: of a completion, the stop token included.  temperature: sampled at and trained at.
    sampler_slots: completions sampled together, the next prompt taking the place of a finished one; 0: all of an
        iteration's.  Fewer take less memory, and do not wait for the longest of all.
    epochs: passes over an iteration's rollouts, each in a fresh order.  minibatch_size: rollouts an update;
        the last one of an epoch is filled up with rows of weight 0.
    kl_coef: of the penalty KL(policy || reference).  kl_estimator: k1, k2 or k3.
    kl_placement: "reward" subtracts the penalty from each token's reward; "loss" adds it to the objective.
    kl_target: nats a completion; steers kl_coef (in the reward only), over ``kl_horizon`` completions.
        None: kl_coef stays.
    gamma, lam: discount and trace decay of generalised advantage estimation.
    whiten_rewards: divides token rewards by their standard deviation, keeping their mean.
    whiten_advantages: to mean 0 and standard deviation 1 over the iteration's trained tokens.
    missing_eos_penalty: subtracted from the score of a completion that was cut off.  missing_eos_score: its
        score.
    truncation: the value after a completion that was cut off: "terminal" 0, "bootstrap" the critic's.
    target_kl_stop: ends an iteration's updates after an epoch whose mean approximate KL exceeds 1.5 times
        this.
    gate_threshold: nats a token by which sampler and trainer may differ on average on the first rollout.
    critic: "separate" is a model of its own, "shared" a value head on the policy (trained by ``PPOShared``).
    normalise_batches: iterations' worth of the reference policy's samples on which reward models are brought
        to mean 0 and standard deviation 1 before the first iteration; 0 leaves them as they are.

    Sources: 1707.06347, 1909.08593, 2403.17031.
    """

    iterations: int
    prompts_per_iteration: int
    max_new_tokens: int
    minibatch_size: int
    temperature: float = 1.0
    sampler_slots: int = 0
    epochs: int = 4
    kl_coef: float = 0.05
    kl_estimator: str = "k1"
    kl_placement: str = "reward"
    kl_target: float | None = None
    kl_horizon: int = 10_000
    gamma: float = 1.0
    lam: float = 0.95
    whiten_rewards: bool = False
    whiten_advantages: bool = True
    missing_eos_penalty: float | None = None
    missing_eos_score: float | None = None
    truncation: str = "terminal"
    target_kl_stop: float | None = None
    gate_threshold: float = 1e-3
    critic: str = "separate"
    normalise_batches: int = 1

    def __post_init__(self):
        for field in (
            "iterations",
            "prompts_per_iteration",
            "max_new_tokens",
            "minibatch_size",
            "epochs",
            "kl_horizon",
        ):
            check_range(self, field, 1)
        check_range(self, "temperature", 0.0, open_low=True)
        check_range(self, "gate_threshold", 0.0, open_low=True)
        check_range(self, "kl_coef", 0.0)
        check_range(self, "normalise_batches", 0)
        check_range(self, "sampler_slots", 0)
        for field in ("gamma", "lam"):
            if not 0 <= getattr(self, field) <= 1:
                raise ValueError(f"PPOConfig.{field} is {getattr(self, field)!r}; give it a number from 0 to 1")
        for field in ("kl_target", "target_kl_stop"):
            if getattr(self, field) is not None:
                check_range(self, field, 0.0, open_low=True)
        check_choice(self, "kl_estimator", KL_ESTIMATORS)
        check_choice(self, "kl_placement", ("reward", "loss"))
        check_choice(self, "truncation", ("terminal", "bootstrap"))
        check_choice(self, "critic", ("separate", "shared"))
        if self.minibatch_size > self.prompts_per_iteration:
            raise ValueError(
                f"PPOConfig.minibatch_size={self.minibatch_size} exceeds prompts_per_iteration="
                f"{self.prompts_per_iteration}: make it at most that"
            )
        if self.kl_target is not None and self.kl_placement == "loss":
            raise ValueError("PPOConfig.kl_target steers the KL in the reward: set kl_placement='reward', or no target")
        if self.missing_eos_penalty is not None and self.missing_eos_score is not None:
            raise ValueError(
                "PPOConfig.missing_eos_penalty and missing_eos_score are both set, and only one can decide"
                " the score of an unfinished completion: leave one at None"
            )

    @property
    def updates(self) -> int:
        """Optimizer updates of the whole run (fewer happen where ``target_kl_stop`` ends epochs)."""
        return self.iterations * self.epochs * -(-self.prompts_per_iteration // self.minibatch_size)

    def objective(self, objective: PPOPolicy | PPOShared) -> PPOPolicy | PPOShared:
        """The objective with this loop's temperature and, if placed in the loss, its KL penalty.

        Raises ValueError if it already has others, or if it does not fit ``critic``.
        """
        shared = isinstance(objective, PPOShared)
        if shared != (self.critic == "shared"):
            raise ValueError(
                f"PPOConfig.critic is {self.critic!r}, which needs the objective"
                f" {'PPOShared' if self.critic == 'shared' else 'PPOPolicy'}; found"
                f" {type(objective).__name__}"
            )
        policy = objective.policy if shared else objective
        if policy.temperature not in (1.0, self.temperature):
            raise ValueError(
                f"PPOPolicy.temperature is {policy.temperature}, but completions are sampled at"
                f" PPOConfig.temperature {self.temperature}: set only the latter"
            )
        coefficient = self.kl_coef if self.kl_placement == "loss" else 0.0
        if policy.kl_coef not in (0.0, coefficient):
            raise ValueError(
                f"PPOPolicy.kl_coef is {policy.kl_coef}, but the penalty is set by"
                f" PPOConfig.kl_coef={self.kl_coef} with kl_placement={self.kl_placement!r}: set only those"
            )
        policy = dataclasses.replace(policy, temperature=self.temperature, kl_coef=coefficient)
        return dataclasses.replace(objective, policy=policy) if shared else policy
