from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtrain.data import chat

TEXT = st.text(min_size=1, max_size=12) | st.sampled_from(["<|end|>", "\n<|user|>", " ", "turn", "re turn"])


def test_golden_conversation(tokenizer):
    t = tokenizer
    ids, mask = chat.conversation(t, "Hi", "Yo there")
    hi, yo = t.encode("Hi"), t.encode("Yo there")
    assert ids.tolist() == [t.bos_id, t.user_id, *hi, t.end_id, t.assistant_id, *yo, t.end_id]
    assert mask.tolist() == [False] * (4 + len(hi)) + [True] * (len(yo) + 1)


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
