"""Finding the tokenizer of a model that somebody else made: in a Hugging Face folder, or in a GGUF file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxtrain.data.tokenizer_base import TextTokenizer
from jaxtrain.data.tokenizer_convert import byte_level_files, wordpiece_files
from jaxtrain.data.tokenizer_gguf import gguf_tokenizer
from jaxtrain.data.tokenizer_hf import (
    CONFIG_JSON,
    SPECIAL_MAP_JSON,
    TEMPLATE_FILE,
    TEMPLATE_JSON,
    TOKENIZER_JSON,
    HfTokenizer,
    json_object,
)
from jaxtrain.data.tokenizer_sentencepiece import SentencePieceTokenizer
from jaxtrain.data.tokenizer_tiktoken import is_ranks, tiktoken_tokenizer

_BESIDE = (CONFIG_JSON, SPECIAL_MAP_JSON, TEMPLATE_FILE, TEMPLATE_JSON)
_GENERATION = "generation_config.json"
_PAIRS = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
_SOUGHT = (
    f"{TOKENIZER_JSON}, a SentencePiece *.model, vocab.json with merges.txt, encoder.json with vocab.bpe, vocab.txt, "
    "*.tiktoken"
)


def source_tokenizer(source: str | os.PathLike | Mapping[str, Any]) -> TextTokenizer:
    """The tokenizer of a Hugging Face folder, or of a GGUF file's metadata (a dict).

    Of several forms in a folder, the first of tokenizer.json, SentencePiece, vocab and merges, vocab.txt, tiktoken is
    taken.  Raises ValueError where there is none, or where it needs code of its own.
    """
    if isinstance(source, Mapping):
        return gguf_tokenizer(source)
    folder = Path(source)
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; a tokenizer is sought in the folder of its files")
    files = {name: (folder / name).read_bytes() for name in _BESIDE if (folder / name).is_file()}
    stops = _stop_ids(folder)
    if (folder / TOKENIZER_JSON).is_file():
        files[TOKENIZER_JSON] = (folder / TOKENIZER_JSON).read_bytes()
        return HfTokenizer(files, stops)
    models = sorted(folder.glob("*.model"))
    if models:
        data = models[0].read_bytes()
        if is_ranks(data):
            return tiktoken_tokenizer(data, files=files, stop_ids=stops)
        return SentencePieceTokenizer({**files, "tokenizer.model": data}, stops)
    for vocab, merges in _PAIRS:
        if (folder / vocab).is_file() and (folder / merges).is_file():
            pair = (folder / vocab).read_bytes(), (folder / merges).read_bytes()
            return HfTokenizer(byte_level_files(*pair, files), stops)
    if (folder / "vocab.txt").is_file():
        return HfTokenizer(wordpiece_files((folder / "vocab.txt").read_bytes(), files), stops)
    ranks = sorted(folder.glob("*.tiktoken"))
    if ranks:
        return tiktoken_tokenizer(ranks[0].read_bytes(), files=files, stop_ids=stops)
    if "auto_map" in json_object(files, CONFIG_JSON):
        raise ValueError(
            f"the tokenizer in {folder} needs code of its own ({CONFIG_JSON} has an auto_map), which is never run; "
            f"save it in one of these forms: {_SOUGHT}"
        )
    raise ValueError(f"no tokenizer in {folder}: looked for {_SOUGHT}")


def _stop_ids(folder: Path) -> tuple[int, ...]:
    path = folder / _GENERATION
    if not path.is_file():
        return ()
    ids = json_object({_GENERATION: path.read_bytes()}, _GENERATION).get("eos_token_id")
    ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
    if any(not isinstance(i, int) or i < 0 for i in ids):
        raise ValueError(f"{path}: eos_token_id is {ids}; want ids")
    return tuple(ids)
