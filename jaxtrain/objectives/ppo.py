"""Proximal policy optimisation: the policy, the critic, and both on one trunk."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxtrain.objectives.common import (
    KL_ESTIMATORS,
    at_least_float32,
    bounded_exp,
    check_choice,
    check_range,
    head,
    kl_estimate,
    kl_loss,
    score,
    weighted_sum,
    weighted_total,
)
from jaxtrain.types import Apply, Array, Loss, Outputs, Params, Rollout

# Beyond e^20 a ratio says no more than "far"; its fourth power would leave float32.
MAX_LOG_RATIO = 20.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class PPOPolicy:
    """Clipped PPO on sampled tokens, with ρ = π/π_old and A the (whitened) advantage:

        L = Σ w · [max(−ρA, −A·clip(ρ, 1−clip_low, 1+clip_high)) − entropy_coef·H + kl_coef·KL] / Σ w.

    clip_low, clip_high: how far ρ may profit from moving; [0, 1) and [0, ∞).
    dual_clip: c > 1 caps the first term at −cA where A < 0, so that a single unlikely token cannot
        dominate (3 is usual); None leaves it uncapped.
    entropy_coef: of the entropy of softmax(logits / temperature), differentiated.
    kl_coef: of the KL penalty placed *in the loss*.  For the penalty *in the reward*, see
        ``rl.advantages.token_rewards``; one of the two should be 0.
    kl_estimator: the estimator of the KL's number: ``k1``, ``k2`` or ``k3``.
    kl_gradient: the estimator its gradient is taken of.  ``k2`` is right while π is the policy that sampled;
        ``k3`` follows the forward KL; ``k1`` has no gradient in expectation, so it needs kl_importance.
    kl_importance: weights that gradient by ρ, which keeps it right after π has moved.
    temperature: the one the rollout was sampled at, as were ``old_logps`` and ``reference_logps``.

    Metrics, over trained tokens only: ``loss/policy_avg`` (the clipped term alone), ``policy/approxkl_avg``
    (½(log ρ)²), ``policy/clipfrac_avg``, ``policy/entropy_avg``, ``val/ratio``, ``objective/kl`` (by
    kl_estimator, to the reference).

    Source: Schulman et al. (arXiv 1707.06347); dual clip, Ye et al. (1912.09729); metrics as in Huang et al.
    (2403.17031).
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    entropy_coef: float = 0.0
    kl_coef: float = 0.0
    kl_estimator: str = "k3"
    kl_gradient: str = "k2"
    kl_importance: bool = True
    temperature: float = 1.0

    def __post_init__(self):
        check_range(self, "clip_low", 0.0, 1.0)
        check_range(self, "clip_high", 0.0)
        if self.dual_clip is not None:
            check_range(self, "dual_clip", 1.0, open_low=True)
        check_range(self, "entropy_coef", 0.0)
        check_range(self, "kl_coef", 0.0)
        check_choice(self, "kl_estimator", KL_ESTIMATORS)
        check_choice(self, "kl_gradient", KL_ESTIMATORS)
        check_range(self, "temperature", 0.0, open_low=True)
        if self.kl_coef and self.kl_gradient == "k1" and not self.kl_importance:
            raise ValueError(
                "PPOPolicy.kl_gradient is 'k1' without kl_importance, whose expected gradient is zero: "
                "choose 'k2', or set kl_importance=True"
            )

    def __call__(self, apply: Apply, params: Params, batch: Rollout, rng: Array | None) -> Loss:
        del rng  # no dropout: the first ratio of every rollout must be 1
        return self.from_outputs(apply(params, batch.tokens), batch)

    def from_outputs(self, outputs: Outputs, batch: Rollout) -> Loss:
        lm = head(outputs, "lm", type(self).__name__)
        weights = at_least_float32(batch.tokens.weights)
        batch = jax.lax.stop_gradient(batch)
        scores = score(lm, batch.tokens.targets, temperature=self.temperature, entropy=True)
        logps = scores.logps
        # What padding holds is arbitrary: nothing of it may enter exp().
        log_ratio = jnp.where(weights != 0, logps - batch.old_logps, 0.0)
        reference_logps = jnp.where(weights != 0, batch.reference_logps, logps)
        ratio = bounded_exp(log_ratio, MAX_LOG_RATIO)
        losses, clipped = clipped_policy_loss(ratio, batch.advantages, self.clip_low, self.clip_high, self.dual_clip)
        total = weighted_total(losses, weights)
        if self.entropy_coef:
            total = total - self.entropy_coef * weighted_total(scores.entropy, weights)
        if self.kl_coef:
            kl = kl_loss(
                logps,
                reference_logps,
                ratio,
                value=self.kl_estimator,
                gradient=self.kl_gradient,
                importance=self.kl_importance,
            )
            total = total + self.kl_coef * weighted_total(kl, weights)
        metrics = {
            "loss/policy_avg": losses,
            "policy/approxkl_avg": 0.5 * log_ratio**2,
            "policy/clipfrac_avg": clipped,
            "policy/entropy_avg": scores.entropy,
            "val/ratio": ratio,
            "objective/kl": kl_estimate(logps, reference_logps, self.kl_estimator),
        }
        return Loss(
            total=total,
            weight=jax.lax.stop_gradient(jnp.sum(weights)),
            metrics={name: weighted_sum(value, weights) for name, value in metrics.items()},
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PPOCritic:
    """The critic's regression to the returns R, with V_old its value when the rollout was made:

        L = Σ w · ½ max((V−R)², (clip(V, V_old−clip, V_old+clip) − R)²) / Σ w.

    clip: None takes the plain ½(V−R)².

    Metrics, over trained tokens only: ``loss/value_avg``, ``val/clipfrac_avg``, ``val/value``.

    Source: Schulman et al. (arXiv 1707.06347) and its reference code; Huang et al. (2403.17031).
    """

    clip: float | None = 0.2

    def __post_init__(self):
        if self.clip is not None:
            check_range(self, "clip", 0.0, open_low=True)

    def __call__(self, apply: Apply, params: Params, batch: Rollout, rng: Array | None) -> Loss:
        del rng  # no dropout: old_values came from the same deterministic network
        return self.from_outputs(apply(params, batch.tokens), batch)

    def from_outputs(self, outputs: Outputs, batch: Rollout) -> Loss:
        weights = at_least_float32(batch.tokens.weights)
        batch = jax.lax.stop_gradient(batch)
        values = at_least_float32(head(outputs, "values", type(self).__name__))
        losses, clipped = clipped_value_loss(values, batch.old_values, batch.returns, self.clip)
        metrics = {"loss/value_avg": losses, "val/clipfrac_avg": clipped, "val/value": values}
        return Loss(
            total=weighted_total(losses, weights),
            weight=jax.lax.stop_gradient(jnp.sum(weights)),
            metrics={name: weighted_sum(value, weights) for name, value in metrics.items()},
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PPOShared:
    """Policy and critic on one trunk, a model with ``lm`` and ``value`` heads, in one forward pass:

        L = L_policy + vf_coef · L_value.

    Metrics: those of both.

    Source: Schulman et al. (arXiv 1707.06347, equation 9).
    """

    policy: PPOPolicy = PPOPolicy()
    critic: PPOCritic = PPOCritic()
    vf_coef: float = 0.1

    def __post_init__(self):
        check_range(self, "vf_coef", 0.0)

    def __call__(self, apply: Apply, params: Params, batch: Rollout, rng: Array | None) -> Loss:
        del rng
        outputs = apply(params, batch.tokens)
        policy = self.policy.from_outputs(outputs, batch)
        critic = self.critic.from_outputs(outputs, batch)
        # Both weigh the same tokens, so their sums share one weight.
        return Loss(
            total=policy.total + self.vf_coef * critic.total,
            weight=policy.weight,
            metrics={**policy.metrics, **critic.metrics},
        )


def clipped_policy_loss(
    ratio: Array, advantages: Array, clip_low: float, clip_high: float, dual_clip: float | None = None
) -> tuple[Array, Array]:
    """``max(−ρA, −A·clip(ρ, 1−ε_lo, 1+ε_hi))``, at most ``−cA`` where A < 0.

    Returns: the loss, and 1.0 where clipping binds; both of the arguments' shape.
    """
    plain = -ratio * advantages
    clipped = -advantages * jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
    losses = jnp.maximum(plain, clipped)
    if dual_clip is not None:
        losses = jnp.where(advantages < 0, jnp.minimum(losses, -dual_clip * advantages), losses)
    return losses, jnp.where(losses != plain, 1.0, 0.0)


def clipped_value_loss(values: Array, old_values: Array, returns: Array, clip: float | None) -> tuple[Array, Array]:
    """``½ max((V−R)², (clip(V, V_old ± ε) − R)²)``.

    Returns: the loss, and 1.0 where clipping binds; both of the arguments' shape.
    """
    plain = (values - returns) ** 2
    if clip is None:
        return 0.5 * plain, jnp.zeros_like(plain)
    clipped = (jnp.clip(values, old_values - clip, old_values + clip) - returns) ** 2
    return 0.5 * jnp.maximum(plain, clipped), jnp.where(clipped > plain, 1.0, 0.0)
