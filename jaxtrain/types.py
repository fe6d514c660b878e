"""The records that every part of jaxtrain exchanges: pytrees of arrays, and the Protocols that use them.

Axes: B rows, T token positions, V vocabulary, D model width.  Arrays are global ``jax.Array``s (or
NumPy arrays on their way to a device).  Nothing here imports the rest of jaxtrain.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax

Array = Any  # jax.Array, numpy.ndarray, or a tracer of one
Params = dict[str, Any]  # a plain nested dict of arrays


def record(cls):
    """Makes ``cls`` a frozen, keyword-only dataclass that JAX treats as a pytree of its fields."""
    cls = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
    names = [field.name for field in dataclasses.fields(cls)]
    return jax.tree_util.register_dataclass(cls, data_fields=names, meta_fields=[])


def path_name(path: Sequence[Any]) -> str:
    """``layers/attention/query/kernel`` for a key path of ``jax.tree_util``."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


@record
class Tokens:
    """Rows of tokens, already shifted and weighted by the data pipeline.  Every field is ``[B, T]``.

    ids: int32, what the model reads.
    targets: int32, what position t should predict (the next id of the same segment).
    weights: float32, the loss weight of predicting ``targets[t]`` from position t; 0 where there is
        nothing to learn (prompts, padding, a segment's last position).
    positions: int32, position within the segment, from 0.
    segments: int32, from 1 within each row; 0 marks padding.  A token sees only its own segment.
    """

    ids: Array
    targets: Array
    weights: Array
    positions: Array
    segments: Array


@record
class Pairs:
    """Preference pairs; row i of ``chosen`` and of ``rejected`` answer the same prompt.

    Weights mark completion tokens.  ``weight`` counts pairs (0 for a padding row).
    All but the two Tokens are float32 ``[B]``.

    reference_chosen, reference_rejected: the reference policy's log-probability, summed over the completion;
        zeros where no reference is used (the reward model).
    margin: how much better ``chosen`` was judged to be; 0 where unknown.
    """

    chosen: Tokens
    rejected: Tokens
    reference_chosen: Array
    reference_rejected: Array
    margin: Array
    weight: Array


@record
class Rollout:
    """Sampled completions with all that a policy-gradient update reads.  Fields but ``tokens`` are float32 ``[B, T]``.

    All are aligned with ``tokens.targets``: entry t is about the action ``targets[t]`` taken at position t,
    and ``tokens.weights`` is 1 on sampled tokens that are trained.

    old_logps: of the policy that made the rollout, recomputed by the trainer at the sampling temperature.
    reference_logps: of the frozen reference policy, at the same temperature.
    advantages, returns: after whitening, and before it.
    old_values: the critic's, when the rollout was made.
    """

    tokens: Tokens
    old_logps: Array
    reference_logps: Array
    advantages: Array
    returns: Array
    old_values: Array


class Sum(NamedTuple):
    """A weighted sum and its weight, both float32 scalars: a mean that has not been divided yet."""

    total: Array
    weight: Array


@record
class Loss:
    """What an objective returns: sums, never means.

    total: float32 scalar, the weighted sum of losses; this is what is differentiated.
    weight: float32 scalar, the sum of weights, without gradient.
    metrics: name -> Sum, each with its own weight.
    """

    total: Array
    weight: Array
    metrics: Mapping[str, Sum]


@record
class Outputs:
    """What a model returns.  Absent heads are None.

    hidden: ``[B, T, D]`` after the final norm, in the compute dtype.
    logits: float32 ``[B, T, V]``.
    rewards: float32 ``[B, T]``, the scalar reward head read at each position.
    values: float32 ``[B, T]``, the value head.
    cache: the updated key-value cache, when one was given.
    """

    hidden: Array
    logits: Array | None = None
    rewards: Array | None = None
    values: Array | None = None
    cache: Any = None


@record
class TrainState:
    """Everything a training run changes, arrays only.

    step: int32, updates attempted.  skipped: int32, those of them refused for NaN or Inf.
    streak: int32, how many were refused in a row up to now.  rng: the run's key, folded with ``step`` for each use.
    """

    step: Array
    skipped: Array
    streak: Array
    params: Params
    opt_state: Any
    rng: Array


class Apply(Protocol):
    """A model's forward pass.  ``rng`` turns dropout on; without it the pass is deterministic."""

    def __call__(self, params: Params, tokens: Tokens, *, cache: Any = None, rng: Array | None = None) -> Outputs: ...


class Objective(Protocol):
    """A pure function of a model and a batch: the whole difference between one stage and another."""

    def __call__(self, apply: Apply, params: Params, batch: Any, rng: Array) -> Loss: ...
