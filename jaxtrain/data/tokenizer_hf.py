"""Hugging Face tokenizers: ``tokenizer.json`` and the files beside it, through the ``tokenizers`` library."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers

from jaxtrain.data.chat_template import ChatTemplate
from jaxtrain.data.tokenizer_base import TextTokenizer, check_unicode, files_digest, save_tokenizer, show_bytes

KIND = "huggingface"
TOKENIZER_JSON, CONFIG_JSON, SPECIAL_MAP_JSON = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
TEMPLATE_FILE, TEMPLATE_JSON = "chat_template.jinja", "chat_template.json"
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_LISTS = ("additional_special_tokens", "extra_special_tokens")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_SPACE_MARK = "\u2581"


def json_object(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    """The JSON object in file ``name``; empty where there is no such file."""
    try:
        value = json.loads(files.get(name, b"{}"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{name} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{name} holds a {type(value).__name__}, where an object is wanted")
    return value


def template_source(files: Mapping[str, bytes]) -> str | None:
    """The chat template of a folder: its own file first, then chat_template.json, then tokenizer_config.json."""
    if TEMPLATE_FILE in files:
        return files[TEMPLATE_FILE].decode()
    for name in (TEMPLATE_JSON, CONFIG_JSON):
        template = json_object(files, name).get("chat_template")
        if isinstance(template, list):  # several, by name
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        if template is not None:
            return template
    return None


def named_tokens(files: Mapping[str, bytes]) -> dict[str, str | list[str]]:
    """Special tokens by role (``eos_token``), as the text of each."""

    def content(value: Any) -> str | None:
        return value.get("content") if isinstance(value, dict) else value

    merged = {**json_object(files, SPECIAL_MAP_JSON), **json_object(files, CONFIG_JSON)}
    named: dict[str, Any] = {role: content(merged[role]) for role in _NAMED if merged.get(role) is not None}
    for role in _LISTS:
        values = merged.get(role) or []
        named[role] = [content(value) for value in (values.values() if isinstance(values, dict) else values)]
    return named


def byte_alphabet() -> list[str]:
    """The character that byte-level BPE writes for each byte (Radford et al. 2019, GPT-2)."""
    shown = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in shown else chr(next(others)) for byte in range(256)]


def _parse(text: str) -> tokenizers.Tokenizer:
    try:
        tokenizer = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # noqa: BLE001  (the library raises bare Exception)
        raise ValueError(f"{TOKENIZER_JSON} is not a tokenizer that the tokenizers library reads: {error}") from None
    # They belong to how somebody used it: an encoding of ours is the whole text, and nothing else.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


class HfTokenizer(TextTokenizer):
    """A ``tokenizer.json`` with what the files beside it say about special tokens and chat.

    files: the folder's files by name; ``tokenizer.json`` must be among them.
    stop_ids: further ids that end a text (those of generation_config.json).
    """

    def __init__(self, files: Mapping[str, bytes], stop_ids: Sequence[int] = ()):
        """Raises ValueError for files that make no tokenizer."""
        self._files = dict(files)
        self._settings = {"stop_ids": sorted(set(stop_ids))}
        self.digest = files_digest(KIND, self._files, self._settings)
        if TOKENIZER_JSON not in files:
            raise ValueError(f"{TOKENIZER_JSON} is missing; found {sorted(files)}")
        self._named = named_tokens(files)
        self._full = _parse(self._files[TOKENIZER_JSON].decode())
        self._add_configured()
        self._pieces: dict[int, str] = {i: piece for piece, i in self._full.get_vocab(True).items()}
        self.vocab_size = max(self._pieces, default=-1) + 1
        if not self.vocab_size:
            raise ValueError(f"{TOKENIZER_JSON} has an empty vocabulary")
        ids = {role: self._full.token_to_id(token) for role, token in self._named.items() if role in _NAMED}
        self.bos_id, self.eos_id = ids.get("bos_token"), ids.get("eos_token")
        added = self._full.get_added_tokens_decoder()
        listed = {self._full.token_to_id(token) for role in _LISTS for token in self._named[role]}
        special = {i for i, token in added.items() if token.special} | set(ids.values()) | listed | set(stop_ids)
        self.special_ids = frozenset(special - {None})
        beyond = [i for i in stop_ids if not 0 <= i < self.vocab_size]
        if beyond:
            raise ValueError(f"the stop ids {beyond} are outside the vocabulary of {self.vocab_size} ids")
        self._unk_id = ids.get("unk_token")
        # Its pickled form is its part of tokenizer.json.
        decoder = json.loads(self._full.decoder.__getstate__()) if self._full.decoder else {"decoders": []}
        self._steps: list[dict[str, Any]] = decoder.get("decoders", [decoder])
        self._decoder = self._read_decoder()
        stops = {self.eos_id, *stop_ids} - {None}
        source = template_source(files)
        if source is not None:
            values = {role: token for role, token in self._named.items() if role not in _LISTS}
            self.chat_template = ChatTemplate(source, values)
            self._read_template(added, stops)
        self.stop_ids = tuple(sorted(stops))
        pad = ids.get("pad_token")
        self.pad_id = next((i for i in (pad, self.eos_id, self.bos_id) if i is not None), 0)
        self.prefix_ids, self.suffix_ids = self._around()

    def _add_configured(self) -> None:
        """Adds what tokenizer_config.json knows and tokenizer.json does not, as transformers does."""
        known = self._full.get_added_tokens_decoder()
        listed = json_object(self._files, CONFIG_JSON).get("added_tokens_decoder") or {}
        for i, fields in sorted(listed.items(), key=lambda item: int(item[0])):
            flags = {flag: fields[flag] for flag in _FLAGS if flag in fields}
            token = tokenizers.AddedToken(fields["content"], **flags)
            if repr(known.get(int(i))) != repr(token):
                self._full.add_tokens([token])
        tokens = {token.content for token in self._full.get_added_tokens_decoder().values()}
        for value in self._named.values():
            for token in [value] if isinstance(value, str) else value:
                if token not in tokens:
                    self._full.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False)])

    def _read_template(self, added: Mapping[int, tokenizers.AddedToken], stops: set[int]) -> None:
        """Finds the control tokens that no file marks as such: what a turn is written with.

        Some files do not mark ``<start_of_turn>`` special, or name a ``<|end_of_text|>`` as the eos of a model whose
        turns end in ``<|eot_id|>``.
        """
        assert self.chat_template is not None
        user, assistant = {"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}
        try:
            turn = self.chat_template.render([user])
            both = self.chat_template.render([user, assistant])
        except ValueError:
            return  # it wants other messages; a real conversation will tell what is wrong, if anything
        self.special_ids |= {i for i in self.encode_rendered(turn) if i in added}
        written = both[len(turn) :] if both.startswith(turn) else ""
        _, answer, tail = written.rpartition("a")
        ends = [i for i in self.encode_rendered(tail) if i in self.special_ids] if answer else []
        stops.update(ends[:1])

    def _read_decoder(self) -> tuple[list[bytes], int] | None:
        """The bytes of every id, and how many spaces go at the start; None where the library must decode."""
        steps = self._steps
        kinds = [step["type"] for step in steps]
        pieces = [self._pieces.get(i, "") for i in range(self.vocab_size)]
        if kinds == ["ByteLevel"]:
            byte_of = {character: byte for byte, character in enumerate(byte_alphabet())}

            def spell(piece: str) -> bytes:
                known = all(character in byte_of for character in piece)
                return bytes(byte_of[c] for c in piece) if known else piece.encode()

            return [spell(piece) for piece in pieces], 0
        # The library's ByteFallback gives up on a whole run of bytes for one bad byte, and so takes back text
        # that a stream has shown.
        if "ByteFallback" in kinds and set(kinds) <= {"Replace", "ByteFallback", "Fuse", "Strip"}:
            byte_of = {f"<0x{byte:02X}>": bytes([byte]) for byte in range(256)}
            marks = [step["pattern"].get("String") for step in steps if step["type"] == "Replace"]
            spaces = [step["start"] for step in steps if step["type"] == "Strip"]
            mark = marks[0] if marks else ""
            table = [byte_of.get(p) or (p.replace(mark, " ") if mark else p).encode() for p in pieces]
            return table, sum(spaces)
        return None

    def _around(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        config = json_object(self._files, CONFIG_JSON)
        if "add_bos_token" in config or "add_eos_token" in config:
            bos = self.bos_id if config.get("add_bos_token") else None
            eos = self.eos_id if config.get("add_eos_token") else None
            return (() if bos is None else (bos,)), (() if eos is None else (eos,))
        bare, whole = (self._full.encode("a", add_special_tokens=flag).ids for flag in (False, True))
        for start in range(len(whole) - len(bare) + 1):
            if whole[start : start + len(bare)] == bare:
                return tuple(whole[:start]), tuple(whole[start + len(bare) :])
        return (), ()

    @functools.cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        """The tokenizer for text: no control token can come of it."""
        model = self._full.model
        control = [piece for i, piece in self._pieces.items() if i in self.special_ids]
        if any(token.id in self.special_ids for piece in control for token in model.tokenize(piece)):
            return self._hidden()
        plain = tokenizers.Tokenizer(model)  # shares the model, which may be large
        for part in ("normalizer", "pre_tokenizer"):
            if getattr(self._full, part) is not None:
                setattr(plain, part, getattr(self._full, part))
        for i, token in sorted(self._full.get_added_tokens_decoder().items()):
            special = token.special or i in self.special_ids
            (plain.add_special_tokens if special else plain.add_tokens)([token])
            if plain.token_to_id(token.content) != i:
                return self._hidden()
        plain.encode_special_tokens = True
        return plain

    def _hidden(self) -> tokenizers.Tokenizer:
        """The same for a model whose own vocabulary has control tokens that a text could reach."""
        state = json.loads(self._full.to_str())
        state["post_processor"] = None
        control = {i: self._pieces[i] for i in self.special_ids if i in self._pieces}
        # No text spells these: a piece with another's name can be reached by nothing but the name.
        hidden = {piece: f"\0control {i}\0" for i, piece in control.items()}
        for token in state["added_tokens"]:
            token["special"] = token["special"] or token["id"] in self.special_ids
            token["content"] = hidden.get(token["content"], token["content"])
        model = state["model"]
        if isinstance(model["vocab"], list):
            model["vocab"] = [[hidden.get(piece, piece), score] for piece, score in model["vocab"]]
        else:
            model["vocab"] = {hidden.get(piece, piece): i for piece, i in model["vocab"].items()}
        if model.get("unk_token"):
            model["unk_token"] = hidden.get(model["unk_token"], model["unk_token"])
        if "merges" in model:
            pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
            model["merges"] = [p for p in pairs if not hidden.keys() & {*p, "".join(p)}]
        plain = _parse(json.dumps(state))
        plain.encode_special_tokens = True
        return plain

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        for text in texts:
            check_unicode(text)
        encoded = [found.ids for found in self._plain.encode_batch(list(texts), add_special_tokens=False)]
        for text, ids in zip(texts, encoded, strict=True):
            bad = self.special_ids.intersection(ids) - {self._unk_id}
            if bad:
                raise ValueError(
                    f"the text spells the control tokens {[self.piece(i) for i in sorted(bad)]}: {text[:80]!r}"
                )
        return encoded

    def encode_rendered(self, text: str) -> list[int]:
        check_unicode(text)
        return self._full.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        shown = self.shown_ids(ids)
        if self._decoder is None:
            return self._full.decode(shown, skip_special_tokens=False)
        table, spaces = self._decoder
        data = b"".join([table[i] for i in shown])
        lead = len(data) - len(data.lstrip(b" "))
        return data[min(lead, spaces) :].decode("utf-8", "replace")

    def _bytes_of(self, i: int) -> bytes:
        if i not in self._pieces:
            return b""
        if self._decoder is not None:
            return self._decoder[0][i]
        piece = self._pieces[i]
        prefix = next((step["prefix"] for step in self._steps if step["type"] == "WordPiece"), None)
        if prefix is not None:
            return (piece.removeprefix(prefix) if piece.startswith(prefix) else f" {piece}").encode()
        return piece.replace(_SPACE_MARK, " ").encode()

    def piece(self, i: int) -> str:
        self.shown_ids([i])
        if i in self.special_ids or i not in self._pieces:
            return self._pieces.get(i, f"<id {i}>")
        return show_bytes(self._bytes_of(i))

    def token_bytes(self) -> np.ndarray:
        return np.array(
            [0 if i in self.special_ids else len(self._bytes_of(i)) for i in range(self.vocab_size)], np.int32
        )

    def save(self, directory: str | os.PathLike) -> None:
        save_tokenizer(directory, KIND, self._files, self._settings)

    def export_files(self) -> dict[str, bytes]:
        return dict(self._files)
