"""The records that every part of jaxtrain exchanges: pytrees of arrays, and the Protocols that use them.

Axes: B rows, T token positions, V vocabulary, D model width.  Arrays are global ``jax.Array``s (or
NumPy arrays on their way to a device).  Nothing here imports the rest of jaxtrain.
"""

from __future__ import annotations

import dataclasses
import functools
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
    types: int32, which of a pair's two texts a token belongs to (BERT's token types); None: all of them are 0.
    """

    ids: Array
    targets: Array
    weights: Array
    positions: Array
    segments: Array
    types: Array | None = None


@record
class Seq2Seq:
    """What an encoder-decoder reads: the decoder's segment i sees the encoder's segment i.

    encoder: the source, all of it visible to every token of its segment; its targets and weights are not read.  None
        where a cache already holds what the decoder needs of it.
    decoder: the target, shifted like any ``Tokens``: ``ids`` begin with the model's start token.
    """

    encoder: Tokens | None
    decoder: Tokens


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
    counts: what the train step adds of ``Auxiliary.counts``; an objective leaves it None.
    """

    total: Array
    weight: Array
    metrics: Mapping[str, Sum]
    counts: Mapping[str, Array] | None = None


@record
class Auxiliary:
    """What training adds to any objective that calls the model, see ``train.step.loss_and_grads``.

    losses: name -> Sum of a loss with its coefficient in it; the mean is added to the objective's, for all its weight.
    metrics: name -> Sum, without gradient.
    counts: float32 ``[L, E]`` by the path of a stack of layers among the parameters: tokens that picked each expert of
        each layer, for ``Model.balance``.
    """

    losses: Mapping[str, Sum]
    metrics: Mapping[str, Sum]
    counts: Mapping[str, Array]


@record
class Outputs:
    """What a model returns.  Absent heads are None.

    hidden: ``[B, T, D]`` after the final norm, in the compute dtype.
    lm: what next-token logits are made of (``models.heads.LazyLogits``), or the logits themselves, ``[B, T, V]``.
        Objectives read it with ``objectives.common.token_logps`` or ``score``, which never hold all of the former.
    logits: not a field: float32 ``[B, T, V]``, computed from ``lm`` whenever it is read; ``Outputs(logits=…)`` sets
        ``lm``.
    rewards: float32 ``[B, T]``, the scalar reward head read at each position.
    values: float32 ``[B, T]``, the value head.
    cache: the updated key-value cache, when one was given.
    pooled: ``[B, T, D]``, BERT's pooler read at each position; that of a segment's first token stands for the segment.
    next_sentence: float32 ``[B, T, 2]``, logits of "the second text follows the first" and of "it does not", likewise.
    replaced: float32 ``[B, T]``, the logit of "this token is not the original one" (ELECTRA's discriminator).
    auxiliary: of mixtures of experts and multi-token prediction; read by the train step alone.
    encoded: ``[B, S, D]``, an encoder-decoder's encoder after its last norm; ``hidden`` is then the decoder's.
    """

    hidden: Array
    lm: Any = None
    rewards: Array | None = None
    values: Array | None = None
    cache: Any = None
    pooled: Array | None = None
    next_sentence: Array | None = None
    replaced: Array | None = None
    encoded: Array | None = None
    auxiliary: Auxiliary | None = None

    @property
    def logits(self) -> Array | None:
        return self.lm.dense() if hasattr(self.lm, "dense") else self.lm


def _with_logits(init):
    """Lets a model that has logits at hand say so, by ``Outputs(logits=…)`` or ``dataclasses.replace``."""

    @functools.wraps(init)
    def wrapped(self, **fields: Any) -> None:
        if "logits" in fields:
            fields["lm"] = fields.pop("logits")
        init(self, **fields)

    return wrapped


Outputs.__init__ = _with_logits(Outputs.__init__)


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
    """A model's forward pass.  ``rng`` turns dropout on; without it the pass is deterministic.

    Encoder-decoders read a ``Seq2Seq`` where the others read ``Tokens``.
    """

    def __call__(self, params: Params, tokens: Tokens, *, cache: Any = None, rng: Array | None = None) -> Outputs: ...


class Objective(Protocol):
    """A pure function of a model and a batch: the whole difference between one stage and another."""

    def __call__(self, apply: Apply, params: Params, batch: Any, rng: Array) -> Loss: ...
