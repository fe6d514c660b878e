"""What a completion is worth: rules written in Python, and a trained reward model.

A reward is called as ``reward(prompts, completions, completion_ids, rows)`` and returns one number a
completion, or None where it does not apply.  The four lists have one entry a completion:

prompts, completions: decoded text, without control tokens.
completion_ids: the sampled ids, the stop token included.
rows: the other columns of the prompt's row, and always ``prompt_ids`` (list of int) and ``stopped`` (bool:
    the completion ended with a stop token and was not cut off).

Several processes each call a reward with their share of the completions, so that one's number must not depend on the
others.  Only a reward with a true attribute ``collective``, which computes on the devices of all processes, is called
with all completions in each.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.distributed import fetch, gather, share
from jaxtrain.types import Params, Tokens


class Reward(Protocol):
    """See the module's docstring."""

    def __call__(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        rows: Sequence[Mapping[str, Any]],
    ) -> Sequence[float | None]: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class LengthReward:
    """0 for a length between ``minimum`` and ``maximum``, falling to -1 over ``ramp`` tokens outside.

    Lengths are in tokens, the stop token included.  ``minimum=0, maximum=L - c, ramp=c`` is DAPO's soft
    overlong penalty for a limit L and a cache c (2503.14476, equation 13).
    """

    minimum: int = 0
    maximum: int
    ramp: int = 1

    def __post_init__(self):
        if not 0 <= self.minimum <= self.maximum:
            raise ValueError(f"LengthReward needs 0 <= minimum <= maximum; got {self.minimum} and {self.maximum}")
        if self.ramp < 1:
            raise ValueError(f"LengthReward.ramp must be at least 1 token; got {self.ramp}")

    def __call__(self, prompts, completions, completion_ids, rows) -> list[float | None]:
        def score(length: int) -> float:
            outside = max(self.minimum - length, length - self.maximum, 0)
            return -min(outside / self.ramp, 1.0)

        return [score(len(ids)) for ids in completion_ids]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FormatReward:
    """How much a completion looks like one sentence on one line: the share of six criteria that it meets.

    It stopped by itself; it is one line; it starts with a capital letter; it ends with a full stop; it has
    between ``min_words`` and ``max_words`` words; no word directly follows itself, whatever its case.
    """

    min_words: int = 3
    max_words: int = 20

    def __post_init__(self):
        if not 1 <= self.min_words <= self.max_words:
            raise ValueError(
                f"FormatReward needs 1 <= min_words <= max_words; got {self.min_words} and {self.max_words}"
            )

    def criteria(self, completion: str, stopped: bool) -> dict[str, bool]:
        """Which criteria the completion meets."""
        text = completion.strip()
        words = re.findall(r"\w+", text.lower())
        return {
            "stopped": stopped,
            "one_line": bool(text) and len(text.splitlines()) == 1,
            "capital": text[:1].isupper(),
            "full_stop": text.endswith("."),
            "words": self.min_words <= len(words) <= self.max_words,
            "no_repetition": bool(words) and all(a != b for a, b in itertools.pairwise(words)),
        }

    def __call__(self, prompts, completions, completion_ids, rows) -> list[float | None]:
        met = [self.criteria(completion, row["stopped"]) for completion, row in zip(completions, rows, strict=True)]
        return [sum(criteria.values()) / len(criteria) for criteria in met]


