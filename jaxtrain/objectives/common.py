"""What every objective shares: log-probabilities, reductions over masks, and KL estimators.

Arrays are float32 (float64 where given float64); B rows, T token positions, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxtrain.kernels.cross_entropy import reference
from jaxtrain.kernels.cross_entropy.reference import Scores, at_least_float32
from jaxtrain.models.heads import LazyLogits
from jaxtrain.types import Array, Outputs, Sum, Tokens

KL_ESTIMATORS = ("k1", "k2", "k3")


def score(
    lm: LazyLogits | Array, targets: Array, *, temperature: float = 1.0, entropy: bool = False, mean: bool = False
) -> Scores:
    """All that objectives read of next-token distributions: the one such function of the project.

    Policy, old policy, reference and scoring all call it, so that their differences carry no change of
    code, precision or temperature.

    Args:
        lm: ``Outputs.lm``: ``LazyLogits``, of which a part at a time is computed, or logits ``[..., V]`` of any
            float type; the softmax is taken in float32 (float64 for float64).
        targets: int ``[...]``, each in ``[0, V)``.
        temperature: positive; divides the logits.
        entropy, mean: whether ``Scores.entropy`` and ``Scores.mean_logps`` are wanted.

    Returns: ``Scores``, each ``[...]``; differentiable.
    """
    if isinstance(lm, LazyLogits):
        return lm.score(targets, temperature=temperature, entropy=entropy, mean=mean)
    return reference.scores(lm, targets, temperature=temperature, entropy=entropy, mean=mean)


def token_logps(lm: LazyLogits | Array, targets: Array, temperature: float = 1.0) -> Array:
    """``log softmax(logits / temperature)[targets]``, ``[...]``; arguments as for :func:`score`."""
    return score(lm, targets, temperature=temperature).logps


def weighted_total(values: Array, weights: Array, axis: int | None = None) -> Array:
    """``Σ weights · values``.  What lies under a zero weight has no say, not even as NaN."""
    kept = weights != 0
    return jnp.sum(jnp.where(kept, weights * jnp.where(kept, values, 0.0), 0.0), axis=axis)


def weighted_sum(values: Array, weights: Array) -> Sum:
    """A metric: ``Σ weights · values`` and ``Σ weights``, without gradient."""
    total, weight = weighted_total(values, weights), jnp.sum(at_least_float32(weights))
    return Sum(jax.lax.stop_gradient(total), jax.lax.stop_gradient(weight))


def sequence_logps(logps: Array, weights: Array) -> tuple[Array, Array]:
    """Sums log-probabilities over the tokens of each row whose weight is not 0.

    Args: both ``[B, T]``.  Returns: the sums ``[B]`` and the numbers of tokens ``[B]``, both float.
    """
    kept = (weights != 0).astype(logps.dtype)
    return weighted_total(logps, kept, axis=-1), jnp.sum(kept, axis=-1)


def last_valid(values: Array, segments: Array) -> Array:
    """Reads each row at its last token that is not padding, on whichever side the padding stands.

    Args:
        values: ``[B, T]``.
        segments: int ``[B, T]``, 0 marking padding.

    Returns: ``[B]``; 0 for a row of padding only.
    """
    steps = jnp.arange(segments.shape[-1])
    last = jnp.max(jnp.where(segments > 0, steps, -1), axis=-1)
    read = jnp.take_along_axis(values, jnp.maximum(last, 0)[..., None], axis=-1)[..., 0]
    return jnp.where(last >= 0, read, 0.0)


def interleave(first: Tokens, second: Tokens) -> Tokens:
    """Rows of two records in turn, ``[2B, T]``, the shorter padded on the right to the longer's T.

    In turn rather than end to end, so that a batch split over devices needs no exchange of rows.
    """
    length = max(first.ids.shape[1], second.ids.shape[1])

    def merge(a: Array, b: Array) -> Array:
        a, b = (jnp.pad(x, ((0, 0), (0, length - x.shape[1]))) for x in (a, b))
        return jnp.stack([a, b], axis=1).reshape(-1, length)

    return jax.tree.map(merge, first, second)


def deinterleave(values: Array) -> tuple[Array, Array]:
    """The inverse for one number a row: ``[2B] -> [B], [B]``."""
    pairs = values.reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1]


def bounded_exp(x: Array, bound: float) -> Array:
    """``exp(x)``, continued above ``bound`` by its tangent there.

    It cannot overflow, and its slope stays positive: clamping x instead would erase the gradient just where
    the policy has drifted furthest (in k3 it would even turn its sign).
    """
    return jnp.exp(jnp.minimum(x, bound)) * (1.0 + jnp.maximum(x - bound, 0.0))


def kl_estimate(logps: Array, reference_logps: Array, estimator: str = "k1", bound: float = 10.0) -> Array:
    """Estimates KL(π ‖ π_ref) from samples of π: with ``d = log π − log π_ref``, elementwise,

        k1 = d,    k2 = d²/2,    k3 = e^{−d} − 1 + d.

    k1 and k3 are unbiased (k3 is never negative), k2 is biased with little variance.  As *losses*, on samples
    that do not themselves depend on π, their gradients differ: k1's is zero in expectation, k2's is that of
    the KL itself, k3's that of the forward KL(π_ref ‖ π); see :func:`kl_loss`.
    ``e^{−d}`` continues linearly above ``−d = bound``.

    Source: J. Schulman, "Approximating KL divergence" (2020).
    """
    d = logps - reference_logps
    if estimator == "k1":
        return d
    if estimator == "k2":
        return 0.5 * d**2
    if estimator == "k3":
        return bounded_exp(-d, bound) - 1.0 + d
    raise ValueError(f"unknown KL estimator {estimator!r}; choose one of {', '.join(KL_ESTIMATORS)}")


def kl_loss(
    logps: Array, reference_logps: Array, ratio: Array, *, value: str, gradient: str, importance: bool
) -> Array:
    """A KL term to be differentiated, whose number is one estimator and whose gradient is another's.

    Args:
        logps, reference_logps: ``[...]``; gradients pass through the first only.
        ratio: ``[...]``, π/π_old of the sampled token, used with ``importance``.
        value: the estimator reported.
        gradient: the estimator differentiated.
        importance: weights the gradient by the ratio, which makes it exact in expectation also after π has
            moved away from the policy that sampled.  k1 and k3 are differentiated together with the ratio
            (∇E_π[k] = E_old[∇(ρk)], as DeepSeek-V3.2 does), k2 with the ratio held fixed, because only
            its plain gradient is that of the KL.

    Returns: ``[...]``.
    """
    reference_logps = jax.lax.stop_gradient(reference_logps)
    number = kl_estimate(logps, reference_logps, value)
    slope = kl_estimate(logps, reference_logps, gradient)
    if importance:
        slope = slope * (jax.lax.stop_gradient(ratio) if gradient == "k2" else ratio)
    return jax.lax.stop_gradient(number - slope) + slope


def head(outputs: Outputs, name: str, objective: str) -> Any:
    """``outputs.<name>``.  Raises ValueError where the model was built without that head."""
    found = getattr(outputs, name)
    if found is None:
        kind = {"lm": "lm", "logits": "lm", "rewards": "reward", "values": "value"}[name]
        raise ValueError(
            f"{objective} reads Outputs.{name}, but the model has no {kind!r} head: add {kind!r} to the model's heads"
        )
    return found


def check_choice(objective: object, field: str, choices: tuple) -> None:
    found = getattr(objective, field)
    if found not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{type(objective).__name__}.{field} is {found!r}; choose one of {listed}")


def check_range(
    objective: object, field: str, low: float, high: float = float("inf"), *, open_low: bool = False
) -> None:
    """Raises ValueError unless ``low <= field < high`` (``low < field`` with ``open_low``), as for NaN."""
    found = getattr(objective, field)
    number = isinstance(found, (int, float)) and not isinstance(found, bool)
    if not (number and (low < found if open_low else low <= found) and found < high):
        wanted = f"a number {'above' if open_low else 'of at least'} {low:g}"
        wanted += "" if high == float("inf") else f" and below {high:g}"
        raise ValueError(f"{type(objective).__name__}.{field} is {found!r}; give it {wanted}")
