"""Causal language modelling: pretraining and mid-training."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxtrain.kernels.cross_entropy.reference import Scores
from jaxtrain.objectives.common import (
    at_least_float32,
    check_range,
    head,
    score,
    weighted_sum,
    weighted_total,
)
from jaxtrain.types import Apply, Array, Loss, Params, Tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class LM:
    """Next-token cross-entropy, with an optional z-loss:

        L = Σ w · (−(1−ε) log p[target] − ε Σ_v log p_v / V + z_loss · log²Z) / Σ w,    Z = Σ_v e^{logit_v}.

    label_smoothing: ε, the share of the target's probability that all tokens divide equally, in [0, 1).
    z_loss keeps the softmax normaliser near 1, which steadies bfloat16 training; 1e-4 is usual, 0 turns it
    off.  Dropout is on where an ``rng`` is given and the model has any.

    Metrics, all token-weighted: ``loss`` (−log p[target] alone), ``accuracy``, and ``z_loss`` (log²Z, before
    the coefficient) when it is on.

    Source: PaLM (arXiv 2204.02311, section 5) for the z-loss; label smoothing, Szegedy et al. (1512.00567, section 7).
    """

    z_loss: float = 0.0
    label_smoothing: float = 0.0

    def __post_init__(self):
        check_range(self, "z_loss", 0.0)
        check_range(self, "label_smoothing", 0.0, 1.0)

    def __call__(self, apply: Apply, params: Params, batch: Tokens, rng: Array | None) -> Loss:
        lm = head(apply(params, batch, rng=rng), "lm", type(self).__name__)
        scores = score(lm, batch.targets, mean=self.label_smoothing > 0)
        metrics = {
            "loss": weighted_sum(-scores.logps, batch.weights),
            "accuracy": weighted_sum(scores.correct, batch.weights),
        }
        losses = smoothed_nll(scores, self.label_smoothing)
        if self.z_loss:
            squared = scores.log_z**2
            metrics["z_loss"] = weighted_sum(squared, batch.weights)
            losses = losses + self.z_loss * squared
        weight = jax.lax.stop_gradient(jnp.sum(at_least_float32(batch.weights)))
        return Loss(total=weighted_total(losses, batch.weights), weight=weight, metrics=metrics)


def smoothed_nll(scores: Scores, label_smoothing: float) -> Array:
    """``−(1−ε) log p[target] − ε Σ_v log p_v / V``; Szegedy et al. (arXiv 1512.00567, section 7)."""
    if not label_smoothing:
        return -scores.logps
    return -(1.0 - label_smoothing) * scores.logps - label_smoothing * scores.mean_logps
