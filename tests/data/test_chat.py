from __future__ import annotations

import json
import random

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtrain.data import chat
from jaxtrain.data.tokenizer_hf import HfTokenizer

TEXT = st.text(min_size=1, max_size=12) | st.sampled_from(["<|end|>", "\n<|user|>", " ", "turn", "re turn"])
HF_TEXT = st.text(max_size=12) | st.sampled_from(["<|im_end|>", "\n<|im_start|>user\n", " ", "\n", "\n\n", "\ufdd0"])
# An answer that is stripped and put after a space, and a turn that ends in eos.
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
THINKS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}{% if loop.last and m['role'] == 'assistant' %}"
    "{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{{ m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@pytest.fixture(scope="session")
def chatml(tiny_files):
    return HfTokenizer(tiny_files())


def user(text):
    return {"role": "user", "content": text}


def test_golden_conversation(tokenizer):
    t = tokenizer
    ids, mask = chat.conversation(t, "Hi", "Yo there")
    hi, yo = t.encode("Hi"), t.encode("Yo there")
    assert ids.tolist() == [t.bos_id, t.user_id, *hi, t.end_id, t.assistant_id, *yo, t.end_id]
    assert mask.tolist() == [False] * (4 + len(hi)) + [True] * (len(yo) + 1)
    messages = [user("Hi"), {"role": "assistant", "content": "Yo there"}, user("Hi")]
    wanted = [*ids.tolist(), t.user_id, *hi, t.end_id, t.assistant_id]
    assert chat.chat_ids(t, messages) == wanted == chat.prompt_ids(t, messages).tolist()
    with pytest.raises(ValueError, match=r"roles \['assistant', 'user'\], and no 'system'"):
        chat.chat_ids(t, [{"role": "system", "content": "x"}])


@settings(max_examples=200, deadline=None)
@given(prompt=TEXT, completion=TEXT)
def test_seam_bos_and_end_of_turn(tokenizer, prompt, completion):
    t = tokenizer
    before = chat.prompt_ids(t, prompt)
    ids, mask = chat.conversation(t, prompt, completion)
    assert ids[: len(before)].tolist() == before.tolist()
    assert not mask[: len(before)].any() and mask[len(before) :].all()
    assert t.decode(ids[len(before) :]) == completion
    # One bos, at the start; one end for each turn, and the assistant's is trained, whatever the texts say.
    assert (ids == t.bos_id).sum() == 1 and ids[0] == t.bos_id
    assert (ids == t.end_id).sum() == 2 and ids[-1] == t.end_id and mask[-1]
    assert (ids == t.eos_id).sum() == (ids == t.pad_id).sum() == 0


def test_golden_templated_conversation(chatml):
    t = chatml
    ids, mask = chat.conversation(t, "Hi", "Yo there")
    (start,), (end,) = t.encode_rendered("<|im_start|>"), t.encode_rendered("<|im_end|>")
    before = [start, *t.encode("user\nHi"), end, *t.encode("\n"), start, *t.encode("assistant\n")]
    assert ids.tolist() == [*before, *t.encode("Yo there"), end, *t.encode("\n")]
    # What the template writes after the end of the turn is not the model's to learn.
    assert mask.tolist() == [False] * len(before) + [True] * (len(t.encode("Yo there")) + 1) + [False]
    assert chat.prompt_ids(t, "Hi").tolist() == before == t.chat_prompt([user("Hi")])


@settings(max_examples=150, deadline=None)
@given(prompt=HF_TEXT, completion=HF_TEXT)
def test_templated_seam_and_no_injection(chatml, prompt, completion):
    t = chatml
    before = chat.prompt_ids(t, prompt)
    ids, mask = chat.conversation(t, prompt, completion)
    assert ids[: len(before)].tolist() == before.tolist() and not mask[: len(before)].any()
    trained = ids[mask]
    assert t.decode(trained) == completion and trained[-1] == t.eos_id
    assert mask[len(before) :].tolist() == [True] * len(trained) + [False] * (len(ids) - len(before) - len(trained))
    # One end for each turn, whatever the texts say.
    assert (ids == t.eos_id).sum() == 2
    assert t.decode(before) == f"user\n{prompt}\nassistant\n"


def test_ids_are_those_of_the_whole_text_where_no_token_crosses_the_seam(tiny_files):
    for template in (LLAMA2, THINKS):
        t = HfTokenizer(tiny_files(template))
        ids, mask = chat.conversation(t, " What? ", " Paris ")
        messages = [user(" What? "), {"role": "assistant", "content": " Paris "}]
        assert ids.tolist() == t.encode_rendered(t.chat_template.render(messages))
        trained = t.decode(ids[mask])
        assert trained == (" Paris " if template == LLAMA2 else "<think>\n\n</think>\n\n Paris ")


