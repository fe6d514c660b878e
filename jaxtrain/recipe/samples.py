"""What a model writes: greedy completions, and the likeliest next tokens."""

from __future__ import annotations

from typing import Any

from jax.sharding import Mesh

from jaxtrain.config import Samples
from jaxtrain.data.chat import prompt_ids
from jaxtrain.data.tokenizer_base import TextTokenizer
from jaxtrain.generate.sampling import Sampling
from jaxtrain.generate.text import generate_text
from jaxtrain.models import Model
from jaxtrain.types import Params


def take_samples(
    stage: str, model: Model, params: Params, tokenizer: TextTokenizer, samples: Samples, *, chat: bool, mesh: Mesh
) -> dict[str, Any]:
    """The record of ``samples.json``.  chat: wrap prompts as turns; otherwise the model continues their text.

    mesh: where the parameters live.
    """

    def encode(text: str) -> list[int]:
        return prompt_ids(tokenizer, text).tolist() if chat else tokenizer.text_ids(text)

    shown: list[dict[str, Any]] = []
    if samples.prompts:
        completions, _ = generate_text(
            model,
            params,
            tokenizer,
            list(samples.prompts),
            sampling=Sampling(temperature=0.0, stop_ids=tokenizer.stop_ids),
            max_new_tokens=samples.max_new_tokens,
            encode=encode,
            mesh=mesh,
        )
        shown = [{"prompt": p, "completion": c.text} for p, c in zip(samples.prompts, completions, strict=True)]
    likely: list[dict[str, Any]] = []
    if samples.next_token_prompts:
        completions, _ = generate_text(
            model,
            params,
            tokenizer,
            list(samples.next_token_prompts),
            sampling=Sampling(temperature=0.0),
            max_new_tokens=1,
            encode=tokenizer.text_ids,
            top=samples.top,
            mesh=mesh,
        )
        for text, completion in zip(samples.next_token_prompts, completions, strict=True):
            pairs = [[piece, probability] for piece, _, probability in completion.steps[0].top]
            likely.append({"prompt": text, "tokens": pairs})
    return {"stage": stage, "samples": shown, "next_tokens": likely}
