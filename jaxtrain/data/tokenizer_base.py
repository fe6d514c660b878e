"""What every tokenizer can do, whatever library is behind it, and how it streams and is stored."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from jaxtrain.data.chat_template import ChatTemplate

META_FILE = "jaxtrain_tokenizer.json"


class TextTokenizer:
    """Text to ids and back.

    vocab_size: one more than the largest id.
    digest: sha256 (hex) of all that decides the ids, the chat template included.
    pad_id: fills unused places; nothing may depend on which id it is.
    bos_id, eos_id: None where the tokenizer has none.
    stop_ids: ids that end a turn or a text.
    prefix_ids, suffix_ids: what belongs before and after a text that the model reads as a whole
        (``<bos>``; ``[CLS]`` and ``[SEP]``; nothing).
    special_ids: control ids.  ``encode`` never gives one, ``decode`` drops them.
    chat_template: None where there is none (a base model), or where the chat format is our own.
    """

    vocab_size: int
    digest: str
    pad_id: int
    bos_id: int | None
    eos_id: int | None
    stop_ids: tuple[int, ...]
    prefix_ids: tuple[int, ...] = ()
    suffix_ids: tuple[int, ...] = ()
    special_ids: frozenset[int] = frozenset()
    chat_template: ChatTemplate | None = None

    def encode(self, text: str) -> list[int]:
        """The ids of ``text``; what spells a special token stays text.  ValueError for a lone surrogate."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """``[encode(text) for text in texts]``, on several threads."""
        raise NotImplementedError

    def encode_rendered(self, text: str) -> list[int]:
        """The ids of a rendered chat template: what spells a special token becomes its id."""
        raise NotImplementedError

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids``; bytes that are not UTF-8 become U+FFFD.

        Control ids are dropped, and ids beyond the vocabulary, as a model with a padded vocabulary may write them.

        Raises ValueError for a negative id.
        """
        raise NotImplementedError

    def piece(self, i: int) -> str:
        """What id ``i`` stands for, for display: its text, a control's name, or ``<0xE2>`` for a byte.

        An id beyond the vocabulary, as a padded model may have, gives ``<id 50300>``.  ValueError for a negative one.
        """
        raise NotImplementedError

    def token_bytes(self) -> np.ndarray:
        """int32 ``[vocab_size]``: how many UTF-8 bytes of text each id stands for; 0 for control ids."""
        raise NotImplementedError

    def save(self, directory: str | os.PathLike) -> None:
        """Writes it to ``directory``, for ``load_tokenizer``."""
        raise NotImplementedError

    def export_files(self) -> dict[str, bytes]:
        """The files of a Hugging Face folder, by name, which ``transformers`` loads as this tokenizer."""
        raise NotImplementedError

    def text_ids(self, text: str) -> list[int]:
        """What a model reads before it continues ``text``; never empty.

        Raises ValueError for no text where the tokenizer has nothing to begin a text with.
        """
        ids = [*self.prefix_ids, *self.encode(text)]
        start = self.eos_id if self.bos_id is None else self.bos_id
        if not ids and start is None:
            raise ValueError("the text is empty, and the tokenizer has no bos or eos to begin with; give some text")
        return ids or [start]

    def document_ids(self) -> tuple[int, int]:
        """The ids that stand before and after a document of a pretraining corpus.

        Raises ValueError where the tokenizer has no eos.
        """
        if self.eos_id is None:
            raise ValueError(
                "the tokenizer has no end-of-text id, so a model could not learn where documents end; "
                "name an eos_token in its tokenizer_config.json"
            )
        return (self.prefix_ids[-1] if self.prefix_ids else self.eos_id), self.eos_id

    def chat_prompt(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """chat.chat_ids: what the model reads before it answers the last message."""
        from jaxtrain.data.chat import chat_ids

        return chat_ids(self, messages)

    @functools.cached_property
    def control_pattern(self) -> re.Pattern[str]:
        """Matches the spelling of any control token."""
        names = sorted(filter(None, map(self.piece, self.special_ids)), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names)) or "(?!)")  # (?!) matches nothing

    def shown_ids(self, ids: Iterable[int]) -> list[int]:
        """Those of ``ids`` that stand for text.  Raises ValueError for a negative one."""
        ids = [int(i) for i in ids]
        if any(i < 0 for i in ids):
            raise ValueError(f"id {min(ids)} is negative; the vocabulary has the ids 0 to {self.vocab_size - 1}")
        return [i for i in ids if i < self.vocab_size and i not in self.special_ids]


