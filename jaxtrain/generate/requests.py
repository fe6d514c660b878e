"""What is asked of an engine, what it answers, what it counts, and the sizes it computes with."""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Written:
    """What was written after one prompt.

    ids: int32 ``[n]``, the stop token included.  stopped: whether the last of them is one; else the limit was met.
    logps: float32 ``[n]``, under the distribution sampled from.
    probs: float32 ``[n]``, top_ids, top_probs: ``[n, N]``: the model's own, at temperature 1 with nothing excluded;
        None where they were not asked for.
    """

    ids: np.ndarray
    logps: np.ndarray
    stopped: bool
    probs: np.ndarray | None = None
    top_ids: np.ndarray | None = None
    top_probs: np.ndarray | None = None


@dataclasses.dataclass
class Stats:
    """Counts and seconds since an engine was made.

    prompt_tokens: read, without padding, in ``prefills`` calls.  tokens: sampled, in ``decode_steps`` of all slots.
    Seconds of compiling (``compile_seconds``, of ``compilations``) count as neither reading nor writing.
    """

    prompt_tokens: int = 0
    prefills: int = 0
    prefill_seconds: float = 0.0
    tokens: int = 0
    decode_steps: int = 0
    decode_seconds: float = 0.0
    compilations: int = 0
    compile_seconds: float = 0.0

    @property
    def seconds(self) -> float:
        return self.prefill_seconds + self.decode_seconds

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / max(self.seconds, 1e-9)


def bucket(size: int, most: int) -> int:
    """The smallest of 16, 24, 32, 48, 64, 96, ... that is at least ``size``; ``most`` where that is smaller."""
    power = 16
    while power < size:
        power *= 2
    between = power // 4 * 3
    return min(between if power > 16 and between >= size else power, most)


def batch_bucket(rows: int, unit: int, most: int) -> int:
    """The smallest of unit, 2 unit, 4 unit, ... that is at least ``rows``; ``most`` where that is smaller."""
    size = unit
    while size < rows:
        size *= 2
    return min(size, most)


class Request:
    """A prompt, and what has been written after it."""

    def __init__(self, number: int, prompt: np.ndarray, limit: int, key: np.ndarray):
        self.number, self.prompt, self.limit, self.key = number, prompt, limit, key
        self.parts: list[dict[str, np.ndarray]] = []
        self.count, self.stopped = 0, False

    @property
    def done(self) -> bool:
        return self.stopped or self.count == self.limit

    def take(self, sampled: dict[str, np.ndarray], stop_ids: tuple[int, ...]) -> np.ndarray:
        """Adds ``sampled`` (by field, ``[n, *]``) up to its end.  Returns the ids that were added."""
        ends = np.flatnonzero(np.isin(sampled["ids"][: self.limit - self.count], stop_ids))
        size = int(ends[0]) + 1 if len(ends) else min(len(sampled["ids"]), self.limit - self.count)
        self.stopped = bool(len(ends))
        self.parts.append({name: values[:size] for name, values in sampled.items()})
        self.count += size
        return self.parts[-1]["ids"]

    def written(self) -> Written:
        joined = {name: np.concatenate([part[name] for part in self.parts]) for name in self.parts[0]}
        return Written(**joined, stopped=self.stopped)
