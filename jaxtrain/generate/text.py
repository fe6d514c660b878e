"""From prompts' texts to completions' texts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from jax.sharding import Mesh

from jaxtrain.generate.engine import Engine, sequence_keys
from jaxtrain.generate.requests import Stats, Written
from jaxtrain.generate.sampling import Sampling
from jaxtrain.types import Params

BAR = 24  # characters of a probability of 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """One sampled token and what was likely in its place: the model's probabilities at temperature 1, nothing excluded.

    piece: what the id stands for, for display.  top: (piece, id, probability) of the likeliest, likeliest first.
    """

    id: int
    piece: str
    probability: float
    top: tuple[tuple[str, int, float], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion:
    """One prompt's completion.

    text: decoded, without the stop token.  ids: the sampled ids, the stop token included.
    logps: of each id, under the distribution it was sampled from.
    stopped: whether it ended with a stop id rather than at ``max_new_tokens``.
    steps: one a token, where the likeliest were asked for.
    """

    text: str
    ids: tuple[int, ...]
    logps: tuple[float, ...]
    stopped: bool
    steps: tuple[Step, ...] = ()


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
    top: int = 0,
    int8: bool = False,
    slots: int = 32,
    mesh: Mesh | None = None,
) -> tuple[list[Completion], Stats]:
    """Completes every prompt; number i with the seed ``seed + i``, whatever the others are.

    tokenizer: a ``TextTokenizer``.  encode: how a prompt becomes ids, where that is more than the tokenizer's encoding
        (a chat's turns, a first ``<bos>``); by default ``tokenizer.encode``.
    top: how many of the likeliest tokens to report of every step.  int8, slots, mesh: as in ``Engine``.

    Raises ValueError for an empty prompt, for ids beyond the model's vocabulary, and for prompts that leave
    fewer than ``max_new_tokens`` of the model's positions.
    """
    engine = Engine(model, sampling, slots=min(slots, max(len(prompts), 1)), top=top, int8=int8, mesh=mesh)
    rows = [list((encode or tokenizer.encode)(prompt)) for prompt in prompts]
    for number, row in enumerate(rows):
        engine.check(row, max_new_tokens, f"prompt {number} ({_shorten(prompts[number])!r})")
    keys = sequence_keys([seed + number for number in range(len(rows))])
    written = engine.generate(engine.prepare(params), rows, max_new_tokens=max_new_tokens, keys=keys)
    return [completion(tokenizer, one) for one in written], engine.stats


def completion(tokenizer: Any, written: Written) -> Completion:
    """What was written, as text."""
    ids = written.ids.tolist()
    steps = ()
    if written.top_ids is not None:
        fields = (written.ids, written.probs, written.top_ids, written.top_probs)
        steps = tuple(
            Step(
                id=int(i),
                piece=tokenizer.piece(int(i)),
                probability=float(p),
                top=tuple((tokenizer.piece(int(j)), int(j), float(q)) for j, q in zip(top, likely, strict=True)),
            )
            for i, p, top, likely in zip(*fields, strict=True)
        )
    return Completion(
        text=tokenizer.decode(ids[:-1] if written.stopped else ids),
        ids=tuple(ids),
        logps=tuple(written.logps.tolist()),
        stopped=written.stopped,
        steps=steps,
    )


def draw_steps(steps: Sequence[Step]) -> str:
    """Every step as a table: the sampled token, then the likeliest with a bar as long as they are likely."""
    width = max((len(repr(piece)) for step in steps for piece, _, _ in step.top), default=0)
    lines = []
    for number, step in enumerate(steps, start=1):
        lines.append(f"{number:4d}  {step.piece!r} {_percent(step.probability).strip()}")
        for piece, i, probability in step.top:
            mark = ">" if i == step.id else " "
            lines.append(f"    {mark} {piece!r:{width}} {_percent(probability)} {_bar(probability)}".rstrip())
    return "\n".join(lines)


def _percent(probability: float) -> str:
    return f"{100 * probability:6.2f}%"


def _bar(probability: float) -> str:
    """In eighths of a character."""
    eighths = round(probability * BAR * 8)
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def _shorten(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:37]}..."
