"""How a conversation is written in ids.

Our own tokenizer writes turns with marker ids:

    <bos> <|user|> prompt <|end|> <|assistant|> completion <|end|>

Others write what their chat template renders.  Either way the ids of the prompt are a prefix of the
conversation's, so the mask of what is trained is exact; and no text becomes a control id by spelling it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np

from jaxtrain.data.tokenizer import Tokenizer
from jaxtrain.data.tokenizer_base import TextTokenizer

Message = Mapping[str, str]
Example = tuple[np.ndarray, np.ndarray]  # ids [n] int32, mask [n] bool: True where an id is trained

# Noncharacters, which no text should have: one of them marks what only spells a control token.
_MARKS = tuple(map(chr, range(0xFDD0, 0xFDF0)))


def wrap_prompt(tokenizer: Tokenizer, text_ids: list[int]) -> list[int]:
    """The ids before the completion, given those of the prompt's text."""
    head = [tokenizer.bos_id, tokenizer.user_id]
    return [*head, *text_ids, tokenizer.end_id, tokenizer.assistant_id]


def wrap(tokenizer: Tokenizer, prompt_ids: list[int], completion_ids: list[int]) -> Example:
    """A conversation, given the ids of its two texts."""
    before = wrap_prompt(tokenizer, prompt_ids)
    return _example(before, [*completion_ids, tokenizer.end_id], [])


def _example(before: list[int], trained: list[int], after: list[int]) -> Example:
    mask = np.zeros(len(before) + len(trained) + len(after), np.bool_)
    mask[len(before) : len(before) + len(trained)] = True
    return np.array([*before, *trained, *after], np.int32), mask


def check_chat(tokenizer: TextTokenizer) -> None:
    """Raises ValueError for a tokenizer that has no way to write a conversation."""
    if not isinstance(tokenizer, Tokenizer) and tokenizer.chat_template is None:
        raise ValueError(
            "the tokenizer has no chat template, so it cannot write the turns of a conversation: it belongs to a base "
            "model.  Let the model continue text instead, or put a chat_template.jinja beside the model's "
            "tokenizer files and import it again"
        )


def chat_ids(tokenizer: TextTokenizer, messages: Sequence[Message]) -> list[int]:
    """What the model reads before it answers ``messages``, each with ``role`` and ``content``.

    Raises ValueError for messages that the chat format has no place for.
    """
    check_chat(tokenizer)
    if not messages:
        raise ValueError("there is no message to answer")
    for message in messages:
        if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
            raise ValueError(f"a message has a role and a content, both text; got {dict(message)!r}")
    if isinstance(tokenizer, Tokenizer):
        return _marked_turns(tokenizer, messages)
    assert tokenizer.chat_template is not None
    marked, mark = _mark(tokenizer, messages)
    return _encode_marked(tokenizer, tokenizer.chat_template.render(marked, add_generation_prompt=True), mark)


