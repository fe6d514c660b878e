"""How a turn of conversation is written in ids.

    <bos> <|user|> prompt <|end|> <|assistant|> completion <|end|>

Prompt and completion are tokenized apart and joined as ids, so no merge can cross the seam: the prompt's ids
are always a prefix of the conversation's, and the mask is exact by construction.
"""

from __future__ import annotations

import numpy as np

from jaxtrain.data.tokenizer import Tokenizer


def wrap_prompt(tokenizer: Tokenizer, text_ids: list[int]) -> list[int]:
    """The ids before the completion, given those of the prompt's text."""
    head = [tokenizer.bos_id, tokenizer.user_id]
    return [*head, *text_ids, tokenizer.end_id, tokenizer.assistant_id]


def wrap(tokenizer: Tokenizer, prompt_ids: list[int], completion_ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Ids ``[n]`` int32 and mask ``[n]`` bool of a conversation, given the ids of its two texts."""
    before = wrap_prompt(tokenizer, prompt_ids)
    trained = [*completion_ids, tokenizer.end_id]
    mask = np.zeros(len(before) + len(trained), np.bool_)
    mask[len(before) :] = True
    return np.array([*before, *trained], np.int32), mask


def prompt_ids(tokenizer: Tokenizer, prompt: str) -> np.ndarray:
    """int32 ``[n]``: what the model reads before it answers ``prompt``."""
    return np.array(wrap_prompt(tokenizer, tokenizer.encode(prompt)), np.int32)


def conversation(tokenizer: Tokenizer, prompt: str, completion: str) -> tuple[np.ndarray, np.ndarray]:
    """Ids ``[n]`` int32; mask ``[n]`` bool, True on the completion's ids and on the closing ``<|end|>``."""
    return wrap(tokenizer, tokenizer.encode(prompt), tokenizer.encode(completion))
