"""Causal language modelling: pretraining and mid-training."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxtrain.objectives.common import (
    at_least_float32,
    check_range,
    head,
    token_logps,
    weighted_sum,
    weighted_total,
)
from jaxtrain.types import Apply, Array, Loss, Params, Tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class LM:
    """Next-token cross-entropy, with an optional z-loss:

        L = Σ w · (−log p[target] + z_loss · log²Z) / Σ w,    Z = Σ_v e^{logit_v}.

    z_loss keeps the softmax normaliser near 1, which steadies bfloat16 training; 1e-4 is usual, 0 turns it
    off.  Dropout is on where an ``rng`` is given and the model has any.

    Metrics, all token-weighted: ``loss`` (without the z-loss), ``accuracy``, and ``z_loss`` (log²Z, before
    the coefficient) when it is on.

    Source: PaLM (arXiv 2204.02311, section 5) for the z-loss.
    """

    z_loss: float = 0.0

    def __post_init__(self):
        check_range(self, "z_loss", 0.0)

    def __call__(self, apply: Apply, params: Params, batch: Tokens, rng: Array | None) -> Loss:
        logits = head(apply(params, batch, rng=rng), "logits", type(self).__name__)
        nll = -token_logps(logits, batch.targets)
        metrics = {
            "loss": weighted_sum(nll, batch.weights),
            "accuracy": weighted_sum(correct(logits, batch.targets), batch.weights),
        }
        losses = nll
        if self.z_loss:
            squared = jax.nn.logsumexp(at_least_float32(logits), axis=-1) ** 2
            metrics["z_loss"] = weighted_sum(squared, batch.weights)
            losses = nll + self.z_loss * squared
        weight = jax.lax.stop_gradient(jnp.sum(at_least_float32(batch.weights)))
        return Loss(total=weighted_total(losses, batch.weights), weight=weight, metrics=metrics)


def correct(logits: Array, targets: Array) -> Array:
    """1.0 where no token is likelier than the target.  ``[..., V], [...] -> [...]``.

    Not by argmax: the softmax has found the maximum already, and XLA's CPU backend finds its place 50 times slower.
    """
    logits = at_least_float32(logits)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return (chosen >= jnp.max(logits, axis=-1)).astype(jnp.float32)
