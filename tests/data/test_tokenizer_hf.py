from __future__ import annotations

import json

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtrain.data.tokenizer import SavedTokenizer, load_tokenizer
from jaxtrain.data.tokenizer_base import StreamDecoder
from jaxtrain.data.tokenizer_hf import HfTokenizer
from jaxtrain.data.tokenizer_source import source_tokenizer


@pytest.fixture(scope="session")
def tiny(tiny_files):
    return HfTokenizer(tiny_files())


def write(folder, files):
    folder.mkdir(exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def unigram(**config):
    """A Unigram model whose vocabulary has the control tokens, as T5's has."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0), ("a", -2.0), ("b", -2.5)]
    pieces += [("\u2581ab", -3.0), *((c, -4.0) for c in "</s")]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.decoder = tokenizers.decoders.Metaspace()
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    roles = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", **config}
    return {"tokenizer.json": tokenizer.to_str().encode(), "tokenizer_config.json": json.dumps(roles).encode()}


def wordpiece():
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "play", "##ing", "##s", *"[]", "sep", *"中!a", "##b"]
    return {"vocab.txt": ("\n".join(pieces) + "\n").encode()}


def test_same_ids_as_the_library_and_back(tiny, fuzzed, tiny_files):
    theirs = tokenizers.Tokenizer.from_str(tiny_files()["tokenizer.json"].decode())
    assert [tiny.encode_rendered(text) for text in fuzzed] == [e.ids for e in theirs.encode_batch(fuzzed)]
    theirs.encode_special_tokens = True
    plain = tiny.encode_batch(fuzzed)
    same = [theirs.encode(text).ids == ids for text, ids in zip(fuzzed, plain, strict=True)]
    assert all(same)
    assert [tiny.decode(ids) for ids in plain] == fuzzed
    sizes = tiny.token_bytes()
    assert [sum(int(sizes[i]) for i in ids) for ids in plain] == [len(text.encode()) for text in fuzzed]


SPELLED = st.sampled_from(["<s>", "<|im_end|>", "<start_of_turn>", "<", "|", "s>"])


@settings(max_examples=200, deadline=None)
@given(text=st.lists(SPELLED | st.text(max_size=5)).map("".join))
def test_no_text_becomes_a_control_id(tiny, text):
    ids = tiny.encode(text)
    assert tiny.special_ids.isdisjoint(ids) and tiny.decode(ids) == text


def test_special_tokens_ids_and_pieces(tiny):
    ids = tiny.encode_rendered("<|im_start|>hi<|im_end|>")
    assert [tiny.piece(i) for i in (ids[0], ids[-1])] == ["<|im_start|>", "<|im_end|>"]
    assert tiny.decode([*ids, tiny.vocab_size + 7]) == "hi"
    assert tiny.piece(tiny.bos_id) == "<s>" and tiny.eos_id == ids[-1] and tiny.stop_ids == (ids[-1],)
    assert tiny.pad_id == tiny.eos_id  # no pad_token
    assert tiny.piece(tiny.encode("中")[0]) in ("<0xE4>", "中", "<0xE4><0xB8>")
    with pytest.raises(ValueError, match="id -3 is negative"):
        tiny.decode([4, -3])
    with pytest.raises(ValueError, match=r"lone surrogate \(U\+DCFF\) at character 1"):
        tiny.encode(b"a\xff".decode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match="lone surrogate"):
        tiny.encode_rendered("\ud800")


def test_unmarked_control_tokens_are_found_in_the_template(tiny, tiny_files):
    gemma = (
        "{% for m in messages %}<start_of_turn>{{ m.role }}\n{{ m.content }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>assistant\n{% endif %}"
    )
    marked = HfTokenizer(tiny_files(gemma))
    (turn,) = tiny.encode_rendered("<start_of_turn>")
    (think,) = tiny.encode_rendered("<think>")
    (end,) = marked.encode_rendered("<end_of_turn>")
    assert turn in marked.special_ids and turn not in tiny.special_ids
    assert think not in marked.special_ids  # what a model may write stays text
    assert marked.stop_ids == tuple(sorted([end, marked.eos_id]))
    assert turn not in marked.encode("<start_of_turn>") and turn in tiny.encode("<start_of_turn>")


def test_control_tokens_in_a_unigram_vocabulary_are_not_reached_by_text():
    tokenizer = HfTokenizer(unigram())
    assert tokenizer.encode_rendered("ab</s>") == [6, 1]
    ids = tokenizer.encode("ab</s>")
    assert ids[0] == 6 and 1 not in ids
    assert tokenizer.encode("ab") == [6] and tokenizer.decode([6, 1]) == "ab"
    assert tokenizer.suffix_ids == (1,) and tokenizer.prefix_ids == ()


def test_bos_and_eos_flags_win_over_the_post_processor():
    tokenizer = HfTokenizer(unigram(bos_token="<bos>", add_bos_token=True, add_eos_token=False))
    assert tokenizer.piece(tokenizer.bos_id) == "<bos>"  # named, not in the file: added, as transformers does
    assert tokenizer.prefix_ids == (tokenizer.bos_id,) and tokenizer.suffix_ids == ()
    assert tokenizer.text_ids("ab") == [tokenizer.bos_id, 6]


def test_truncation_and_padding_of_the_file_are_left_out():
    files = unigram()
    inner = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
    inner.enable_truncation(2)
    inner.enable_padding(length=7)
    tokenizer = HfTokenizer({**files, "tokenizer.json": inner.to_str().encode()})
    assert tokenizer.encode("ab ab ab ab") == [6, 6, 6, 6] == tokenizer.encode_rendered("ab ab ab ab")


def test_vocab_txt(tmp_path):
    tokenizer = source_tokenizer(write(tmp_path / "bert", wordpiece()))
    assert tokenizer.encode("Playing [SEP] 中! xyz") == [5, 6, 8, 10, 9, 11, 12, 1]
    assert tokenizer.encode_rendered("playing[SEP]") == [5, 6, 3]
    assert (tokenizer.prefix_ids, tokenizer.suffix_ids) == ((2,), (3,))
    assert tokenizer.decode([2, 5, 6, 11, 12, 3]) == "playing 中!"
    with pytest.raises(ValueError, match=r"vocab.txt lacks \['\[PAD\]'"):
        source_tokenizer(write(tmp_path / "bad", {"vocab.txt": b"[UNK]\n[CLS]\n[SEP]\na\n"}))


@settings(max_examples=150, deadline=None)
@given(ids=st.lists(st.integers(0, 640), max_size=12))
def test_streams_add_up_to_decode(tiny, ids):
    stream = StreamDecoder(tiny)
    shown = [stream.push(i) for i in ids]
    assert "".join(shown) + stream.finish() == tiny.decode(ids)


def test_streams_show_whole_characters_and_spaces(tiny, tokenizer, tmp_path):
    bert = source_tokenizer(write(tmp_path / "bert", wordpiece()))
    emoji = "\U0001f468\u200d\U0001f469 é\u2581 "
    cases = [(tiny, f"x {emoji}"), (tokenizer, f" x {emoji}"), (bert, "plays a ab !")]
    cases.append((HfTokenizer(unigram()), "ab a b"))
    for each, text in cases:
        stream = StreamDecoder(each)
        ids = each.encode(text)
        shown = [stream.push(i) for i in ids]
        assert "\ufffd" not in "".join(shown) and stream.finish() == ""
        assert "".join(shown) == each.decode(ids)
    stream = StreamDecoder(tiny)
    ids = tiny.encode("é\U00010348")
    assert "".join(map(stream.push, ids[:-1])) == "é" and stream.finish() == "\ufffd"


def test_save_load_and_damage(tmp_path, tiny, fuzzed):
    tiny.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.digest == tiny.digest and loaded.encode_batch(fuzzed) == tiny.encode_batch(fuzzed)
    assert loaded.chat_template.source == tiny.chat_template.source
    assert SavedTokenizer(directory=str(tmp_path)).vocab_size == tiny.vocab_size
    config = tmp_path / "tokenizer_config.json"
    config.write_bytes(config.read_bytes().replace(b"user", b"usor") + b" ")
    with pytest.raises(ValueError, match="damaged: the digest of"):
        load_tokenizer(tmp_path)
    config.unlink()
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is missing"):
        load_tokenizer(tmp_path)
    meta = tmp_path / "jaxtrain_tokenizer.json"
    record = json.loads(meta.read_text())
    meta.write_text(json.dumps({**record, "files": ["../secret"]}))
    with pytest.raises(ValueError, match="is damaged; import"):
        load_tokenizer(tmp_path)
    meta.write_text("{")
    with pytest.raises(ValueError, match="is damaged; import"):
        load_tokenizer(tmp_path)


def test_another_kind_may_be_saved_in_the_same_folder(tmp_path, tiny, tokenizer):
    for each in (tokenizer, tiny, tokenizer):
        each.save(tmp_path)
        assert load_tokenizer(tmp_path).digest == each.digest


def test_the_digest_knows_template_and_stop_ids(tiny, tiny_files):
    others = [HfTokenizer(tiny_files("{{ messages }}")), HfTokenizer(tiny_files(), stop_ids=(3,))]
    assert len({tiny.digest, *(other.digest for other in others)}) == 3
    assert others[1].stop_ids == (2, 3)


def test_folders_are_searched_in_order(tmp_path, tiny, tiny_files):
    files = tiny_files(None)
    folder = write(tmp_path / "a", {**files, **wordpiece(), "chat_template.jinja": b"{{ bos_token }}"})
    (folder / "generation_config.json").write_text('{"eos_token_id": [4, 0]}')
    found = source_tokenizer(folder)
    assert found.vocab_size == tiny.vocab_size and found.chat_template.source == "{{ bos_token }}"
    assert found.stop_ids == (0, 2, 4)
    assert "generation_config.json" not in found.export_files()
    (folder / "generation_config.json").write_text('{"eos_token_id": "x"}')
    with pytest.raises(ValueError, match="eos_token_id is"):
        source_tokenizer(folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": 70000}')
    with pytest.raises(ValueError, match=r"stop ids \[70000\] are outside"):
        source_tokenizer(folder)
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "y"}]
    config = json.dumps({"chat_template": named}).encode()
    assert HfTokenizer({**files, "tokenizer_config.json": config}).chat_template.source == "y"


def test_old_gpt2_form_is_the_same_tokenizer(tmp_path, tiny_files, fuzzed):
    model = json.loads(tiny_files()["tokenizer.json"])["model"]
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    merges = "\n".join(["#version: 0.2", *pairs, ""]).encode()
    old = {"vocab.json": json.dumps(model["vocab"]).encode(), "merges.txt": merges}
    tokenizer = source_tokenizer(write(tmp_path / "old", old))
    assert tokenizer.piece(tokenizer.eos_id) == "<|endoftext|>" and tokenizer.prefix_ids == ()
    new = HfTokenizer(tiny_files(None))
    assert tokenizer.encode_batch(fuzzed) == new.encode_batch(fuzzed)
    config = json.dumps({"tokenizer_class": "CLIPTokenizer"}).encode()
    with pytest.raises(ValueError, match="'CLIPTokenizer' has only a vocabulary and merges"):
        source_tokenizer(write(tmp_path / "clip", {**old, "tokenizer_config.json": config}))
    with pytest.raises(ValueError, match="a line of 3 words"):
        source_tokenizer(write(tmp_path / "bad", {**old, "merges.txt": b"a b c\n"}))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"no tokenizer in .*: looked for tokenizer\.json, a SentencePiece"),
        ({"pytorch_model.bin": b"\x80\x04."}, "no tokenizer in"),
        ({"tokenizer_config.json": b'{"auto_map": {"AutoTokenizer": ["a.B", null]}}'}, "needs code of its own"),
        ({"tokenizer.json": b"{}"}, "is not a tokenizer that the tokenizers library reads"),
        ({"tokenizer.json": b"{}", "tokenizer_config.json": b"["}, r"tokenizer_config\.json is not JSON"),
        ({"tokenizer.json": b"{}", "tokenizer_config.json": b"[]"}, "holds a list"),
        ({"x.model": b"nonsense"}, "not a SentencePiece model"),
    ],
)
def test_folders_without_a_tokenizer(tmp_path, files, message):
    with pytest.raises(ValueError, match=message):
        source_tokenizer(write(tmp_path, files))


def test_what_begins_a_text(tiny, tokenizer):
    assert tiny.text_ids("hi") == tiny.encode("hi") and tiny.text_ids("") == [tiny.bos_id]
    assert tokenizer.text_ids("") == [tokenizer.bos_id]
    assert tokenizer.document_ids() == (tokenizer.bos_id, tokenizer.eos_id)
    assert tiny.document_ids() == (tiny.eos_id, tiny.eos_id)