class StreamDecoder:
    """Decodes ids as they come: what ``push`` and ``finish`` return adds up to ``tokenizer.decode`` of all ids.

    A character is shown when its last byte is there.
    """

    def __init__(self, tokenizer: TextTokenizer):
        self._tokenizer = tokenizer
        # decode() of ids[shown:] would not know that it is not the start of the text, where libraries drop a
        # space; so a little of what is shown already is decoded again, and cut off.
        self._ids: list[int] = []
        self._shown_ids = 0

    def push(self, i: int) -> str:
        """The text that id ``i`` completes."""
        shown = self._tokenizer.shown_ids([i])
        self._ids += shown
        return self._new(final=False) if shown else ""

    def finish(self) -> str:
        """What is left: the start of a character that never ended, as U+FFFD."""
        return self._new(final=True)

    def _new(self, *, final: bool) -> str:
        decode = self._tokenizer.decode
        old, now = decode(self._ids[: self._shown_ids]), decode(self._ids)
        if not final and now.endswith("\ufffd"):
            return ""
        last = self._ids[self._shown_ids :]
        # Enough to know what stands before: something other than space, and whole characters.
        if decode(last).strip():
            self._ids = last
        self._shown_ids = len(self._ids)
        return now[len(old) :]


def check_unicode(text: str) -> None:
    """Raises ValueError, with the place, for a lone surrogate: such text has no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text has a lone surrogate (U+{ord(text[error.start]):04X}) at character {error.start}, "
            f"which is not valid Unicode: {text[max(error.start - 20, 0) : error.start + 20]!r}"
        ) from None


def show_bytes(data: bytes) -> str:
    """Text where ``data`` is UTF-8, else each byte as ``<0xE2>``."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "".join(f"<0x{byte:02X}>" for byte in data)


def files_digest(kind: str, files: Mapping[str, bytes], settings: Mapping[str, Any]) -> str:
    """sha256 (hex) of a kind of tokenizer, its files and its settings."""
    content = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    text = json.dumps([kind, content, dict(settings)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def save_files(directory: str | os.PathLike, files: Mapping[str, bytes]) -> None:
    """Writes every file, each of them at once.  What another kind of tokenizer said of the folder goes."""
    os.makedirs(directory, exist_ok=True)
    meta = os.path.join(directory, META_FILE)
    if META_FILE not in files and os.path.exists(meta):
        os.remove(meta)
    for name, data in files.items():
        path = os.path.join(directory, name)
        with open(f"{path}.tmp", "wb") as file:
            file.write(data)
        os.replace(f"{path}.tmp", path)


def save_tokenizer(
    directory: str | os.PathLike, kind: str, files: Mapping[str, bytes], settings: Mapping[str, Any]
) -> None:
    """The files, and META_FILE: kind, digest, their names, and the settings that no file of theirs holds."""
    meta = {
        "kind": kind,
        "digest": files_digest(kind, files, settings),
        "files": sorted(files),
        "settings": dict(settings),
    }
    save_files(directory, {**files, META_FILE: json.dumps(meta, indent=1).encode()})


def read_saved(directory: str | os.PathLike) -> tuple[str, dict[str, bytes], dict[str, Any]] | None:
    """Kind, files and settings of save_tokenizer; None where ``directory`` has no META_FILE.

    Raises ValueError where it is damaged.
    """
    path = os.path.join(directory, META_FILE)
    try:
        with open(path, "rb") as file:
            meta = json.load(file)
        kind, digest, names, settings = (meta[key] for key in ("kind", "digest", "files", "settings"))
        known = isinstance(kind, str) and all(os.path.basename(name) == name for name in names)
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError):
        known = False
    if not known:
        raise ValueError(f"{path} is damaged; import the tokenizer again")
    files = {}
    for name in names:
        try:
            with open(os.path.join(directory, name), "rb") as file:
                files[name] = file.read()
        except (FileNotFoundError, IsADirectoryError):
            raise ValueError(f"the tokenizer in {os.fspath(directory)!r} is damaged: {name} is missing") from None
    if files_digest(kind, files, settings) != digest:
        raise ValueError(f"the tokenizer in {os.fspath(directory)!r} is damaged: the digest of {names} is not {digest}")
    return kind, files, settings
