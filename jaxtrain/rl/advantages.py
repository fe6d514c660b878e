"""From rewards to advantages: the KL penalty, generalised advantage estimation, whitening.

Pure functions of ``[B, T]`` arrays aligned with the actions (entry t is about the token sampled at position
t).  ``mask`` is 1 (or True) on trained tokens.  Float32; float64 where given float64.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxtrain.objectives.common import at_least_float32, kl_estimate
from jaxtrain.types import Array


def end_scores(
    scores: Array,
    stopped: Array,
    *,
    missing_eos_penalty: float | None = None,
    missing_eos_score: float | None = None,
) -> Array:
    """Marks down the completions that never stopped.

    Args:
        scores: ``[B]``.
        stopped: bool ``[B]``, whether the completion ends in a stop token.
        missing_eos_penalty: subtracted from the score where it does not (as TRL).
        missing_eos_score: replaces the score there (−1 in arXiv 2403.17031).

    Returns: float ``[B]``.  Raises ValueError where both are given.
    """
    if missing_eos_penalty is not None and missing_eos_score is not None:
        raise ValueError(
            f"both missing_eos_penalty={missing_eos_penalty} and missing_eos_score={missing_eos_score} are "
            "set, and only one can decide the score of an unfinished completion: leave one at None"
        )
    scores = at_least_float32(scores)
    if missing_eos_penalty is not None:
        return jnp.where(stopped, scores, scores - missing_eos_penalty)
    if missing_eos_score is not None:
        return jnp.where(stopped, scores, missing_eos_score)
    return scores


def token_rewards(
    scores: Array,
    logps: Array,
    reference_logps: Array,
    mask: Array,
    *,
    kl_coef: Array | float,
    kl_estimator: str = "k1",
    one_past_end: bool = False,
) -> tuple[Array, Array]:
    """``r_t = −kl_coef · KL_t``, plus the completion's score at its last trained token.

    Args:
        scores: ``[B]``.
        logps, reference_logps: ``[B, T]``, of the policy that sampled and of the reference.
        mask: ``[B, T]``.
        kl_coef: the penalty placed in the reward; a number or a scalar array (an adaptive one changes).
        kl_estimator: k1, k2 or k3, see ``objectives.common.kl_estimate``.
        one_past_end: puts the score one position after the last trained token, where the row has room for
            it, as TRL's PPO does; the critic's value there then enters the advantages.

    Returns: the rewards ``[B, T]``, 0 outside the second; and the float mask ``[B, T]`` over which
    :func:`gae` must run: ``mask``, and with ``one_past_end`` those further positions.  A row without a
    trained token gets no reward.

    Source: Ziegler et al. (arXiv 1909.08593); Ouyang et al. (2203.02155).
    """
    scores, valid = at_least_float32(scores), _valid(mask)
    # Masked before the estimate, so that whatever padding holds stays out of exp() and out of the sum.
    kl = kl_estimate(jnp.where(valid, logps, 0.0), jnp.where(valid, reference_logps, 0.0), kl_estimator)
    steps = jnp.arange(valid.shape[-1])
    end = jnp.max(jnp.where(valid, steps, -1), axis=-1)
    if one_past_end:
        end = jnp.where(end >= 0, jnp.minimum(end + 1, valid.shape[-1] - 1), -1)
    at_end = steps == end[:, None]
    rewards = jnp.where(valid, -kl_coef * kl, 0.0) + jnp.where(at_end, scores[:, None], 0.0)
    return rewards, (valid | at_end).astype(rewards.dtype)


def updated_kl_coef(kl_coef: Array | float, kl: Array | float, *, target: float, samples: int, horizon: int) -> Array:
    """The adaptive controller: ``kl_coef · (1 + clip(kl / target − 1, ±0.2) · samples / horizon)``.

    kl: measured on the last rollout, of the unit of ``target`` (nats per completion is usual).

    Source: Ziegler et al. (arXiv 1909.08593, section 2.2).
    """
    if not (target > 0 and horizon > 0):
        raise ValueError(f"the KL controller needs a positive target and horizon; got {target} and {horizon}")
    error = jnp.clip(kl / target - 1.0, -0.2, 0.2)
    return kl_coef * (1.0 + error * samples / horizon)


def gae(
    rewards: Array,
    values: Array,
    mask: Array,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    bootstrap: Array | None = None,
) -> tuple[Array, Array]:
    """Generalised advantage estimation over the tokens of ``mask`` alone:

        δ_t = r_t + γ V_{t'} − V_t,    A_t = δ_t + γλ A_{t'},    returns_t = A_t + V_t,

    t' being the *next masked-in* token.  The others (padding, tool output, further turns of the user) pass
    both carries through undecayed, and their values and rewards are never read.

    Args:
        rewards, values, mask: ``[B, T]``.
        gamma, lam: γ and λ, in [0, 1].
        bootstrap: ``[B]``, the value after the last token: 0 for a completion that ended, the critic's for
            one that was cut off.  None takes 0 for all: being cut off is an end too.

    Returns: advantages (not whitened) and returns, both ``[B, T]``, 0 outside the mask.

    Source: Schulman et al. (arXiv 1506.02438).
    """
    rewards, values, valid = at_least_float32(rewards), at_least_float32(values), _valid(mask)
    dtype = jnp.result_type(rewards, values)
    end_values = jnp.zeros(values.shape[0], dtype) if bootstrap is None else bootstrap.astype(dtype)

    def back(carry, step):
        next_value, next_advantage = carry
        reward, value, is_valid = step
        advantage = reward + gamma * next_value - value + gamma * lam * next_advantage
        carry = (jnp.where(is_valid, value, next_value), jnp.where(is_valid, advantage, next_advantage))
        return carry, jnp.where(is_valid, advantage, 0.0)

    steps = (rewards.T.astype(dtype), values.T.astype(dtype), valid.T)
    _, advantages = jax.lax.scan(back, (end_values, jnp.zeros_like(end_values)), steps, reverse=True)
    advantages = advantages.T
    return advantages, jnp.where(valid, advantages + values, 0.0)


def whiten(values: Array, mask: Array, *, shift_mean: bool = True, epsilon: float = 1e-8) -> Array:
    """``(x − mean) / √(variance + ε)`` over the tokens of ``mask``, with Bessel's correction.

    Args:
        values, mask: ``[B, T]``: the whole rollout batch, so that the statistics are global.
        shift_mean: False puts the mean back, which whitening *rewards* needs.

    Returns: ``[B, T]``, 0 outside the mask.  A single token, or none, has variance 0.
    """
    values, valid = at_least_float32(values), _valid(mask)
    count = jnp.sum(valid, dtype=values.dtype)
    mean = jnp.sum(jnp.where(valid, values, 0.0)) / jnp.maximum(count, 1.0)
    centred = jnp.where(valid, values - mean, 0.0)
    variance = jnp.sum(centred**2) / jnp.maximum(count - 1.0, 1.0)
    whitened = centred * jax.lax.rsqrt(variance + epsilon)
    return whitened if shift_mean else jnp.where(valid, whitened + mean, 0.0)


def _valid(mask: Array) -> Array:
    return jnp.asarray(mask) != 0