def test_whole_texts_are_encoded_as_one_where_a_space_belongs_to_their_start():
    tokens = [("<unk>", 0.0), ("</s>", 0.0), ("\u2581", -2.0), ("a", -2.0), ("b", -2.5), ("\u2581ab", -3.0)]
    library = tokenizers.Tokenizer(tokenizers.models.Unigram(tokens, unk_id=0))
    library.normalizer = tokenizers.normalizers.Strip()  # so that no newline can stand for what comes before
    library.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    library.add_special_tokens(["<unk>", "</s>"])
    template = "{% for m in messages %}{{ m.content }}{% if m.role != 'user' %}</s>{% endif %}{% endfor %}"
    config = json.dumps({"eos_token": "</s>", "unk_token": "<unk>", "chat_template": template}).encode()
    t = HfTokenizer({"tokenizer.json": library.to_str().encode(), "tokenizer_config.json": config})
    ids, mask = chat.conversation(t, "ab", "ab")
    assert ids.tolist() == [5, 3, 4, 1] == t.encode_rendered("abab</s>")
    assert mask.tolist() == [False, True, True, True]


def test_batches_are_the_conversations(tokenizer, chatml, fuzzed):
    rng = random.Random(0)
    prompts, completions = (rng.sample(fuzzed, 30) for _ in range(2))
    for t in (tokenizer, chatml):
        for (ids, mask), prompt, completion in zip(
            chat.conversations(t, prompts, completions), prompts, completions, strict=True
        ):
            alone = chat.conversation(t, prompt, completion)
            assert np.array_equal(ids, alone[0]) and np.array_equal(mask, alone[1])


def test_cut_prompts_keep_the_format(tokenizer, chatml):
    text = "The quick brown fox jumps over the lazy dog \U0001f600. " * 4
    for t in (tokenizer, chatml):
        alone = len(chat.prompt_ids(t, ""))
        whole = chat.prompt_ids(t, text)
        for limit in (alone, alone + 1, alone + 9, len(whole) - 1, len(whole)):
            ((ids, cut),) = chat.cut_prompts(t, [text], limit)
            assert len(ids) <= limit and cut == (limit < len(whole))
            assert ids[-2:].tolist() == whole[-2:].tolist()  # it is the model's turn
        ((ids, _),) = chat.cut_prompts(t, [text], alone + 9)
        assert len(ids) >= alone + 5  # it keeps what fits
        with pytest.raises(ValueError, match=f"the chat format alone takes {alone} ids"):
            chat.cut_prompts(t, [text], alone - 1)


def test_templates_that_cannot_be_trained_on(tiny_files):
    base = HfTokenizer(tiny_files(None))
    for call in (lambda: chat.prompt_ids(base, "x"), lambda: chat.conversations(base, [], [])):
        with pytest.raises(ValueError, match=r"has no chat template.*continue text instead"):
            call()
    moving = HfTokenizer(
        tiny_files("{{ messages|length }}{% for m in messages %}{{ m.content }}{% endfor %}<|im_end|>")
    )
    with pytest.raises(ValueError, match="does not keep its prefix: with an answer, '1x"):
        chat.conversation(moving, "x", "y")
    endless = HfTokenizer(tiny_files("{% for m in messages %}{{ m.content }}\n{% endfor %}"))
    ids, mask = chat.conversation(endless, "x", "y")  # the tokenizer's eos ends the turn
    assert endless.decode(ids) == "x\ny\n" and ids[-1] == endless.eos_id and mask[-1]
    files = tiny_files("{% for m in messages %}{{ m.content }}\n{% endfor %}")
    config = json.loads(files["tokenizer_config.json"])
    del config["eos_token"]
    nameless = HfTokenizer({**files, "tokenizer_config.json": json.dumps(config).encode()})
    with pytest.raises(ValueError, match="has an id that ends a turn"):
        chat.conversation(nameless, "x", "y")


def test_messages_are_checked(tokenizer, chatml):
    for t in (tokenizer, chatml):
        with pytest.raises(ValueError, match="no message to answer"):
            chat.chat_ids(t, [])
        with pytest.raises(ValueError, match="a role and a content, both text"):
            chat.chat_ids(t, [{"role": "user", "content": None}])
        with pytest.raises(ValueError, match="lone surrogate"):
            chat.chat_ids(t, [user("\ud800")])
    every = "".join(map(chr, range(0xFDD0, 0xFDF0)))
    with pytest.raises(ValueError, match="noncharacters"):
        chat.chat_ids(chatml, [user(every)])
