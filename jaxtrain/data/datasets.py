"""Data sets: a source, tokenized and packed into two folders of fixed rows, and batches of those rows.

``prepare(tokenizer, directory)`` writes ``directory/train`` and ``directory/heldout``, or takes them as they
are when their fingerprint (content, tokenizer, settings) is the same.  ``batch(rows)`` stacks rows into a
record of NumPy arrays that a training step reads.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from jaxtrain.data import chat, packing
from jaxtrain.data.sources import SPLITS, Row, RowSource, TextSource
from jaxtrain.data.store import RecordSource, atomic_directory, write_records
from jaxtrain.data.tokenizer_base import TextTokenizer
from jaxtrain.types import Array, Pairs, Tokens, record

_PREPARED = "prepared.json"
# Part of every fingerprint: raise it when the same text would give other rows.
_VERSION = 1
_CHUNK = 512  # texts handed to the tokenizer's threads at once

Record = dict[str, np.ndarray]
Info = dict[str, Any]
# What packing makes of a split: the fields to store, the texts beside them (or None), and counts.
Packed = tuple[Record, Sequence[Row] | None, Info]


@record
class Prompts:
    """Prompts to be answered, padded on the left so that they end together.

    ids: int32 ``[B, P]``.
    lengths: int32 ``[B]``; the last ``lengths[b]`` ids of row b are the prompt.  0 marks a padding row.
    rows: int32 ``[B]``; where to find the prompt's columns of text: ``RecordSource.texts[row]``.
    """

    ids: Array
    lengths: Array
    rows: Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepared:
    """A data set on disk.

    info: for each split: ``records``; ``documents`` or ``rows`` read; ``bytes`` of their UTF-8 text;
        ``tokens`` (targets that are trained; for prompts, their ids); and what was truncated or dropped.
    """

    train: RecordSource
    heldout: RecordSource
    fingerprint: str
    info: dict[str, Info]


def _chunks(items: Sequence, size: int) -> Iterator[Sequence]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _encode(tokenizer: TextTokenizer, texts: Sequence[str], where: str) -> list[np.ndarray]:
    """Each text's ids as int32, checked against the vocabulary."""
    encoded = []
    for chunk in _chunks(texts, _CHUNK):
        try:
            batch = tokenizer.encode_batch(chunk)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        for ids in batch:
            encoded.append(np.array(ids, np.int32))
            packing.check_ids(encoded[-1], tokenizer.vocab_size, where)
    return encoded


def _conversations(
    tokenizer: TextTokenizer, prompts: Sequence[str], completions: Sequence[str], where: str
) -> list[packing.Example]:
    """Each pair as ids and mask, checked against the vocabulary."""
    examples = []
    for pairs in _chunks(list(zip(prompts, completions, strict=True)), _CHUNK):
        try:
            examples += chat.conversations(tokenizer, *zip(*pairs, strict=True))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    for ids, _ in examples:
        packing.check_ids(ids, tokenizer.vocab_size, where)
    return examples


def _size(texts: Iterable[str]) -> int:
    return sum(len(text.encode()) for text in texts)


def _fingerprint(kind: str, settings: Info, tokenizer: TextTokenizer, content: dict[str, Sequence]) -> str:
    head = {"version": _VERSION, "kind": kind, "settings": settings, "tokenizer": tokenizer.digest}
    digest = hashlib.sha256(json.dumps(head, sort_keys=True).encode())
    for split in SPLITS:
        for item in content[split]:
            # JSON marks where an item ends, so that moving text from one document to the next shows.
            digest.update(json.dumps([split, item], sort_keys=True).encode())
    return digest.hexdigest()


def _reusable(directory: str | os.PathLike, fingerprint: str | None) -> Prepared | None:
    """The data already in ``directory`` if it has this fingerprint (None: any)."""
    try:
        with open(os.path.join(directory, _PREPARED), encoding="utf-8") as file:
            found = json.load(file)
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file.name} is damaged ({error}); delete {directory} and run again") from None
    if fingerprint not in (None, found["fingerprint"]):
        return None
    sources = {split: RecordSource(os.path.join(directory, split)) for split in SPLITS}
    return Prepared(**sources, fingerprint=found["fingerprint"], info=found["info"])


