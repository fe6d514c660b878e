"""The reward model: a scalar that ranks completions as people did."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxtrain.objectives.common import (
    at_least_float32,
    check_range,
    deinterleave,
    head,
    interleave,
    last_valid,
    weighted_sum,
    weighted_total,
)
from jaxtrain.types import Apply, Array, Loss, Pairs, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardModel:
    """Pairwise Bradley–Terry, with r the reward head at the last token that is not padding:

        L = Σ w · [−log σ(r_c − r_r − m) + centering · (r_c + r_r)²] / Σ w.

    centering: keeps rewards around 0, which the first term leaves free; 0.01 is usual, 0 turns it off.
    use_margin: m is ``Pairs.margin``; without it, 0.

    K ranked completions of a prompt arrive as their C(K, 2) pairs, each of ``Pairs.weight`` 1 / C(K, 2), all
    in one batch: the loss is then the mean over pairs within a prompt, then over prompts.  Ties are left out.

    Metrics, weighted by pair: ``loss`` (the whole of it), ``accuracy`` (a tie counts one half), ``margin``
    (r_c − r_r), ``mean_reward`` (over both sides), ``reward/chosen``, ``reward/rejected``.

    Source: InstructGPT (arXiv 2203.02155); margins, Llama 2 (2307.09288); centering, Eisenstein et al.
    (2312.09244).
    """

    centering: float = 0.0
    use_margin: bool = False

    def __post_init__(self):
        check_range(self, "centering", 0.0)

    def __call__(self, apply: Apply, params: Params, batch: Pairs, rng: Array | None) -> Loss:
        del rng  # no dropout: both sides of a pair are read by the same network
        rows = interleave(batch.chosen, batch.rejected)
        rewards = at_least_float32(head(apply(params, rows), "rewards", type(self).__name__))
        chosen, rejected = deinterleave(last_valid(rewards, rows.segments))
        margin = batch.margin if self.use_margin else jnp.zeros_like(batch.margin)
        losses = bradley_terry(chosen, rejected, margin) + self.centering * (chosen + rejected) ** 2
        metrics = {
            "loss": losses,
            "accuracy": ranks_right(chosen, rejected),
            "margin": chosen - rejected,
            "mean_reward": 0.5 * (chosen + rejected),
            "reward/chosen": chosen,
            "reward/rejected": rejected,
        }
        return Loss(
            total=weighted_total(losses, batch.weight),
            weight=jax.lax.stop_gradient(jnp.sum(at_least_float32(batch.weight))),
            metrics={name: weighted_sum(value, batch.weight) for name, value in metrics.items()},
        )


def bradley_terry(chosen: Array, rejected: Array, margin: Array | float = 0.0) -> Array:
    """``−log σ(chosen − rejected − margin)``, elementwise."""
    return jax.nn.softplus(-(chosen - rejected - margin))


def ranks_right(chosen: Array, rejected: Array) -> Array:
    """1 where chosen is above rejected, 0 below, one half on a tie: a constant model scores like chance."""
    return 0.5 * (1.0 + jnp.sign(chosen - rejected))
