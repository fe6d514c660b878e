"""Direct preference optimisation and its closest relatives."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxtrain.objectives.common import (
    at_least_float32,
    check_choice,
    check_range,
    deinterleave,
    head,
    interleave,
    sequence_logps,
    token_logps,
    weighted_sum,
    weighted_total,
)
from jaxtrain.objectives.reward import ranks_right
from jaxtrain.types import Apply, Array, Loss, Pairs, Params


def sigmoid(h: Array, beta: float, label_smoothing: float) -> Array:
    """``−(1−ε) log σ(βh) − ε log σ(−βh)``: DPO (arXiv 2305.18290); conservative (Mitchell) where ε > 0."""
    right, wrong = jax.nn.softplus(-beta * h), jax.nn.softplus(beta * h)
    return (1.0 - label_smoothing) * right + label_smoothing * wrong


def robust(h: Array, beta: float, label_smoothing: float) -> Array:
    """``[−(1−ε) log σ(βh) + ε log σ(−βh)] / (1−2ε)``: unbiased under a share ε of flipped labels.

    Source: Ray Chowdhury et al. (arXiv 2403.00409).
    """
    right, wrong = jax.nn.softplus(-beta * h), jax.nn.softplus(beta * h)
    return ((1.0 - label_smoothing) * right - label_smoothing * wrong) / (1.0 - 2.0 * label_smoothing)


def hinge(h: Array, beta: float, label_smoothing: float) -> Array:
    """``max(0, 1 − βh)`` (SLiC, arXiv 2305.10425)."""
    del label_smoothing
    return jax.nn.relu(1.0 - beta * h)


def ipo(h: Array, beta: float, label_smoothing: float) -> Array:
    """``(h − 1/(2β))²`` (arXiv 2310.12036)."""
    del label_smoothing
    return (h - 0.5 / beta) ** 2


# name -> (loss of h, whether each a is divided by its completion's length, whether label smoothing is read)
LOSSES = {
    "sigmoid": (sigmoid, False, True),
    "sigmoid_norm": (sigmoid, True, True),
    "robust": (robust, False, True),
    "hinge": (hinge, False, False),
    "ipo": (ipo, True, False),
    "ipo_sum": (ipo, False, False),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPO:
    """DPO: with a = log π − log π_ref summed over a completion's tokens, and h = a_c − a_r,

        L = Σ w · loss(h) / Σ w,    by default  loss(h) = −(1−ε) log σ(βh) − ε log σ(−βh).

    beta: how closely to stay to the reference; larger is closer.
    label_smoothing: ε, the assumed share of flipped labels, in [0, 0.5).
    loss: ``sigmoid`` (DPO, with ε conservative DPO), ``robust``, ``hinge``, ``ipo``; ``sigmoid_norm`` and
        ``ipo`` divide each a by its completion's length, ``ipo_sum`` does not.

    The reference's log-probabilities come in the batch (``Pairs.reference_chosen``, ``reference_rejected``),
    from the same ``token_logps`` at temperature 1.  A prompt taken as the longest
    common prefix of both sides leaves h alone, but shortens the lengths that the normalised losses divide by.

    Metrics, weighted by pair: ``loss``, ``rewards/chosen``, ``rewards/rejected`` (β·a, whatever the loss),
    ``rewards/margins``, ``rewards/accuracies`` (a tie counts one half), ``logps/chosen``, ``logps/rejected``
    (summed over the completion).

    Source: Rafailov et al. (arXiv 2305.18290); the others beside their functions in this file.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    loss: str = "sigmoid"

    def __post_init__(self):
        check_range(self, "beta", 0.0, open_low=True)
        check_range(self, "label_smoothing", 0.0, 0.5)
        check_choice(self, "loss", tuple(LOSSES))
        if self.label_smoothing and not LOSSES[self.loss][2]:
            raise ValueError(
                f"DPO.label_smoothing is {self.label_smoothing}, which loss={self.loss!r} does not use: "
                "set it to 0, or choose the loss 'sigmoid' or 'robust'"
            )

    def __call__(self, apply: Apply, params: Params, batch: Pairs, rng: Array | None) -> Loss:
        del rng  # no dropout: it would make the policy differ from the reference before any training
        (chosen, rejected), (n_chosen, n_rejected) = pair_logps(apply, params, batch)
        a_chosen = chosen - jax.lax.stop_gradient(batch.reference_chosen)
        a_rejected = rejected - jax.lax.stop_gradient(batch.reference_rejected)

        losses = preference_loss(
            a_chosen,
            a_rejected,
            n_chosen,
            n_rejected,
            loss=self.loss,
            beta=self.beta,
            label_smoothing=self.label_smoothing,
        )
        metrics = {
            "loss": losses,
            "rewards/chosen": self.beta * a_chosen,
            "rewards/rejected": self.beta * a_rejected,
            "rewards/margins": self.beta * (a_chosen - a_rejected),
            "rewards/accuracies": ranks_right(a_chosen, a_rejected),
            "logps/chosen": chosen,
            "logps/rejected": rejected,
        }
        return Loss(
            total=weighted_total(losses, batch.weight),
            weight=jax.lax.stop_gradient(jnp.sum(at_least_float32(batch.weight))),
            metrics={name: weighted_sum(value, batch.weight) for name, value in metrics.items()},
        )


def preference_loss(
    a_chosen: Array,
    a_rejected: Array,
    n_chosen: Array,
    n_rejected: Array,
    *,
    loss: str = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Array:
    """The loss of each pair, elementwise, from the summed log-ratios a and the completion lengths n."""
    function, normalised, _ = LOSSES[loss]
    if normalised:
        # A padding row has no completion; its weight is 0, so any finite number serves.
        a_chosen = a_chosen / jnp.maximum(n_chosen, 1)
        a_rejected = a_rejected / jnp.maximum(n_rejected, 1)
    return function(a_chosen - a_rejected, beta, label_smoothing)


def add_reference(apply: Apply, params: Params, batch: Pairs) -> Pairs:
    """The same pairs with the log-probabilities of a frozen reference, ``params``.

    They take the code path and type of the policy's own in ``DPO``, so that a policy equal to its reference
    starts with rewards of 0.
    """
    (chosen, rejected), _ = pair_logps(apply, params, batch)
    return dataclasses.replace(batch, reference_chosen=chosen, reference_rejected=rejected)


def pair_logps(apply: Apply, params: Params, batch: Pairs) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """The completions' summed log-probabilities, and their numbers of tokens; (chosen, rejected), ``[B]``."""
    rows = interleave(batch.chosen, batch.rejected)
    lm = head(apply(params, rows), "lm", "DPO")
    logps, lengths = sequence_logps(token_logps(lm, rows.targets), rows.weights)
    return deinterleave(logps), deinterleave(lengths)