def open_prepared(directory: str | os.PathLike) -> Prepared:
    """What ``prepare`` has written to ``directory``.  Raises ValueError where there is nothing."""
    prepared = _reusable(directory, None)
    if prepared is None:
        raise ValueError(f"{directory} holds no prepared data (there is no {_PREPARED})")
    return prepared


def _prepare(
    dataset: Any,
    tokenizer: TextTokenizer,
    directory: str | os.PathLike,
    content: dict[str, Sequence],
    pack: Callable[[Sequence, str], Packed],
) -> Prepared:
    directory = os.fspath(directory)
    for split in SPLITS:
        if not content[split]:
            raise ValueError(
                f"{dataset.source} has no {split} data; give more of it, or change the source's heldout_fraction"
            )
    settings = {
        field.name: getattr(dataset, field.name) for field in dataclasses.fields(dataset) if field.name != "source"
    }
    fingerprint = _fingerprint(type(dataset).__name__, settings, tokenizer, content)
    if prepared := _reusable(directory, fingerprint):
        return prepared
    info: dict[str, Info] = {}
    with atomic_directory(directory) as temporary:
        for split in SPLITS:
            fields, texts, info[split] = pack(content[split], f"{dataset.source} ({split})")
            count = len(next(iter(fields.values())))
            if not count:
                raise ValueError(f"nothing is left of the {split} data of {dataset.source}: {info[split]}")
            info[split]["records"] = count
            folder = os.path.join(temporary, split)
            os.mkdir(folder)
            write_records(folder, fields, fingerprint=fingerprint, texts=texts)
        with open(os.path.join(temporary, _PREPARED), "w", encoding="utf-8") as file:
            json.dump({"fingerprint": fingerprint, "settings": settings, "info": info}, file, indent=1)
    prepared = _reusable(directory, fingerprint)
    assert prepared is not None
    return prepared


def _row_content(source: RowSource, columns: Sequence[str]) -> dict[str, Sequence]:
    return {split: list(source.rows(split, columns)) for split in SPLITS}


def _stack(rows: Sequence[Record], name: str) -> np.ndarray:
    return np.stack([row[name] for row in rows])


def _tokens(rows: Sequence[Record], prefix: str = "") -> Tokens:
    return Tokens(**{name: _stack(rows, prefix + name) for name in packing.TOKEN_FIELDS})


def _check_length(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name} is {value}; it must be at least {least}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextDataset:
    """Documents for causal language modelling, concatenated and cut into rows of ``seq_len``
    (packing.pack_documents).
    """

    source: TextSource
    seq_len: int

    def __post_init__(self):
        _check_length("seq_len", self.seq_len, 2)

    def prepare(self, tokenizer: TextTokenizer, directory: str | os.PathLike) -> Prepared:
        """Raises ValueError, naming the source, when a split of it is empty."""
        content = {split: list(self.source.documents(split)) for split in SPLITS}

        def pack(documents: Sequence[str], where: str) -> Packed:
            start, end = tokenizer.document_ids()
            rows = packing.pack_documents(
                _encode(tokenizer, documents, where),
                self.seq_len,
                bos_id=start,
                eos_id=end,
                pad_id=tokenizer.pad_id,
            )
            tokens = int(rows["weights"].sum(dtype=np.int64))
            return rows, None, {"documents": len(documents), "bytes": _size(documents), "tokens": tokens}

        return _prepare(self, tokenizer, directory, content, pack)

    def batch(self, rows: Sequence[Record]) -> Tokens:
        return _tokens(rows)