@partial(jax.jit, static_argnames="apply")
def scores_at(apply, params: Params, tokens: Tokens, last: jax.Array) -> jax.Array:
    """The reward head's float32 ``[B]`` at position ``last [B]`` of each row."""
    rewards = apply(params, tokens).rewards
    return jnp.take_along_axis(rewards, last[:, None], axis=1)[:, 0]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ModelReward:
    """A trained reward model's score of exactly the ids of prompt and completion, read at the last of them.

    score = gain * (raw - shift): ``normalised`` sets both so that the samples of the policy that RL starts
    from score 0 on average with standard deviation 1 (Ziegler et al., 1909.08593, section 2).  A completion
    that was cut off is scored as it is, at its last token.

    model: with a reward head.  params: its parameters.
    length: tokens a row, the longest prompt and completion together.  batch_size: rows a forward pass.
    place: puts a batch of NumPy arrays on the devices.
    """

    model: Any
    params: Params
    length: int
    batch_size: int
    shift: float = 0.0
    gain: float = 1.0
    name: str = "model"
    collective: ClassVar[bool] = True
    place: Callable[[Any], Any] = lambda batch: batch

    def __post_init__(self):
        if self.length > self.model.config.max_positions:
            raise ValueError(
                f"prompts and completions of up to {self.length} tokens are longer than the reward model's"
                f" max_positions={self.model.config.max_positions}; shorten them"
            )
        if "reward" not in self.model.config.heads:
            raise ValueError(f"the reward model has the heads {self.model.config.heads}: no 'reward' among them")

    def raw(self, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]]) -> np.ndarray:
        """The scores before shift and gain, float32 ``[B]``."""
        rows = [[*prompt, *ids] for prompt, ids in zip(prompt_ids, completion_ids, strict=True)]
        for i, row in enumerate(rows):
            if not 0 < len(row) <= self.length:
                raise ValueError(
                    f"row {i} has {len(row)} tokens of prompt and completion; the reward model reads 1 to {self.length}"
                )
        scores = []
        for start in range(0, len(rows), self.batch_size):
            chunk = rows[start : start + self.batch_size]
            ids = np.zeros((self.batch_size, self.length), np.int32)
            lengths = np.ones((self.batch_size,), np.int32)
            for i, row in enumerate(chunk):
                ids[i, : len(row)], lengths[i] = row, len(row)
            positions = np.arange(self.length, dtype=np.int32)
            segments = (positions < lengths[:, None]).astype(np.int32)
            tokens = Tokens(
                ids=ids,
                targets=np.zeros_like(ids),
                weights=np.zeros(ids.shape, np.float32),
                positions=positions * segments,
                segments=segments,
            )
            tokens, last = self.place((tokens, lengths - 1))
            scores.append(fetch(scores_at(self.model.apply, self.params, tokens, last))[: len(chunk)])
        return np.concatenate(scores).astype(np.float32)

    def normalised(self, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]]) -> ModelReward:
        """The same reward with shift and gain such that these completions have mean 0 and deviation 1.

        Raises ValueError if their scores are not finite or do not differ.
        """
        raw = self.raw(prompt_ids, completion_ids).astype(np.float64)
        mean, deviation = float(raw.mean()), float(raw.std())
        if not (math.isfinite(mean) and deviation > 1e-6):
            raise ValueError(
                f"cannot normalise the reward model: its scores of {len(raw)} samples have mean {mean} and"
                f" standard deviation {deviation}; it needs finite scores that differ. Is it trained, and"
                " are there enough samples?"
            )
        return dataclasses.replace(self, shift=mean, gain=1 / deviation)

    def __call__(self, prompts, completions, completion_ids, rows) -> list[float | None]:
        raw = self.raw([row["prompt_ids"] for row in rows], completion_ids)
        return [self.gain * (float(score) - self.shift) for score in raw]


def reward_names(rewards: Sequence[Reward]) -> list[str]:
    """A distinct name for each: its ``name`` or its function's or class's, numbered where they repeat."""
    names: list[str] = []
    for reward in rewards:
        base = getattr(reward, "name", None) or getattr(reward, "__name__", None) or type(reward).__name__
        taken = sum(name == base or name.startswith(f"{base}_") for name in names)
        names.append(f"{base}_{taken + 1}" if taken else base)
    return names


def score_completions(
    rewards: Sequence[Reward],
    weights: Sequence[float],
    prompts: Sequence[str],
    completions: Sequence[str],
    completion_ids: Sequence[Sequence[int]],
    rows: Sequence[Mapping[str, Any]],
) -> tuple[np.ndarray, np.ndarray, dict[str, float]]:
    """The weighted sum of the rewards that apply to each completion.

    Returns scores, float32 ``[B]``; applicable, bool ``[B]``: False where no reward applies (the score is
    then 0 and the row must not be trained on); and metrics, ``rewards/<name>/mean`` and ``/std`` over the
    completions the reward applies to, before its weight.

    Raises ValueError, naming the reward, for a wrong number of scores and for one that is not finite.
    """
    if len(rewards) != len(weights) or not rewards:
        raise ValueError(f"give one weight for each reward and at least one; got {len(rewards)} and {len(weights)}")
    total = np.zeros(len(completions), np.float64)
    applicable = np.zeros(len(completions), bool)
    metrics: dict[str, float] = {}
    columns = (prompts, completions, completion_ids, rows)
    for name, reward, weight in zip(reward_names(rewards), rewards, weights, strict=True):
        if getattr(reward, "collective", False):
            scores = _checked_scores(name, reward, columns, 0)
        else:
            own = share(len(completions))
            part = _checked_scores(name, reward, tuple(column[own] for column in columns), own.start)
            scores = gather(part, len(completions))
        valid = ~np.isnan(scores)
        total[valid] += weight * scores[valid]
        applicable |= valid
        if valid.any():
            metrics[f"rewards/{name}/mean"] = float(np.mean(scores[valid]))
            metrics[f"rewards/{name}/std"] = float(np.std(scores[valid]))
    return total.astype(np.float32), applicable, metrics


def _checked_scores(name: str, reward: Reward, columns: tuple[Sequence[Any], ...], first: int) -> np.ndarray:
    """The reward's scores of some rows, float64 with NaN for None; ``first`` is the number of the first of them."""
    completions = columns[1]
    if not len(completions):
        return np.zeros(0)
    scores = list(reward(*columns))
    if len(scores) != len(completions):
        raise ValueError(
            f"the reward {name} returned {len(scores)} scores for {len(completions)} completions; it"
            " must return one for each (None where it does not apply)"
        )
    numbers = np.full(len(scores), np.nan)
    for i, score in enumerate(scores):
        if score is None:
            continue
        try:
            number = float(score)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise ValueError(
                f"the reward {name} returned {score!r} for row {first + i}; a score must be a finite number, or"
                f" None where the reward does not apply. The completion: {completions[i]!r}"
            )
        numbers[i] = number
    return numbers
