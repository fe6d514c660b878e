"""Supervised fine-tuning on completions."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxtrain.objectives.common import (
    at_least_float32,
    check_choice,
    check_range,
    head,
    score,
    weighted_sum,
    weighted_total,
)
from jaxtrain.objectives.lm import smoothed_nll
from jaxtrain.types import Apply, Array, Loss, Params, Tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class SFT:
    """Cross-entropy on the tokens the data weighs: the completion and its end-of-turn, not the prompt.

    reduction:
        ``'token'``: L = Σ w · (−log p[target]) / Σ w, every trained token alike.
        ``'sequence'``: L = mean over sequences of that same quotient within the sequence, every example
        alike however long.  A sequence is a segment of a row, so packing changes nothing; one without a
        trained token does not count.  ``Loss.weight`` is then the number of sequences.

    label_smoothing: ε in [0, 1): −log p[target] becomes −(1−ε) log p[target] − ε Σ_v log p_v / V, as in ``LM``.

    Dropout is on where an ``rng`` is given and the model has any.

    Metrics, token-weighted under either reduction: ``loss`` (−log p[target] alone), ``accuracy``.

    Source: InstructGPT (arXiv 2203.02155, section 3.5).
    """

    reduction: str = "token"
    label_smoothing: float = 0.0

    def __post_init__(self):
        check_range(self, "label_smoothing", 0.0, 1.0)
        check_choice(self, "reduction", ("token", "sequence"))

    def __call__(self, apply: Apply, params: Params, batch: Tokens, rng: Array | None) -> Loss:
        lm = head(apply(params, batch, rng=rng), "lm", type(self).__name__)
        scores = score(lm, batch.targets, mean=self.label_smoothing > 0)
        weights = at_least_float32(batch.weights)
        count = jnp.sum(weights)
        if self.reduction == "sequence":
            weights, count = per_sequence(weights, batch.segments)
        metrics = {
            "loss": weighted_sum(-scores.logps, batch.weights),
            "accuracy": weighted_sum(scores.correct, batch.weights),
        }
        losses = smoothed_nll(scores, self.label_smoothing)
        return Loss(total=weighted_total(losses, weights), weight=jax.lax.stop_gradient(count), metrics=metrics)


def per_sequence(weights: Array, segments: Array) -> tuple[Array, Array]:
    """Scales weights so that each segment's sum to 1.

    Args: weights, segments: ``[B, T]``; a segment is (row, number), numbers within ``[0, T]``.

    Returns: the scaled weights ``[B, T]``, and the number of segments with any weight, a float scalar.
    """
    rows, length = segments.shape
    # Segments are numbered from 1 within a row, so T + 1 numbers a row are enough.
    numbers = jnp.arange(rows)[:, None] * (length + 1) + segments
    sums = jax.ops.segment_sum(weights.ravel(), numbers.ravel(), num_segments=rows * (length + 1))
    own = sums[numbers]
    scaled = jnp.where(own > 0, weights / jnp.where(own > 0, own, 1.0), 0.0)
    return scaled, jnp.sum(sums > 0, dtype=weights.dtype)