def _marked_turns(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    roles = {"user": tokenizer.user_id, "assistant": tokenizer.assistant_id}
    ids = [tokenizer.bos_id]
    for message in messages:
        if message["role"] not in roles:
            raise ValueError(f"this chat format has the roles {sorted(roles)}, and no {message['role']!r}")
        ids += [roles[message["role"]], *tokenizer.encode(message["content"]), tokenizer.end_id]
    return [*ids, tokenizer.assistant_id]


def prompt_ids(tokenizer: TextTokenizer, prompt: str | Sequence[Message]) -> np.ndarray:
    """int32 ``[n]``: what the model reads before it answers ``prompt`` (a user's text, or messages)."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return np.array(chat_ids(tokenizer, messages), np.int32)


def conversation(tokenizer: TextTokenizer, prompt: str, completion: str) -> Example:
    """Ids; and a mask, True on the completion's ids and on the id that ends its turn."""
    return conversations(tokenizer, [prompt], [completion])[0]


def conversations(tokenizer: TextTokenizer, prompts: Sequence[str], completions: Sequence[str]) -> list[Example]:
    """``conversation`` of each pair.

    Raises ValueError for a chat template whose conversation does not begin with its own prompt.
    """
    check_chat(tokenizer)
    if isinstance(tokenizer, Tokenizer):
        encoded = tokenizer.encode_batch([*prompts, *completions])
        pairs = zip(encoded[: len(prompts)], encoded[len(prompts) :], strict=True)
        return [wrap(tokenizer, *pair) for pair in pairs]
    return [_templated(tokenizer, *pair) for pair in zip(prompts, completions, strict=True)]


def _templated(tokenizer: TextTokenizer, prompt: str, completion: str) -> Example:
    template = tokenizer.chat_template
    assert template is not None
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    marked, mark = _mark(tokenizer, messages)
    before = template.render(marked[:1], add_generation_prompt=True)
    whole = template.render(marked)
    if not whole.startswith(before):
        same = next((i for i, (a, b) in enumerate(zip(whole, before, strict=False)) if a != b), len(whole))
        raise ValueError(
            f"the chat template does not keep its prefix: with an answer, {before[same:][:60]!r} after character "
            f"{same} of the prompt becomes {whole[same:][:60]!r}; training on such a conversation would teach another "
            "format than the prompt's"
        )
    head = _encode_marked(tokenizer, before, mark)
    # Where no token crosses the seam, these are the ids of the whole text, which is what the template's author meant.
    ids = _encode_marked(tokenizer, whole, mark)
    rest = ids[len(head) :]
    if ids[: len(head)] != head:
        rest = _encode_inside(tokenizer, whole[len(before) :], mark)
    end = next((i + 1 for i, token in enumerate(rest) if token in tokenizer.stop_ids), None)
    if end is not None:
        return _example(head, rest[:end], rest[end:])
    if tokenizer.eos_id is None:
        raise ValueError("neither the chat template nor the tokenizer has an id that ends a turn")
    return _example(head, [*rest, tokenizer.eos_id], [])


def cut_prompts(tokenizer: TextTokenizer, prompts: Sequence[str], max_ids: int) -> list[tuple[np.ndarray, bool]]:
    """``prompt_ids`` of each in at most ``max_ids`` ids, and whether the end of its text was cut off for that.

    Raises ValueError where not even the chat format alone fits.
    """
    check_chat(tokenizer)
    alone = len(prompt_ids(tokenizer, ""))
    if alone > max_ids:
        raise ValueError(f"the chat format alone takes {alone} ids, and a prompt may have {max_ids}")
    if isinstance(tokenizer, Tokenizer):
        room = max_ids - alone
        texts = tokenizer.encode_batch(prompts)
        return [(np.array(wrap_prompt(tokenizer, ids[:room]), np.int32), len(ids) > room) for ids in texts]
    return [_cut(tokenizer, prompt, max_ids) for prompt in prompts]


def _cut(tokenizer: TextTokenizer, prompt: str, max_ids: int) -> tuple[np.ndarray, bool]:
    best = prompt_ids(tokenizer, prompt)
    if len(best) <= max_ids:
        return best, False
    best, low, high = prompt_ids(tokenizer, ""), 0, len(prompt)
    while high - low > 1:  # prompt[:low] fits, prompt[:high] does not
        middle = (low + high) // 2
        ids = prompt_ids(tokenizer, prompt[:middle])
        if len(ids) <= max_ids:
            best, low = ids, middle
        else:
            high = middle
    return best, True


def _mark(tokenizer: TextTokenizer, messages: Sequence[Message]) -> tuple[list[dict[str, str]], str]:
    """The messages with a mark on both sides of what spells a control token; and that mark."""
    text = "".join(message["content"] for message in messages)
    mark = next((mark for mark in _MARKS if mark not in text), None)
    if mark is None:
        raise ValueError("the messages have all of the noncharacters U+FDD0 to U+FDEF; take one of them out")
    pattern = tokenizer.control_pattern
    return [{**m, "content": pattern.sub(f"{mark}\\g<0>{mark}", m["content"])} for m in messages], mark


def _encode_marked(tokenizer: TextTokenizer, text: str, mark: str) -> list[int]:
    first, *rest = re.split(f"{mark}({tokenizer.control_pattern.pattern}){mark}|{mark}", text)
    ids = tokenizer.encode_rendered(first)
    for i, piece in enumerate(rest):
        if piece:
            ids += _inside(tokenizer, piece, plain=i % 2 == 0)
    return ids


def _encode_inside(tokenizer: TextTokenizer, text: str, mark: str) -> list[int]:
    ids = []
    for i, piece in enumerate(re.split(f"{mark}({tokenizer.control_pattern.pattern}){mark}|{mark}", text)):
        if piece:
            ids += _inside(tokenizer, piece, plain=i % 2 == 1)
    return ids


def _inside(tokenizer: TextTokenizer, text: str, *, plain: bool) -> list[int]:
    """The ids of a text that others stand before: after a newline, since some begin a text with a space."""
    encode = tokenizer.encode if plain else tokenizer.encode_rendered
    newline, ids = tokenizer.encode("\n"), encode(f"\n{text}")
    return ids[len(newline) :] if newline and ids[: len(newline)] == newline else encode(text)
