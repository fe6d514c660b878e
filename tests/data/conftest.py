from __future__ import annotations

import dataclasses

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
