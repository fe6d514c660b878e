from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from jaxtrain.data.chat import chat_ids
from jaxtrain.generate.chat import Conversation
from jaxtrain.generate.engine import Engine, sequence_keys
from jaxtrain.generate.sampling import Sampling
from jaxtrain.models.decoder import build_decoder

TURNS = ["The cat", "naïve?", "!"]


def talk(model, params, tokenizer, turns, *, max_new_tokens=14, **settings):
    """The conversation, its replies, and the pieces that were shown of each."""
    engine = Engine(model, Sampling(stop_ids=tokenizer.stop_ids, **settings), slots=1)
    conversation = Conversation(engine, engine.prepare(params), tokenizer)
    replies, shown = [], []
    for number, text in enumerate(turns):
        shown.append([])
        replies.append(conversation.ask(text, max_new_tokens=max_new_tokens, seed=number, show=shown[-1].append))
    return conversation, replies, shown


def from_scratch(model, params, tokenizer, conversation, *, max_new_tokens=14, **settings):
    """The ids that an engine without a memory answers to each turn, given what was said before it."""
    engine = Engine(model, Sampling(stop_ids=tokenizer.stop_ids, **settings), slots=1)
    prepared = engine.prepare(params)
    answers = []
    for number, end in enumerate(range(1, len(conversation.messages), 2)):
        prompt = chat_ids(tokenizer, conversation.messages[:end])
        keys = sequence_keys([number])
        (written,) = engine.generate(prepared, [prompt], max_new_tokens=max_new_tokens, keys=keys)
        answers.append(tokenizer.decode(written.ids[:-1] if written.stopped else written.ids))
    return answers


def test_a_conversation_is_what_reading_it_anew_gives(chat_model, chat_params, tokenizer):
    settings = {"temperature": 0.7, "repetition_penalty": 1.3}
    conversation, replies, shown = talk(chat_model, chat_params, tokenizer, TURNS, **settings)
    assert [reply.text for reply in replies] == ["".join(pieces) for pieces in shown]
    assert [m["content"] for m in conversation.messages[::2]] == TURNS
    assert [m["content"] for m in conversation.messages[1::2]] == [reply.text for reply in replies]
    assert [reply.text for reply in replies] == from_scratch(
        chat_model, chat_params, tokenizer, conversation, **settings
    )


def test_only_what_is_new_is_read(chat_model, chat_params, tokenizer):
    """A turn costs what differs from what was read and written before, and the token that says what comes next."""
    # Short answers in a cache of 160 positions: a larger one, for a longer conversation, would be read into anew.
    engine = Engine(chat_model, Sampling(stop_ids=(*tokenizer.stop_ids, *range(100, 304, 3))), slots=1)
    conversation = Conversation(engine, engine.prepare(chat_params), tokenizer)
    prompt = chat_ids(tokenizer, [{"role": "user", "content": TURNS[0]}])
    first = conversation.ask(TURNS[0], max_new_tokens=140, seed=0, show=lambda piece: None)
    assert first.read == len(prompt)
    (written,) = engine.generate(conversation.prepared, [prompt], max_new_tokens=140, keys=sequence_keys([0]))
    held = [*prompt, *written.ids[:-1].tolist()]
    whole = chat_ids(tokenizer, [*conversation.messages, {"role": "user", "content": TURNS[1]}])
    same = next((i for i, (a, b) in enumerate(zip(whole, held, strict=False)) if a != b), min(len(whole), len(held)))
    assert same >= len(prompt)
    second = conversation.ask(TURNS[1], max_new_tokens=4, seed=1, show=lambda piece: None)
    assert second.read == len(whole) - same
    # The same turn again, after the same words: one token is read.
    conversation.messages = conversation.messages[:2]
    third = conversation.ask(TURNS[1], max_new_tokens=4, seed=1, show=lambda piece: None)
    assert third.read == 1 and third.text == second.text


def test_layers_with_a_window_go_back_no_further_than_it(windowed, tokenizer, chat_model):
    fields = {field.name: getattr(chat_model.config, field.name) for field in dataclasses.fields(chat_model.config)}
    model = build_decoder(type(windowed.config)(**fields, window=20))
    params = model.init(jax.random.key(2))
    conversation, replies, _ = talk(model, params, tokenizer, TURNS, max_new_tokens=10)
    texts = [reply.text for reply in replies]
    assert texts == from_scratch(model, params, tokenizer, conversation, max_new_tokens=10)


def test_no_half_character_is_ever_shown(chat_model, chat_params, tokenizer):
    """A model that writes bytes: most of them begin a character that never ends."""
    _, replies, shown = talk(chat_model, chat_params, tokenizer, TURNS[:2], max_new_tokens=40, temperature=1.5)
    for reply, pieces in zip(replies, shown, strict=True):
        assert "".join(pieces) == reply.text
    smile = tokenizer.encode("\U0001f600 ok")
    from jaxtrain.data.tokenizer_base import StreamDecoder

    decoder = StreamDecoder(tokenizer)
    pieces = [decoder.push(i) for i in smile]
    assert "".join(pieces) == "\U0001f600 ok" and all("\ufffd" not in piece for piece in pieces)


def test_reset_and_room(chat_model, chat_params, tokenizer):
    conversation, replies, _ = talk(chat_model, chat_params, tokenizer, TURNS[:1])
    conversation.reset()
    again = conversation.ask(TURNS[0], max_new_tokens=14, seed=0, show=lambda piece: None)
    assert again.text == replies[0].text and len(conversation.messages) == 2
    before = list(conversation.messages)
    with pytest.raises(ValueError, match=r"the conversation has \d+ tokens.*max_positions=160.*/reset"):
        conversation.ask("the cat " * 200, max_new_tokens=4, seed=0, show=lambda piece: None)
    assert conversation.messages == before
    longest = "the " * 24
    ids = len(chat_ids(tokenizer, [*before, {"role": "user", "content": longest}]))
    assert ids < 160
    last = conversation.ask(longest, max_new_tokens=500, seed=0, show=lambda piece: None)
    assert last.tokens <= 160 - ids and (last.stopped or last.tokens == 160 - ids)


def test_what_cannot_be_said_is_named(chat_model, chat_params, tokenizer):
    engine = Engine(chat_model, Sampling(), slots=1)
    with pytest.raises(ValueError, match="no 'system'"):
        Conversation(engine, engine.prepare(chat_params), tokenizer, system="Be brief.")
    assert np.asarray(chat_ids(tokenizer, [{"role": "user", "content": ""}])).size
