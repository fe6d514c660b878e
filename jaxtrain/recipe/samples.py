"""What a model writes: greedy completions, and the likeliest next tokens."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from jaxtrain.config import Samples
from jaxtrain.data.chat import prompt_ids
from jaxtrain.data.tokenizer import Tokenizer
from jaxtrain.generate.sampling import Sampling
from jaxtrain.generate.text import generate_text
from jaxtrain.models import Model
from jaxtrain.types import Params, Tokens


def next_tokens(model: Model, params: Params, rows: list[list[int]], top: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each row of ids, the ``top`` likeliest next ids and their probabilities, likeliest first."""
    width = max(map(len, rows))
    ids = np.zeros((len(rows), width), np.int32)
    for row, values in zip(ids, rows, strict=True):
        row[: len(values)] = values
    lengths = np.array([len(row) for row in rows], np.int32)
    positions = np.arange(width, dtype=np.int32)
    segments = (positions < lengths[:, None]).astype(np.int32)
    tokens = Tokens(
        ids=ids, targets=ids, weights=np.zeros(ids.shape, np.float32), positions=positions * segments, segments=segments
    )
    logits = np.asarray(jax.jit(lambda p, t: model.apply(p, t).logits)(params, tokens))
    last = logits[np.arange(len(rows)), lengths - 1].astype(np.float64)
    probs = np.exp(last - last.max(axis=-1, keepdims=True))
    probs /= probs.sum(axis=-1, keepdims=True)
    order = np.argsort(-probs, axis=-1, kind="stable")[:, :top]
    return [(ids, p[ids]) for ids, p in zip(order, probs, strict=True)]


def take_samples(
    stage: str, model: Model, params: Params, tokenizer: Tokenizer, samples: Samples, *, chat: bool
) -> dict[str, Any]:
    """The record of ``samples.json``.  chat: wrap prompts as turns; otherwise the model continues their text."""

    def encode(text: str) -> list[int]:
        return prompt_ids(tokenizer, text).tolist() if chat else [tokenizer.bos_id, *tokenizer.encode(text)]

    shown: list[dict[str, Any]] = []
    if samples.prompts:
        completions, _ = generate_text(
            model,
            params,
            tokenizer,
            list(samples.prompts),
            sampling=Sampling(temperature=0.0, stop_ids=(tokenizer.end_id, tokenizer.eos_id)),
            max_new_tokens=samples.max_new_tokens,
            encode=encode,
        )
        shown = [{"prompt": p, "completion": c.text} for p, c in zip(samples.prompts, completions, strict=True)]
    likely: list[dict[str, Any]] = []
    if samples.next_token_prompts:
        rows = [[tokenizer.bos_id, *tokenizer.encode(text)] for text in samples.next_token_prompts]
        for text, (ids, probs) in zip(
            samples.next_token_prompts, next_tokens(model, params, rows, samples.top), strict=True
        ):
            pairs = [[tokenizer.piece(int(i)), float(p)] for i, p in zip(ids, probs, strict=True)]
            likely.append({"prompt": text, "tokens": pairs})
    return {"stage": stage, "samples": shown, "next_tokens": likely}
