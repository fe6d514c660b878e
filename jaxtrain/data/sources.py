"""Where text and rows come from: plain files and JSON Lines, split into train and held-out by content.

A *text source* has ``documents(split) -> Iterator[str]``.  A *row source* has
``rows(split, columns) -> Iterator[dict]``, where ``columns`` are those that the caller cannot do without.
``split`` is ``'train'`` or ``'heldout'``.  What is held out depends on the content alone, so it does not move
when files are renamed, reordered or added, and exact duplicates always fall on the same side.
"""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

SPLITS = ("train", "heldout")

Row = dict[str, Any]


class TextSource(Protocol):
    def documents(self, split: str) -> Iterator[str]: ...


class RowSource(Protocol):
    def rows(self, split: str, columns: Sequence[str] = ()) -> Iterator[Row]: ...


def hash_int(*texts: str) -> int:
    """64 bits of SHA-256 over ``texts``: the same on every machine, unlike ``hash``."""
    digest = hashlib.sha256("\x1f".join(texts).encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big")


def split_of(key: str, heldout_fraction: float) -> str:
    """The split that content ``key`` belongs to.  Held-out sets are nested in ``heldout_fraction``."""
    return "heldout" if hash_int(key) < heldout_fraction * 2.0**64 else "train"


def check_split(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; it must be one of {', '.join(map(repr, SPLITS))}")


def _check_fraction(fraction: float) -> None:
    if not 0.0 < fraction < 1.0:
        raise ValueError(f"heldout_fraction is {fraction}; it must lie strictly between 0 and 1")


def _find(pattern: str) -> list[str]:
    """The files that ``pattern`` matches, sorted.  Raises ValueError when there are none."""
    paths = sorted(path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))
    if not paths:
        raise ValueError(f"no file matches the pattern {pattern!r} (looked from {os.getcwd()})")
    return paths


def decode_utf8(data: bytes, where: str) -> str:
    """``data`` as text.  Raises ValueError with ``where`` and the byte offset when it is not UTF-8."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        found = data[error.start : error.start + 4].hex(" ")
        raise ValueError(
            f"{where}: invalid UTF-8 at byte {error.start} (bytes {found}: {error.reason}); convert the file to UTF-8"
        ) from None


def _cut(text: str, limit: int) -> Iterator[str]:
    """Pieces of ``text``, at most ``limit`` characters each, cut at a blank line or a line's end if any."""
    start = 0
    while len(text) - start > limit:
        end = start + limit
        for separator in ("\n\n", "\n"):
            # Not in the first half: a cut there would make slivers.
            found = text.rfind(separator, start + limit // 2, end)
            if found >= 0:
                end = found + len(separator)
                break
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextFiles:
    """Plain UTF-8 files.  Their bytes are kept as they are: tabs, CRLF and runs of spaces survive.

    pattern: a glob; ``**`` crosses folders.
    max_document_chars: longer files are cut into documents of at most this many characters, at blank lines
        where there are some, so that one large file still has a held-out part.
    heldout_fraction: the expected share of documents that are held out.

    Raises ValueError naming the file and byte offset of invalid UTF-8, and naming the pattern when it matches
    no file or only empty ones.
    """

    pattern: str
    max_document_chars: int = 16_384
    heldout_fraction: float = 0.1

    def __post_init__(self):
        _check_fraction(self.heldout_fraction)
        if self.max_document_chars < 1:
            raise ValueError(f"max_document_chars is {self.max_document_chars}; it must be at least 1")

    def documents(self, split: str) -> Iterator[str]:
        check_split(split)
        empty = True
        for path in _find(self.pattern):
            with open(path, "rb") as file:
                text = decode_utf8(file.read(), path)
            for document in _cut(text, self.max_document_chars):
                empty = False
                if split_of(document, self.heldout_fraction) == split:
                    yield document
        if empty:
            raise ValueError(f"every file that matches the pattern {self.pattern!r} is empty")


def _json_rows(pattern: str) -> Iterator[tuple[str, Row]]:
    """(``file:line``, row) of every line that is not blank, in file order."""
    empty = True
    for path in _find(pattern):
        with open(path, "rb") as file:
            for number, data in enumerate(file, start=1):
                where = f"{path}:{number}"
                line = decode_utf8(data, where)
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    problem = f"not valid JSON at column {error.colno}: {error.msg}"
                    raise ValueError(f"{where}: {problem}") from None
                if not isinstance(row, dict):
                    raise ValueError(f"{where}: expected a JSON object, found {type(row).__name__}")
                empty = False
                yield where, row
    if empty:
        raise ValueError(f"every file that matches the pattern {pattern!r} is empty")


def _check_columns(where: str, row: Row, columns: Sequence[str]) -> None:
    missing = [name for name in columns if name not in row]
    if missing:
        found = ", ".join(map(repr, row)) or "none"
        raise ValueError(f"{where}: column {missing[0]!r} is missing; columns found: {found}")


def _check_text(where: str, row: Row, name: str) -> None:
    value = row[name]
    if not isinstance(value, str):
        raise ValueError(f"{where}: column {name!r} must be a string, found {type(value).__name__}")
    if not value:
        raise ValueError(f"{where}: column {name!r} is empty")


@dataclasses.dataclass(frozen=True, kw_only=True)
class JsonLinesText:
    """One document a line: the string in column ``field`` of each JSON object.

    Raises ValueError naming ``file:line`` for a line that is not a JSON object with that column, and naming
    ``pattern`` when it matches nothing.
    """

    pattern: str
    field: str = "text"
    heldout_fraction: float = 0.1

    def __post_init__(self):
        _check_fraction(self.heldout_fraction)

    def documents(self, split: str) -> Iterator[str]:
        check_split(split)
        for where, row in _json_rows(self.pattern):
            _check_columns(where, row, (self.field,))
            _check_text(where, row, self.field)
            if split_of(row[self.field], self.heldout_fraction) == split:
                yield row[self.field]


@dataclasses.dataclass(frozen=True, kw_only=True)
class JsonLines:
    """One row a line, in the standard columns; other columns are kept for reward functions.

    ``prompt`` + ``completion`` (instructions), ``prompt`` + ``chosen`` + ``rejected`` and optionally
    ``margin`` (preferences), ``prompt`` (RL).  Rows are split by their prompt, so all rows of a prompt stay
    together.  Errors are those of JsonLinesText.
    """

    pattern: str
    heldout_fraction: float = 0.1

    def __post_init__(self):
        _check_fraction(self.heldout_fraction)

    def rows(self, split: str, columns: Sequence[str] = ()) -> Iterator[Row]:
        check_split(split)
        for where, row in _json_rows(self.pattern):
            _check_columns(where, row, columns)
            for name in ("prompt", "completion", "chosen", "rejected"):
                if name in row:
                    _check_text(where, row, name)
            margin = row.get("margin", 0.0)
            if isinstance(margin, bool) or not isinstance(margin, int | float) or not math.isfinite(margin):
                raise ValueError(f"{where}: column 'margin' must be a finite number, found {margin!r}")
            key = row["prompt"] if "prompt" in row else json.dumps(row, sort_keys=True)
            if split_of(key, self.heldout_fraction) == split:
                yield row