@dataclasses.dataclass(frozen=True, kw_only=True)
class InstructionDataset:
    """Rows with ``prompt`` and ``completion``, packed whole into rows of ``seq_len`` (packing.pack_examples).

    Only the completion and the id that ends its turn are trained.  Rows whose prompt fills ``seq_len``
    are dropped and counted in ``info``.
    """

    source: RowSource
    seq_len: int

    def __post_init__(self):
        _check_length("seq_len", self.seq_len, 2)

    def prepare(self, tokenizer: TextTokenizer, directory: str | os.PathLike) -> Prepared:
        """Raises ValueError, naming the source, when a split of it is empty."""

        def pack(content: Sequence[Row], where: str) -> Packed:
            texts = ([row[name] for row in content] for name in ("prompt", "completion"))
            examples = _conversations(tokenizer, *texts, where)
            rows, counts = packing.pack_examples(examples, self.seq_len, pad_id=tokenizer.pad_id)
            tokens = int(rows["weights"].sum(dtype=np.int64))
            size = _size(row["completion"] for row in content)
            return rows, None, {"rows": len(content), "bytes": size, "tokens": tokens, **counts}

        content = _row_content(self.source, ("prompt", "completion"))
        return _prepare(self, tokenizer, directory, content, pack)

    def batch(self, rows: Sequence[Record]) -> Tokens:
        return _tokens(rows)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairDataset:
    """Rows with ``prompt``, ``chosen``, ``rejected`` and optionally ``margin``: one row of ``seq_len`` a side
    (packing.pack_pairs).  Pairs that read the same are dropped and counted in ``info``.

    The reference log-probabilities of a batch are zeros, to be filled in by whoever has the reference policy.
    """

    source: RowSource
    seq_len: int

    def __post_init__(self):
        _check_length("seq_len", self.seq_len, 2)

    def prepare(self, tokenizer: TextTokenizer, directory: str | os.PathLike) -> Prepared:
        """Raises ValueError, naming the source, when a split of it is empty."""

        def pack(content: Sequence[Row], where: str) -> Packed:
            prompts = [row["prompt"] for row in content]
            sides = [
                _conversations(tokenizer, prompts, [row[name] for row in content], where)
                for name in ("chosen", "rejected")
            ]
            pairs = list(zip(*sides, strict=True))
            chosen, rejected, index, counts = packing.pack_pairs(pairs, self.seq_len, pad_id=tokenizer.pad_id)
            kept = [content[i] for i in index]
            fields = {f"chosen/{name}": values for name, values in chosen.items()}
            fields |= {f"rejected/{name}": values for name, values in rejected.items()}
            fields["margin"] = np.array([row.get("margin", 0.0) for row in kept], np.float32)
            fields["weight"] = np.ones(len(kept), np.float32)
            tokens = int(chosen["weights"].sum(dtype=np.int64) + rejected["weights"].sum(dtype=np.int64))
            size = _size(row[name] for row in content for name in ("chosen", "rejected"))
            return fields, kept, {"rows": len(content), "bytes": size, "tokens": tokens, **counts}

        content = _row_content(self.source, ("prompt", "chosen", "rejected"))
        return _prepare(self, tokenizer, directory, content, pack)

    def batch(self, rows: Sequence[Record]) -> Pairs:
        return Pairs(
            chosen=_tokens(rows, "chosen/"),
            rejected=_tokens(rows, "rejected/"),
            reference_chosen=np.zeros(len(rows), np.float32),
            reference_rejected=np.zeros(len(rows), np.float32),
            margin=_stack(rows, "margin"),
            weight=_stack(rows, "weight"),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptDataset:
    """Rows with a ``prompt``, to be answered by a policy; all columns stay available by ``Prompts.rows``.

    A prompt longer than ``max_prompt_len`` ids keeps the start of its text and all of its chat format, so
    the policy still knows that it is its turn; ``info`` counts these as truncated.
    """

    source: RowSource
    max_prompt_len: int

    def __post_init__(self):
        _check_length("max_prompt_len", self.max_prompt_len, 5)  # four markers and an id of text

    def prepare(self, tokenizer: TextTokenizer, directory: str | os.PathLike) -> Prepared:
        """Raises ValueError, naming the source, when a split of it is empty."""

        def pack(content: Sequence[Row], where: str) -> Packed:
            try:
                cut = chat.cut_prompts(tokenizer, [row["prompt"] for row in content], self.max_prompt_len)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
            prompts = [prompt for prompt, _ in cut]
            for prompt in prompts:
                packing.check_ids(prompt, tokenizer.vocab_size, where)
            ids, lengths = packing.pad_prompts(prompts, self.max_prompt_len, pad_id=tokenizer.pad_id)
            fields = {"ids": ids, "lengths": lengths, "rows": np.arange(len(content), dtype=np.int32)}
            info = {
                "rows": len(content),
                "bytes": _size(row["prompt"] for row in content),
                "tokens": int(lengths.sum(dtype=np.int64)),
                "truncated": sum(shortened for _, shortened in cut),
            }
            return fields, content, info

        return _prepare(self, tokenizer, directory, _row_content(self.source, ("prompt",)), pack)

    def batch(self, rows: Sequence[Record]) -> Prompts:
        return Prompts(**{name: _stack(rows, name) for name in ("ids", "lengths", "rows")})
