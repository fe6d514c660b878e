"""A source of weights opened: a Hugging Face folder or a GGUF file, as one record."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxtrain.interop.families import FAMILIES
from jaxtrain.interop.family import Family
from jaxtrain.interop.gguf import open_gguf
from jaxtrain.interop.safetensors import PICKLES, Reader, open_safetensors

CONFIG, GENERATION = "config.json", "generation_config.json"
_TOKENIZER_FILES = (
    "tokenizer.json", "*.model", "vocab.json", "encoder.json", "vocab.txt", "*.tiktoken", "tokenizer_config.json",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """Somebody's weights.

    path: the folder or file.  kind: for people.  fields: what config.json says, or would.  reader: the tensors.
    generation: what generation_config.json says; empty where there is none.
    tokenizer: builds the tokenizer, or None where the source has none.
    """

    path: Path
    kind: str
    fields: dict[str, Any]
    reader: Reader
    generation: dict[str, Any]
    tokenizer: Callable[[], Any] | None

    def fingerprint(self) -> str:
        """64 hex digits, the same as long as config and the tensors' names, types and shapes stay, in that place."""
        names = sorted(self.reader.names())
        tensors = [(name, str(self.reader.dtype(name)), self.reader.shape(name)) for name in names]
        record = {"path": str(self.path.resolve()), "config": self.fields, "tensors": tensors}
        return hashlib.sha256(json.dumps(record, sort_keys=True, default=str).encode()).hexdigest()


def open_source(source: Path) -> Source:
    """Opens a Hugging Face folder, a GGUF file, or a folder with one GGUF file in it.

    Raises ValueError for anything else, pickles among them.
    """
    if source.is_file():
        if source.suffix == ".gguf":
            return _open_gguf(source)
        if source.suffix in PICKLES:
            raise ValueError(
                f"{source} is a pickle: opening one runs whatever code is in it, so it is refused. Convert it where "
                "you trust its author (transformers' save_pretrained writes safetensors), and give the folder"
            )
        raise ValueError(f"{source} is neither a .gguf file nor a folder; give the folder that holds {CONFIG}")
    if not source.is_dir():
        raise ValueError(f"{source} does not exist: give a Hugging Face folder, a .gguf file or a stage's folder")
    if (source / CONFIG).exists():
        return _open_folder(source)
    files = sorted(source.glob("*.gguf"))
    if len(files) == 1:
        return _open_gguf(files[0])
    found = f"{len(files)} .gguf files; name one" if files else f"no {CONFIG} and no .gguf file"
    raise ValueError(f"{source} is not a folder of weights: it has {found}")


def _open_folder(folder: Path) -> Source:
    from jaxtrain.data.tokenizer_source import source_tokenizer

    fields = read_object(folder / CONFIG)
    if fields.get("quantization_config"):
        method = fields["quantization_config"]
        name = method.get("quant_method", "an unnamed method") if isinstance(method, dict) else method
        raise ValueError(
            f"{folder} is quantised by {name} (quantization_config in {CONFIG}), which is not supported: import the "
            "original weights, or a GGUF file of the model"
        )
    generation = folder / GENERATION
    has_tokenizer = any(next(folder.glob(name), None) for name in _TOKENIZER_FILES)
    return Source(
        path=folder,
        kind="Hugging Face folder",
        fields=fields,
        reader=open_safetensors(folder),
        generation=read_object(generation) if generation.exists() else {},
        tokenizer=(lambda: source_tokenizer(folder)) if has_tokenizer else None,
    )


def _open_gguf(file: Path) -> Source:
    from jaxtrain.data.tokenizer_source import source_tokenizer

    fields, reader, metadata = open_gguf(file)
    return Source(
        path=file,
        kind="GGUF file",
        fields=fields,
        reader=reader,
        generation={},
        tokenizer=(lambda: source_tokenizer(metadata)) if "tokenizer.ggml.tokens" in metadata else None,
    )


def read_object(file: Path) -> dict[str, Any]:
    """A JSON object.  Raises ValueError for a damaged file."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged: it is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file} is damaged: it holds a {type(value).__name__}, not an object")
    return value


def find_family(fields: Mapping[str, Any], where: Path) -> Family:
    """The family of a config.json.  Raises ValueError, with the nearest one, where none is known."""
    kind, classes = fields.get("model_type"), fields.get("architectures") or []
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise ValueError(f"{where}: architectures is {classes!r}; it must be a list of names")
    if kind is None and classes:
        kind = next((family.model_type for family in FAMILIES.values() if classes[0] in family.architectures), None)
    known = isinstance(kind, str) and kind in FAMILIES
    if not known and {"text_config", "vision_config", "audio_config"} & fields.keys():
        inner = fields.get("text_config") or {}
        raise ValueError(
            f"{where} holds {kind!r}, a model of text and more; only text models are supported. Its language model is "
            f"{inner.get('model_type')!r}: save that alone (transformers' language_model) and import it"
        )
    if not known:
        shown = f"{kind!r} ({', '.join(classes)})" if classes else repr(kind)
        near = difflib.get_close_matches(str(kind), FAMILIES, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"{where} is of the unknown architecture {shown}; the nearest that is supported is {near!r} "
            f"({FAMILIES[near].architectures[0]}); all: {', '.join(sorted(FAMILIES))}"
        )
    family = FAMILIES[kind]
    if classes and not set(classes) & set(family.architectures):
        raise ValueError(
            f"{where} holds a {', '.join(classes)}; of {family.name}, {', '.join(family.architectures)} can be imported"
        )
    return family


class RenamedReader:
    """The tensors of ``reader`` under other names.  names: theirs by ours."""

    def __init__(self, reader: Reader, names: Mapping[str, str]):
        self.reader, self.theirs = reader, names

    def names(self) -> set[str]:
        return set(self.theirs)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.reader.shape(self.theirs[name])

    def dtype(self, name: str) -> np.dtype:
        return self.reader.dtype(self.theirs[name])

    def read(self, name: str) -> np.ndarray:
        return self.reader.read(self.theirs[name])


def with_names(reader: Reader, family: Family) -> Reader:
    """``reader`` with the names that the family's rules have: a bare model's prefixed, old endings replaced."""
    bare = family.base_prefix and not any(name.startswith(family.base_prefix) for name in reader.names())
    names = {}
    for theirs in reader.names():
        ours = family.base_prefix + theirs if bare else theirs
        for old, new in family.old_endings.items():
            if ours.endswith(old):
                ours = ours.removesuffix(old) + new
        names[ours] = theirs
    if len(names) < len(reader.names()):
        raise ValueError(f"a {family.name} file has tensors under both their old and their new names")
    return RenamedReader(reader, names)
