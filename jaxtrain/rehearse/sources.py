"""What a rehearsal reads: a few rows of the recipe's own data, or made-up ones where there is none here."""

from __future__ import annotations

import dataclasses
import glob
import itertools
import os
import random
from collections.abc import Iterator, Sequence
from typing import Any

from jaxtrain.data.sources import Row, check_split

COLUMNS = ("prompt", "completion", "chosen", "rejected")
TRAIN_ROWS, HELDOUT_ROWS = 64, 16  # of each source; several batches, and quick to pack
# Words are made of these: of no meaning, but with characters of one to three bytes, as in text.
SYLLABLES = (*(a + b for a in "bcdfghklmnprstvz" for b in "aeiouy"), "é", "ß", "你好", "42", "7")


def is_here(source: Any) -> bool:
    """Whether a source has anything to read on this machine; one without a pattern needs no files."""
    pattern = getattr(source, "pattern", None)
    return pattern is None or any(os.path.isfile(path) for path in glob.iglob(pattern, recursive=True))


def count_of(split: str) -> int:
    """How many documents or rows of a split are enough."""
    check_split(split)
    return TRAIN_ROWS if split == "train" else HELDOUT_ROWS


def cut(text: str, size: int) -> str:
    """The start of a text, at most ``size`` bytes of UTF-8 but at least one character; 0: the whole text."""
    if not size:
        return text
    return text.encode("utf-8", "surrogatepass")[:size].decode("utf-8", "ignore") or text[:1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """The first documents or rows of each split of ``source``, each text cut to ``size`` bytes (0: whole).

    What is wrong with them is reported as by the source itself: a missing column, a line that is no JSON.
    """

    source: Any
    size: int = 0

    def documents(self, split: str) -> Iterator[str]:
        for _, text in zip(range(count_of(split)), self.source.documents(split), strict=False):
            yield cut(text, self.size)

    def rows(self, split: str, columns: Sequence[str] = ()) -> Iterator[Row]:
        for _, row in zip(range(count_of(split)), self.source.rows(split, columns), strict=False):
            yield self._short(dict(row))

    def _short(self, row: Row) -> Row:
        if self.size and "chosen" in row and "rejected" in row:
            # Two sides that begin alike must not become the same: pairs that read the same are dropped.
            alike = itertools.takewhile(
                lambda pair: pair[0] == pair[1], zip(row["chosen"], row["rejected"], strict=False)
            )
            start = max(sum(1 for _ in alike) - 1, 0)
            row |= {name: row[name][start:] for name in ("chosen", "rejected")}
        return row | {name: cut(row[name], self.size) for name in COLUMNS if name in row}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MadeUp:
    """Random words, as documents or as rows with every standard column: the same in every process.

    size: bytes of each text, at most.
    """

    size: int

    def _texts(self, split: str, salt: str) -> Iterator[str]:
        for number in range(count_of(split)):
            # Seeded by text, which Python hashes alike everywhere.
            draw = random.Random(f"{split} {salt} {number}")
            words = ["".join(draw.choices(SYLLABLES, k=draw.randint(1, 4))) for _ in range(self.size // 2)]
            yield cut(f"{number} {' '.join(words)}", draw.randint(max(self.size // 2, 1), self.size))

    def documents(self, split: str) -> Iterator[str]:
        return self._texts(split, "document")

    def rows(self, split: str, columns: Sequence[str] = ()) -> Iterator[Row]:
        del columns  # every one that a data set of this package asks for
        for prompt, good, bad in zip(*(self._texts(split, salt) for salt in ("prompt", "good", "bad")), strict=True):
            yield {"prompt": prompt, "completion": good, "chosen": good, "rejected": bad}
