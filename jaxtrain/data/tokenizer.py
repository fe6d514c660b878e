"""Our own tokenizer, a lossless SentencePiece BPE, and where a saved tokenizer of any kind is loaded.

Lossless: ``decode(encode(text)) == text`` for every text that is valid Unicode.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import sentencepiece

from jaxtrain.data.sources import TextSource, hash_int
from jaxtrain.data.tokenizer_base import TextTokenizer, check_unicode, read_saved, save_files

_PAD, _BOS, _EOS, _UNK = "<|pad|>", "<|bos|>", "<|eos|>", "<|unk|>"
_USER, _ASSISTANT, _END = "<|user|>", "<|assistant|>", "<|end|>"
_CONTROL = (_PAD, _BOS, _EOS, _USER, _ASSISTANT, _END)

# SentencePiece writes a space as U+2581, so a literal U+2581 would come back as a space: we spell it in
# bytes.
_SPACE_MARK = "\u2581"

# SentencePiece skips longer training sentences without a word; its own default, in bytes.
_SENTENCE_BYTES = 4192

_MODEL_FILE, _META_FILE = "tokenizer.model", "tokenizer.json"


class Tokenizer(TextTokenizer):
    """Text to ids and back.

    Control ids (pad 0, bos, eos, user, assistant, end) are all distinct; no text encodes to one of them, not
    even their own spelling.  What the vocabulary cannot spell becomes single UTF-8 bytes, never unknown.
    """

    def __init__(self, model: bytes):
        """``model``: a serialized model made by SentencePieceBPE.  Raises ValueError for any other."""
        self._model = model
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise ValueError(f"not a SentencePiece model: {error}") from None
        self.digest = hashlib.sha256(model).hexdigest()
        self.vocab_size: int = self._processor.vocab_size()
        pieces = [self._processor.id_to_piece(i) for i in range(self.vocab_size)]
        ids = {piece: i for i, piece in reversed(list(enumerate(pieces)))}
        missing = [piece for piece in (*_CONTROL, "<0x00>", "<0xFF>") if piece not in ids]
        if missing:
            raise ValueError(f"the SentencePiece model lacks the pieces {missing}; train it with SentencePieceBPE")
        self.pad_id, self.bos_id, self.eos_id = ids[_PAD], ids[_BOS], ids[_EOS]
        self.user_id, self.assistant_id, self.end_id = ids[_USER], ids[_ASSISTANT], ids[_END]
        self.stop_ids, self.prefix_ids = (self.end_id, self.eos_id), (self.bos_id,)
        self._control = {piece: ids[piece] for piece in _CONTROL}
        self.special_ids = frozenset([*self._control.values(), ids[_UNK]])
        self._mark_ids = [ids[f"<0x{byte:02X}>"] for byte in _SPACE_MARK.encode()]
        self._bytes = []
        for i, piece in enumerate(pieces):
            if self._processor.is_control(i) or self._processor.is_unknown(i):
                self._bytes.append(b"")
            elif self._processor.is_byte(i):
                self._bytes.append(bytes([int(piece[1:-1], 16)]))
            else:
                self._bytes.append(piece.replace(_SPACE_MARK, " ").encode())
        self._pieces = pieces

    def encode(self, text: str) -> list[int]:
        """The ids of ``text``, without any control id.  Raises ValueError for a lone surrogate."""
        return self.encode_batch([text])[0]

    def encode_rendered(self, text: str) -> list[int]:
        parts = re.split(f"({'|'.join(map(re.escape, _CONTROL))})", text)
        encoded = self.encode_batch(parts[::2])
        ids = encoded[0]
        for name, more in zip(parts[1::2], encoded[1:], strict=True):
            ids += [self._control[name], *more]
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        for text in texts:
            check_unicode(text)
        split = [text.split(_SPACE_MARK) for text in texts]
        parts = [part for pieces in split for part in pieces]
        threads = max(1, min(len(parts), os.cpu_count() or 1))
        encoded = iter(self._processor.encode(parts, num_threads=threads))
        results = []
        for pieces in split:
            ids = next(encoded)
            for _ in pieces[1:]:
                ids += self._mark_ids
                ids += next(encoded)
            results.append(ids)
        return results

    def decode(self, ids: Iterable[int]) -> str:
        return b"".join(self._bytes[i] for i in self.shown_ids(ids)).decode("utf-8", "replace")

    def piece(self, i: int) -> str:
        self.shown_ids([i])
        if i >= self.vocab_size:
            return f"<id {i}>"
        return self._pieces[i].replace(_SPACE_MARK, " ")

    def token_bytes(self) -> np.ndarray:
        return np.array([len(data) for data in self._bytes], np.int32)

    def save(self, directory: str | os.PathLike) -> None:
        meta = {"digest": self.digest, "vocab_size": self.vocab_size}
        save_files(directory, {_MODEL_FILE: self._model, _META_FILE: json.dumps(meta, indent=1).encode()})

    def export_files(self) -> dict[str, bytes]:
        from jaxtrain.data.tokenizer_export import lossless_files

        return lossless_files(self._model)

    @classmethod
    def load(cls, directory: str | os.PathLike) -> Tokenizer:
        """The tokenizer saved in ``directory``.  Raises ValueError when it is missing or damaged."""
        try:
            with open(os.path.join(directory, _MODEL_FILE), "rb") as file:
                model = file.read()
            with open(os.path.join(directory, _META_FILE), "rb") as file:
                digest = json.load(file)["digest"]
        except FileNotFoundError as error:
            raise ValueError(f"no tokenizer in {os.fspath(directory)!r}: {error.filename} is missing") from None
        except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError):
            raise ValueError(f"{os.path.join(directory, _META_FILE)} is damaged; train the tokenizer again") from None
        if hashlib.sha256(model).hexdigest() != digest:
            raise ValueError(f"{os.path.join(directory, _MODEL_FILE)} is damaged: its digest is not {digest}")
        return cls(model)


def _sentences(document: str) -> Iterator[str]:
    """``document`` in pieces short enough for the trainer, cut at line ends where there are some."""
    piece = ""
    for line in document.splitlines(keepends=True):
        # U+2581 cannot be learned (see above).  A NUL would end the sentence inside SentencePiece.
        line = line.replace(_SPACE_MARK, "").replace("\0", "")
        while line:
            head, line = line[: _SENTENCE_BYTES // 4], line[_SENTENCE_BYTES // 4 :]
            if len((piece + head).encode()) > _SENTENCE_BYTES:
                yield piece
                piece = ""
            piece += head
    if piece:
        yield piece


@dataclasses.dataclass(frozen=True, kw_only=True)
class SentencePieceBPE:
    """Trains a Tokenizer on the training split of ``sources``.  Equal texts give a bitwise equal model.

    vocab_size: ids in all, of which 263 are taken (256 bytes, 6 control ids, unknown).
    sources: text sources.
    max_bytes: of UTF-8, for each source; from a larger one, a sample of its documents is drawn by content
        hash.
    character_coverage: the share of characters that get a piece of their own; the rest are spelt in bytes.
    """

    vocab_size: int = 2048
    sources: tuple[TextSource, ...]
    max_bytes: int = 4_000_000
    character_coverage: float = 0.9995

    def __post_init__(self):
        if self.vocab_size <= 256 + len(_CONTROL) + 1:
            raise ValueError(f"vocab_size is {self.vocab_size}; bytes and control ids alone take 263")
        if not self.sources:
            raise ValueError("SentencePieceBPE.sources is empty; name at least one text source")
        if self.max_bytes < 1:
            raise ValueError(f"max_bytes is {self.max_bytes}; it must be at least 1")
        if not 0.0 < self.character_coverage <= 1.0:
            raise ValueError(f"character_coverage is {self.character_coverage}; it must lie in (0, 1]")

    def _texts(self) -> Iterator[str]:
        for source in self.sources:
            total = 0
            for document in source.documents("train"):
                check_unicode(document)
                total += len(document.encode())
            for document in source.documents("train"):
                if total <= self.max_bytes or hash_int("sample", document) < self.max_bytes / total * 2.0**64:
                    yield from _sentences(document)

    def train(self, directory: str | os.PathLike) -> Tokenizer:
        """Trains on the sources, saves to ``directory`` and returns the tokenizer.

        Raises ValueError when the sources are empty, or too small (or too varied) for ``vocab_size``.
        """
        texts = list(self._texts())
        if not texts:
            raise ValueError(f"nothing to train a tokenizer on: {self.sources} have no training text")
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(texts),
                model_writer=model,
                model_type="bpe",
                vocab_size=self.vocab_size,
                character_coverage=self.character_coverage,
                # The four that make it lossless.
                byte_fallback=True,
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                add_dummy_prefix=False,
                allow_whitespace_only_pieces=True,  # indentation in one token
                split_digits=True,
                max_sentence_length=_SENTENCE_BYTES,
                pad_id=0,
                bos_id=1,
                eos_id=2,
                unk_id=3,
                pad_piece=_PAD,
                bos_piece=_BOS,
                eos_piece=_EOS,
                unk_piece=_UNK,
                control_symbols=[_USER, _ASSISTANT, _END],
                num_threads=1,  # so that the result cannot depend on the machine
                minloglevel=2,
            )
        except RuntimeError as error:
            raise ValueError(
                f"cannot train a vocabulary of {self.vocab_size} on {sum(map(len, texts))} characters "
                f"(change vocab_size, or give more text); SentencePiece says: {error}"
            ) from None
        tokenizer = Tokenizer(model.getvalue())
        tokenizer.save(directory)
        return tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class SavedTokenizer:
    """A tokenizer that is there already, so that a run can start from another run's checkpoint.

    directory: a run, one of its stages, or an imported model, or the ``tokenizer`` folder in any of them.
    """

    directory: str

    def load(self) -> TextTokenizer:
        """Raises ValueError when it is missing or damaged."""
        inside = os.path.join(self.directory, "tokenizer")
        return load_tokenizer(inside if os.path.isdir(inside) else self.directory)

    @property
    def vocab_size(self) -> int:
        return self.load().vocab_size


def load_tokenizer(directory: str | os.PathLike) -> TextTokenizer:
    """The tokenizer saved in ``directory``, of whatever kind.  Raises ValueError when it is missing or damaged."""
    saved = read_saved(directory)
    if saved is None:
        return Tokenizer.load(directory)
    # Imported here, since most runs need none of these libraries.
    from jaxtrain.data import tokenizer_hf, tokenizer_sentencepiece

    kind, files, settings = saved
    kinds = {
        tokenizer_hf.KIND: tokenizer_hf.HfTokenizer,
        tokenizer_sentencepiece.KIND: tokenizer_sentencepiece.SentencePieceTokenizer,
    }
    if kind not in kinds:
        raise ValueError(f"the tokenizer in {os.fspath(directory)!r} is of kind {kind!r}; known are {sorted(kinds)}")
    return kinds[kind](files, **settings)
