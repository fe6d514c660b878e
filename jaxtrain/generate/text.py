"""From a prompt's text to a completion's text."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxtrain.generate.decode import Generated, make_generator
from jaxtrain.generate.sampling import Sampling
from jaxtrain.types import Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion:
    """One prompt's completion.

    text: decoded, without the stop token.  ids: the sampled ids, the stop token included.
    stopped: whether it ended with a stop id rather than at ``max_new_tokens``.
    """

    text: str
    ids: tuple[int, ...]
    stopped: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateStats:
    """tokens: sampled in all.  seconds: wall time, compilation left out.  compile_seconds: that alone."""

    tokens: int
    seconds: float
    compile_seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / max(self.seconds, 1e-9)


def left_pad(prompts: Sequence[Sequence[int]], width: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Prompts as one array.

    Returns ids int32 ``[B, max(width, the longest prompt)]``, padded on the left with 0, and lengths int32
    ``[B]``.
    Raises ValueError for an empty prompt: there would be nothing to predict the first token from.
    """
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    if len(prompts) == 0 or not lengths.all():
        where = f"prompt {int(np.argmin(lengths))} has no tokens" if len(prompts) else "no prompts"
        raise ValueError(f"{where}: give every prompt at least one token")
    ids = np.zeros((len(prompts), max(width, int(lengths.max()))), np.int32)
    for row, prompt in zip(ids, prompts, strict=True):
        row[len(row) - len(prompt) :] = prompt
    return ids, lengths


def completion_ids(generated: Generated) -> list[list[int]]:
    """The sampled ids of every row, the stop token included, without what follows the end."""
    ids, lengths = np.asarray(generated.ids), np.asarray(generated.lengths)
    return [row[:length].tolist() for row, length in zip(ids, lengths, strict=True)]


def generate_text(
    model: Any,
    params: Params,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    sampling: Sampling,
    max_new_tokens: int,
    seed: int = 0,
    encode: Callable[[str], Sequence[int]] | None = None,
) -> tuple[list[Completion], GenerateStats]:
    """Completes every prompt, in one batch.

    tokenizer: has ``encode(text) -> ids``, ``decode(ids) -> text`` and ``vocab_size``.
    encode: how a prompt becomes ids, where that is more than the tokenizer's encoding (a chat's turns, a
        first ``<bos>``); by default ``tokenizer.encode``.

    Raises ValueError for an empty prompt, for ids beyond the model's vocabulary, and for prompts that leave
    fewer than ``max_new_tokens`` of the model's positions.
    """
    rows = [list((encode or tokenizer.encode)(prompt)) for prompt in prompts]
    for prompt, row in zip(prompts, rows, strict=True):
        if row and max(row) >= model.config.vocab_size:
            raise ValueError(
                f"the prompt {prompt!r} has the id {max(row)}, beyond the model's vocabulary of"
                f" {model.config.vocab_size}: tokenizer and model do not belong together"
            )
    ids, lengths = left_pad(rows)
    generate = make_generator(model, sampling, max_new_tokens)
    key = jax.random.key(seed)
    start = time.perf_counter()
    compiled = generate.lower(params, ids, lengths, key).compile()
    middle = time.perf_counter()
    generated = jax.block_until_ready(compiled(params, ids, lengths, key))
    end = time.perf_counter()

    completions = []
    for row, stopped in zip(completion_ids(generated), np.asarray(generated.stopped), strict=True):
        shown = row[:-1] if stopped else row
        completions.append(Completion(text=tokenizer.decode(shown), ids=tuple(row), stopped=bool(stopped)))
    stats = GenerateStats(
        tokens=int(np.asarray(generated.lengths).sum()), seconds=end - middle, compile_seconds=middle - start
    )
    return completions, stats
