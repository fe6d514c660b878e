"""Any SentencePiece model (Llama 2, Mistral, Gemma, T5), with the special tokens of the files beside it."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import sentencepiece

from jaxtrain.data.chat_template import ChatTemplate
from jaxtrain.data.tokenizer_base import TextTokenizer, check_unicode, files_digest, save_tokenizer
from jaxtrain.data.tokenizer_hf import CONFIG_JSON, json_object, named_tokens, template_source

KIND = "sentencepiece"
MODEL_FILE = "tokenizer.model"
_SPACE_MARK = "\u2581"
# Classes whose ids are not those of their model file.
_SHIFTED = ("XLMRoberta", "Camembert", "MBart", "MBart50", "NllbTokenizer", "Barthez", "XGLM", "BigBird", "Pegasus")


class SentencePieceTokenizer(TextTokenizer):
    """A SentencePiece model with its own ids, and added tokens after them.

    files: the folder's files by name; ``tokenizer.model`` must be among them.
    stop_ids: further ids that end a text (those of generation_config.json).
    """

    def __init__(self, files: Mapping[str, bytes], stop_ids: Sequence[int] = ()):
        """Raises ValueError for files that make no tokenizer, or one whose ids are not its model's."""
        self._files, self._settings = dict(files), {"stop_ids": sorted(set(stop_ids))}
        self.digest = files_digest(KIND, self._files, self._settings)
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=files[MODEL_FILE])
        except RuntimeError as error:
            raise ValueError(f"{MODEL_FILE} is not a SentencePiece model: {error}") from None
        config = json_object(files, CONFIG_JSON)
        kind = str(config.get("tokenizer_class", "")).removesuffix("Fast").removesuffix("Tokenizer")
        if kind in _SHIFTED:
            raise ValueError(f"the ids of a {config['tokenizer_class']} are not its model's; save it as tokenizer.json")
        size = self._processor.vocab_size()
        self._pieces = [self._processor.id_to_piece(i) for i in range(size)]
        ids = {piece: i for i, piece in reversed(list(enumerate(self._pieces)))}
        control = {i for i in range(size) if self._processor.is_control(i) or self._processor.is_unknown(i)}
        control |= self._add_tokens(config, kind, ids)
        self.vocab_size = len(self._pieces)
        roles = {role: ids.get(token) for role, token in self._named.items() if isinstance(token, str)}
        self.bos_id, self.eos_id = roles.get("bos_token"), roles.get("eos_token")
        beyond = [i for i in stop_ids if not 0 <= i < self.vocab_size]
        if beyond:
            raise ValueError(f"the stop ids {beyond} are outside the vocabulary of {self.vocab_size} ids")
        listed = {ids.get(token) for values in self._named.values() if isinstance(values, list) for token in values}
        self._unk_id = self._processor.unk_id()
        self.special_ids = frozenset((control | set(roles.values()) | listed | set(stop_ids)) - {None})
        self.stop_ids = tuple(sorted({self.eos_id, *stop_ids} - {None}))
        pad = roles.get("pad_token")
        self.pad_id = next((i for i in (pad, self.eos_id, self.bos_id) if i is not None), 0)
        # T5's texts end with eos, the others' begin with bos.
        ends = config.get("add_eos_token", kind in ("T5", "MT5") or self.bos_id is None)
        begins = config.get("add_bos_token", not kind.endswith("T5"))
        self.prefix_ids = (self.bos_id,) if begins and self.bos_id is not None else ()
        self.suffix_ids = (self.eos_id,) if ends and self.eos_id is not None else ()
        # "legacy" (the default) gives every part between special tokens the space that belongs to a text's start.
        self._legacy = bool(config.get("legacy", True))
        source = template_source(files)
        if source is not None:
            values = {role: token for role, token in self._named.items() if isinstance(token, str)}
            self.chat_template = ChatTemplate(source, values)

    def _add_tokens(self, config: Mapping[str, Any], kind: str, ids: dict[str, int]) -> set[int]:
        """Fills in named tokens and those that come after the model's; returns the ids of special ones."""
        model = {"bos_token": self._processor.bos_id(), "eos_token": self._processor.eos_id()}
        model |= {"unk_token": self._processor.unk_id(), "pad_token": self._processor.pad_id()}
        self._named: dict[str, Any] = {role: self._pieces[i] for role, i in model.items() if i >= 0}
        self._named |= named_tokens(self._files)
        size, special = len(self._pieces), set()
        added = {int(i): entry for i, entry in (config.get("added_tokens_decoder") or {}).items()}
        if kind in ("T5", "MT5") and not any(i >= size for i in added):
            count = int(config.get("extra_ids", 100))
            added |= {size + i: {"content": f"<extra_id_{count - 1 - i}>", "special": True} for i in range(count)}
        for i, entry in sorted(added.items()):
            if i >= len(self._pieces) + 1 or (i < size and self._pieces[i] != entry["content"]):
                raise ValueError(
                    f"the added token {entry['content']!r} has the id {i}, and the model {size} pieces without it there"
                )
            if i == len(self._pieces):
                self._pieces.append(entry["content"])
                ids[entry["content"]] = i
            if entry.get("special"):
                special.add(i)
        for value in self._named.values():
            for token in [value] if isinstance(value, str) else value:
                if token not in ids:
                    ids[token] = len(self._pieces)
                    self._pieces.append(token)
                    special.add(ids[token])
        return special

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        for text in texts:
            check_unicode(text)
        threads = max(1, min(len(texts), os.cpu_count() or 1))
        encoded = self._processor.encode(list(texts), num_threads=threads) if texts else []
        control = self.special_ids - {self._unk_id}
        # A model may have control tokens among the pieces that it looks for first.
        return [ids if control.isdisjoint(ids) else self._apart(text) for text, ids in zip(texts, encoded, strict=True)]

    def _apart(self, text: str) -> list[int]:
        """The ids of a text that spells control tokens, cut behind their first characters."""
        ends = [0, *(found.start() + 1 for found in self.control_pattern.finditer(text)), len(text)]
        parts = [text[a:b] for a, b in itertools.pairwise(ends)]
        ids = self._processor.encode(parts[0])
        for part in parts[1:]:
            ids += self._after(part)
        if not (self.special_ids - {self._unk_id}).isdisjoint(ids):
            raise ValueError(f"the text spells control tokens: {text[:80]!r}")
        return ids

    def _after(self, text: str) -> list[int]:
        """The ids of a text that another stands before: without the space that begins a text."""
        start = self._processor.encode("a")
        ids = self._processor.encode(f"a{text}")
        return ids[len(start) :] if ids[: len(start)] == start else self._processor.encode(text)

    def encode_rendered(self, text: str) -> list[int]:
        check_unicode(text)
        ids: list[int] = []
        end = 0
        names = {self.piece(i): i for i in self.special_ids}
        for found in [*self.control_pattern.finditer(text), None]:
            part = text[end : found.start() if found else len(text)]
            if part:
                ids += self._processor.encode(part) if self._legacy or not end else self._after(part)
            if found:
                ids.append(names[found[0]])
                end = found.end()
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        size, shown = self._processor.vocab_size(), self.shown_ids(ids)
        text, run = "", []
        for i in [*shown, None]:
            if i is not None and i < size:
                run.append(i)
                continue
            text += self._processor.decode(run) if run else ""
            run = []
            text += self._pieces[i] if i is not None else ""
        return text

    def piece(self, i: int) -> str:
        self.shown_ids([i])
        if i >= self.vocab_size:
            return f"<id {i}>"
        return self._pieces[i] if i in self.special_ids else self._pieces[i].replace(_SPACE_MARK, " ")

    def token_bytes(self) -> np.ndarray:
        size = self._processor.vocab_size()
        byte = [i < size and self._processor.is_byte(i) for i in range(self.vocab_size)]
        counts = [1 if byte[i] else len(self.piece(i).encode()) for i in range(self.vocab_size)]
        return np.array([0 if i in self.special_ids else n for i, n in enumerate(counts)], np.int32)

    def save(self, directory: str | os.PathLike) -> None:
        save_tokenizer(directory, KIND, self._files, self._settings)

    def export_files(self) -> dict[str, bytes]:
        from tokenizers import processors

        from jaxtrain.data.tokenizer_convert import add_tokens, folder_files
        from jaxtrain.data.tokenizer_export import sentencepiece_json

        tokenizer = sentencepiece_json(self._files[MODEL_FILE])
        for i, piece in enumerate(self._pieces):
            # In order, so that each gets its own id.
            if i in self.special_ids:
                add_tokens(tokenizer, [piece])
            elif i >= self._processor.vocab_size():
                add_tokens(tokenizer, [], [piece])
        around = [*self.prefix_ids, *self.suffix_ids]
        names = [[self._pieces[i] for i in ids] for ids in (self.prefix_ids, self.suffix_ids)]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=" ".join([*names[0], "$A", *names[1]]), special_tokens=[(self._pieces[i], i) for i in around]
        )
        roles = {role: token for role, token in self._named.items() if isinstance(token, str)}
        return folder_files(tokenizer, roles, self._files)
