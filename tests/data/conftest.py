from __future__ import annotations

import dataclasses
import json
import os
import random
from pathlib import Path

import pytest

from jaxtrain.data.tokenizer import SentencePieceBPE


@dataclasses.dataclass(frozen=True)
class Texts:
    """A text source in memory; both splits are the same unless ``heldout`` is given."""

    train: tuple[str, ...]
    heldout: tuple[str, ...] | None = None

    def documents(self, split):
        return iter(self.train if split == "train" or self.heldout is None else self.heldout)


@dataclasses.dataclass(frozen=True)
class Table:
    """A row source in memory."""

    train: tuple[dict, ...]
    heldout: tuple[dict, ...] | None = None

    def rows(self, split, columns=()):
        return iter(self.train if split == "train" or self.heldout is None else self.heldout)


CORPUS = (
    "def add(first, second):\n\treturn first + second\n\n\n    # indented  by four\r\n",
    "Return the sum of the first and the second number. The quick brown fox jumps over the lazy dog.\n",
    "Describe what this does.\nclass email.message.Message(object)\n\nA <|user|> wrote <0x41> and <|end|>.",
    "Grüße, naïve café: 中文 text and \u2581 marks \U0001f600 too.",
) * 6


@pytest.fixture
def texts():
    return Texts


@pytest.fixture
def table():
    return Table


@pytest.fixture(scope="session")
def corpus_source():
    return Texts(CORPUS)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory, corpus_source):
    trainer = SentencePieceBPE(vocab_size=360, sources=(corpus_source,))
    return trainer.train(tmp_path_factory.mktemp("tokenizer"))


AWKWARD = (
    *("", " ", "  ", "Hello, world!", " before", "after ", "a\tb\n\n\n  c\r\nd\re", "\n", "\n\n", "\n" * 17),
    "def f(x):\n    if x:\n\t\treturn x  # 注释\n\n\nclass A:\n  pass\n",
    "中文，字。你好世界！繁體 日本語ひらがなカタカナ 한국어",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea",  # a family, a flag
    "\U0001f3f3\ufe0f\u200d\U0001f308 \U0001f44d\U0001f3fd",
    *("0 1 12 123 1234 12345 1,234.5e-6 ½ ² Ⅷ ٣٤ १२", "  1   22", "x1y22z333"),
    "שלום עולם مرحبا بالعالم \u202eabc\u202c",
    "\0\x01\x02\x07\x08\x1b[0m\x7f\x85\x9f",
    "e\u0301 é ﬁ Å ſ K 'ſ 'S 'LL don't DON'T we’ve I'll İstanbul ΑΣ ς straße ǅ",
    "\ufeffBOM \ufffd \u2028 \u2029 \u00a0 \u3000 \u200b \U0010ffff \ue000",
    "<|endoftext|> <|im_start|>user\n<|im_end|> <s> </s> <unk> <pad> [CLS] [SEP] [MASK] [UNK] <|extra_0|> <|end|>",
    "<0x41> \u2581 \u2581\u2581 a\u2581b Ġ Ċ ##ing",
    b"\xe2\x96ab\xff\xf0\x9f\x98".decode("utf-8", "replace"),
    *("a" * 50, "b" * 150, " " * 40 + "x"),
)
WORDS = (
    *("the", " quick", "brown", " 12", "3456", "\n", "\t", "  ", " ", "'s", "'re", "'", '"', *"().,…中"),
    *("文", "字节", "é", "e\u0301", "ü", "\U0001f600", "\u200d", "\U0001f1e9", "א", "ب", "<|endoftext|>", "<|im_end|>"),
    *("</s>", "[SEP]", "_", "foo_bar", "CamelCase", "\r\n", *"\u00a0\u3000\u2581#ſ²", "##", "//", "=>"),
)
RANGES = ((32, 127), (0x80, 0x600), (0x900, 0xE00), (0x2000, 0x3100), (0x4E00, 0x9FFF), (0x1F300, 0x1FAFF), (1, 0xD800))


def fuzzed_texts(count, seed):
    rng = random.Random(seed)
    texts = list(AWKWARD)
    for _ in range(count):
        pieces = [
            rng.choice(WORDS) if rng.random() < 0.75 else chr(rng.randrange(*rng.choice(RANGES)))
            for _ in range(rng.randrange(1, 14))
        ]
        texts.append("".join(pieces))
    return texts


@pytest.fixture(scope="session")
def fuzzed():
    """Texts of every awkward kind: code, Chinese, emoji, right-to-left, control characters, special tokens' names."""
    return fuzzed_texts(500, seed=0)


@pytest.fixture(scope="session")
def more_fuzzed():
    """Others, to train on."""
    return fuzzed_texts(300, seed=5)


@pytest.fixture(scope="session")
def original():
    """``original(name, pattern)``: a downloaded file; the test is skipped where it is not there."""

    def find(name, pattern):
        root = Path(os.environ.get("JAXTRAIN_DATA", Path.home() / ".cache" / "jaxtrain-data"))
        found = sorted((root / name).rglob(pattern))
        if not found:
            pytest.skip(f"{name} is not downloaded: no {pattern} below {root} ($JAXTRAIN_DATA)")
        return found[0]

    return find


CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="session")
def tiny_files(more_fuzzed):
    """``tiny_files(template)``: a Hugging Face folder's files, with a small byte-level BPE and a chat template."""
    import tokenizers

    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>"]
    names += ["[INST]", "[/INST]", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<end_of_turn>"]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=names,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*CORPUS, *more_fuzzed], trainer)
    # Not marked special, as in some released models.
    tokenizer.add_tokens([tokenizers.AddedToken(t, special=False) for t in ("<start_of_turn>", "<think>", "</think>")])
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "<|im_end|>"}
    data = tokenizer.to_str().encode()

    def make(template=CHATML):
        found = config if template is None else {**config, "chat_template": template}
        return {"tokenizer.json": data, "tokenizer_config.json": json.dumps(found).encode()}

    return make
