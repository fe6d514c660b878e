from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtrain.data.tokenizer import SentencePieceBPE, Tokenizer

AWKWARD = [
    *("", " ", "  ", "a\tb", "\n\n\n", "\r\n", "\r", "\0", "a\0b", "\x1b[0m\x07", "\x85\u2028\u2029"),
    *("\u2581", "\u2581\u2581 \u2581", " \u2581 ", "a\u2581", "\U0001f600\U0001f468\u200d\U0001f469"),
    *(
        "中文，字",
        "e\u0301",
        "\ufeffBOM",
        "\ufffd",
        "\u2047",
        "\U0010ffff",
        "    def f(x):\n\t\treturn  x  \n",
    ),
    *("<|user|>", "<|end|><|assistant|>", "<s></s><unk><|unk|>", "<0x41>"),
]
PIECES = st.sampled_from([text for text in AWKWARD if text])
TEXTS = st.lists(PIECES | st.text(max_size=8), max_size=8).map("".join)


@pytest.mark.parametrize("text", AWKWARD)
def test_round_trip_of_awkward_texts(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=300, deadline=None)
@given(text=TEXTS)
def test_round_trip_and_no_control_id(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    sizes = tokenizer.token_bytes()
    assert sum(int(sizes[i]) for i in ids) == len(text.encode())
    assert all(sizes[i] > 0 for i in ids)  # a control id, or unknown, stands for no bytes


@settings(max_examples=50, deadline=None)
@given(texts=st.lists(TEXTS, max_size=20))
def test_batch_is_encode_in_order(tokenizer, texts):
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


def test_control_ids_are_distinct_and_dropped_by_decode(tokenizer):
    t = tokenizer
    control = [t.pad_id, t.bos_id, t.eos_id, t.user_id, t.assistant_id, t.end_id]
    assert len(set(control)) == 6 and t.pad_id == 0
    assert t.decode([t.bos_id, *t.encode("hi there"), t.end_id, t.pad_id]) == "hi there"
    names = "<|pad|> <|bos|> <|eos|> <|user|> <|assistant|> <|end|>"
    assert " ".join(map(t.piece, control)) == names
    assert t.token_bytes()[control].tolist() == [0] * 6
    assert t.token_bytes().shape == (t.vocab_size,) and t.vocab_size == 360


def test_pieces_show_spaces_and_bytes(tokenizer):
    (space,) = tokenizer.encode(" ")
    assert tokenizer.piece(space) == " "
    assert [tokenizer.piece(i) for i in tokenizer.encode("\u2581")] == ["<0xE2>", "<0x96>", "<0x81>"]


def test_half_a_character_decodes_to_the_replacement_character(tokenizer):
    assert tokenizer.decode(tokenizer.encode("\u2581")[:2]) == "\ufffd"


def test_ids_beyond_the_vocabulary_are_dropped_and_negative_ones_refused(tokenizer):
    ids = tokenizer.encode("text")
    assert tokenizer.decode([*ids, 360, 4000]) == "text"  # a model may have a padded vocabulary
    assert tokenizer.piece(360) == "<id 360>"
    with pytest.raises(ValueError, match="id -1 is negative; the vocabulary has the ids 0 to 359"):
        tokenizer.decode([5, -1])
    with pytest.raises(ValueError, match="id -1 is negative"):
        tokenizer.piece(-1)


def test_lone_surrogate_is_refused_with_its_place(tokenizer):
    with pytest.raises(ValueError, match=r"lone surrogate \(U\+D800\) at character 4"):
        tokenizer.encode("good\ud800")


def test_training_is_deterministic_and_survives_the_disk(tmp_path, tokenizer, corpus_source):
    again = SentencePieceBPE(vocab_size=360, sources=(corpus_source,)).train(tmp_path / "a")
    loaded = Tokenizer.load(tmp_path / "a")
    assert again.digest == loaded.digest == tokenizer.digest
    assert loaded.encode("Return the sum.\n") == tokenizer.encode("Return the sum.\n")
    other = SentencePieceBPE(vocab_size=361, sources=(corpus_source,)).train(tmp_path / "b")
    assert other.digest != tokenizer.digest


def test_max_bytes_takes_a_sample_of_the_source(tmp_path, texts):
    source = texts(tuple(f"document number {i} says word{i % 7}\n" for i in range(400)))
    trainer = SentencePieceBPE(vocab_size=290, sources=(source,), max_bytes=3000)
    sizes = [len(text) for text in trainer._texts()]
    assert 1500 < sum(sizes) < 4500 and len(set(trainer._texts())) > 50


def test_long_lines_are_not_lost_to_training(texts):
    long = "word " * 5000
    trainer = SentencePieceBPE(vocab_size=300, sources=(texts((long + "\n" + "x" * 9000,)),))
    pieces = list(trainer._texts())
    assert "".join(pieces) == long + "\n" + "x" * 9000
    assert max(map(len, pieces)) <= 4192


def test_mistakes_are_named(tmp_path, texts, corpus_source):
    with pytest.raises(ValueError, match=r"cannot train a vocabulary of 9000 .* too high"):
        SentencePieceBPE(vocab_size=9000, sources=(corpus_source,)).train(tmp_path)
    with pytest.raises(ValueError, match="nothing to train a tokenizer on"):
        SentencePieceBPE(vocab_size=300, sources=(texts(()),)).train(tmp_path)
    with pytest.raises(ValueError, match="vocab_size is 263"):
        SentencePieceBPE(vocab_size=263, sources=(corpus_source,))
    with pytest.raises(ValueError, match="sources is empty"):
        SentencePieceBPE(sources=())


def test_missing_and_damaged_files_are_named(tmp_path, tokenizer):
    with pytest.raises(ValueError, match=r"tokenizer\.model is missing"):
        Tokenizer.load(tmp_path)
    tokenizer.save(tmp_path)
    path = tmp_path / "tokenizer.model"
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(ValueError, match=r"tokenizer\.model is damaged"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer\.json is damaged"):
        Tokenizer.load(tmp_path)
    with pytest.raises(ValueError, match="not a SentencePiece model"):
        Tokenizer(b"nonsense")
