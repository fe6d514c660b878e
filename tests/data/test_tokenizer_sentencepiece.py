"""SentencePiece models that others trained: their own library's ids."""

from __future__ import annotations

import io
import json
import random

import pytest
import sentencepiece

from jaxtrain.data.tokenizer import load_tokenizer
from jaxtrain.data.tokenizer_base import StreamDecoder
from jaxtrain.data.tokenizer_gguf import gguf_tokenizer
from jaxtrain.data.tokenizer_source import source_tokenizer


def train(texts, **settings):
    lines = [line for text in texts for line in text.split("\n") if "\0" not in line]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, minloglevel=2, num_threads=1, **settings
    )
    return model.getvalue()


@pytest.fixture(scope="module")
def llama_model(more_fuzzed):
    """As Llama 2's: BPE, bytes, no normalization, a space before the text."""
    return train(
        more_fuzzed,
        model_type="bpe",
        vocab_size=1400,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        character_coverage=0.99,
    )


@pytest.fixture(scope="module")
def t5_model(more_fuzzed):
    ids = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    return train(more_fuzzed, model_type="unigram", vocab_size=560, character_coverage=0.98, **ids)


def folder(path, model, name="tokenizer.model", **config):
    path.mkdir(exist_ok=True)
    (path / name).write_bytes(model)
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def test_llama_style_is_the_librarys(tmp_path, llama_model, fuzzed):
    tokenizer = source_tokenizer(folder(tmp_path, llama_model))
    library = sentencepiece.SentencePieceProcessor(model_proto=llama_model)
    assert tokenizer.encode_batch(fuzzed) == library.encode(fuzzed)
    assert [tokenizer.decode(ids) for ids in library.encode(fuzzed)] == library.decode(library.encode(fuzzed))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.prefix_ids, tokenizer.suffix_ids) == (1, 2, (1,), ())
    ids = tokenizer.encode_rendered("<s>a</s>")
    assert ids == [1, *tokenizer.encode("a"), 2] and tokenizer.decode(ids) == "a"
    assert 2 not in tokenizer.encode("a</s>") and tokenizer.stop_ids == (2,)
    with pytest.raises(ValueError, match="lone surrogate"):
        tokenizer.encode(b"\xff".decode("utf-8", "surrogateescape"))


def test_t5_style_is_the_librarys(tmp_path, t5_model, fuzzed):
    tokenizer = source_tokenizer(folder(tmp_path, t5_model, "spiece.model", tokenizer_class="T5Tokenizer"))
    library = sentencepiece.SentencePieceProcessor(model_proto=t5_model)
    assert tokenizer.encode_batch(fuzzed) == library.encode(fuzzed)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (None, 1, 0)
    assert (tokenizer.prefix_ids, tokenizer.suffix_ids) == ((), (1,))
    assert tokenizer.vocab_size == 660 and tokenizer.piece(659) == "<extra_id_0>"
    assert 659 in tokenizer.encode_rendered("a<extra_id_0>") and 659 not in tokenizer.encode("a<extra_id_0>")


def test_streams_add_up_to_decode(tmp_path, llama_model, t5_model):
    rng = random.Random(0)
    for name, model in (("llama", llama_model), ("t5", t5_model)):
        tokenizer = source_tokenizer(folder(tmp_path / name, model))
        for _ in range(300):
            ids = [rng.randrange(tokenizer.vocab_size + 3) for _ in range(rng.randrange(12))]
            if rng.random() < 0.5:  # spaces alone, which a library drops where it believes that a text starts
                ids += [i for i in range(tokenizer.vocab_size) if not tokenizer.piece(i).strip(" ")][:3] * 2 + ids[:1]
            stream = StreamDecoder(tokenizer)
            assert "".join([stream.push(i) for i in ids]) + stream.finish() == tokenizer.decode(ids), ids


def test_control_pieces_that_the_model_looks_for_are_cut(tmp_path, more_fuzzed):
    settings = {"model_type": "bpe", "vocab_size": 900, "character_coverage": 0.98, "byte_fallback": True}
    model = train(more_fuzzed, user_defined_symbols=["<turn>"], **settings)
    (turn,) = [i for i in (3,) if sentencepiece.SentencePieceProcessor(model_proto=model).id_to_piece(i) == "<turn>"]
    config = {"additional_special_tokens": ["<turn>"]}
    tokenizer = source_tokenizer(folder(tmp_path, model, **config))
    plain = tokenizer.encode("say <turn> twice <turn>")
    assert turn not in plain and tokenizer.decode(plain) == "say <turn> twice <turn>"
    assert tokenizer.encode_rendered("say <turn>").count(turn) == 1


def test_added_tokens_follow_the_models(tmp_path, llama_model):
    added = {"1400": {"content": "<|im_start|>", "special": True}, "1401": {"content": "<tool>", "special": False}}
    tokenizer = source_tokenizer(folder(tmp_path / "a", llama_model, added_tokens_decoder=added, pad_token="<pad>"))
    assert [tokenizer.piece(i) for i in (1400, 1401, 1402)] == ["<|im_start|>", "<tool>", "<pad>"]
    assert (tokenizer.pad_id, tokenizer.vocab_size) == (1402, 1403)
    tokenizer.save(tmp_path / "saved")
    loaded = load_tokenizer(tmp_path / "saved")
    assert loaded.digest == tokenizer.digest and loaded.encode_rendered("<|im_start|>a") == [1400, *loaded.encode("a")]
    with pytest.raises(ValueError, match="'<x>' has the id 1500"):
        source_tokenizer(folder(tmp_path / "b", llama_model, added_tokens_decoder={"1500": {"content": "<x>"}}))
    with pytest.raises(ValueError, match="ids of a XLMRobertaTokenizer are not its model's"):
        source_tokenizer(folder(tmp_path / "c", llama_model, tokenizer_class="XLMRobertaTokenizer"))


def test_gguf_of_a_sentencepiece_bpe_is_the_librarys(llama_model, fuzzed):
    library = sentencepiece.SentencePieceProcessor(model_proto=llama_model)
    size = library.vocab_size()

    def kind(i):
        return 2 if library.is_unknown(i) else 3 if library.is_control(i) else 6 if library.is_byte(i) else 1

    kinds = [kind(i) for i in range(size)]
    keys = {"model": "llama", "tokens": [library.id_to_piece(i) for i in range(size)], "token_type": kinds}
    keys |= {"scores": [library.get_score(i) for i in range(size)], "bos_token_id": 1, "eos_token_id": 2}
    tokenizer = gguf_tokenizer({f"tokenizer.ggml.{key}": value for key, value in keys.items()})
    assert tokenizer.encode_batch(fuzzed) == library.encode(fuzzed)
    assert [tokenizer.decode(ids) for ids in library.encode(fuzzed)] == library.decode(library.encode(fuzzed))
    assert tokenizer.prefix_ids == (1,)  # such files add bos where they do not say
    rng = random.Random(1)
    for _ in range(300):
        ids = [rng.randrange(300) for _ in range(rng.randrange(12))]  # most are bytes
        stream = StreamDecoder(tokenizer)
        assert "".join([stream.push(i) for i in ids]) + stream.finish() == tokenizer.decode(ids), ids
