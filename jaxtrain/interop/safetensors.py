"""The safetensors format, read and written tensor by tensor, so that no more than one is ever in memory.

A file is eight bytes (little-endian length N of the header), N bytes of JSON ``{name: {dtype, shape, data_offsets}}``
and the tensors, which follow each other without holes.  A header comes from a stranger: every number in it is checked
before anything is read by it.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import os
import re
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from jaxtrain.interop.weights import contiguous

MAX_HEADER = 100_000_000
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
OTHERS = (".h5", ".msgpack", ".onnx", ".npz")
DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8,
    "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
CODES = {np.dtype(kind): code for code, kind in DTYPES.items()}


class Reader(Protocol):
    """Tensors by name.  ``read`` gives a fresh array; nothing is kept."""

    def names(self) -> set[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def dtype(self, name: str) -> np.dtype: ...
    def read(self, name: str) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """Where a tensor lies: ``start`` bytes from the beginning of ``file``."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def size(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(file: Path) -> dict[str, Entry]:
    """The tensors of one file.  Raises ValueError, naming the file and the fault, for a damaged one."""

    def damaged(fault: str) -> ValueError:
        return ValueError(f"{file} is damaged: {fault}; fetch it again")

    total = file.stat().st_size
    with file.open("rb") as stream:
        head = stream.read(8)
        if len(head) < 8:
            raise damaged(f"it has {total} bytes, too few for a safetensors header")
        (length,) = struct.unpack("<Q", head)
        if length > MAX_HEADER:
            raise damaged(f"its header claims {length:,} bytes, more than the {MAX_HEADER:,} that are allowed")
        if 8 + length > total:
            raise damaged(f"its header claims {length:,} bytes, but the file has {total:,} in all (truncated?)")
        text = stream.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_no_twins)
    except (ValueError, RecursionError) as error:
        raise damaged(f"its header is not JSON ({error})") from None
    if not isinstance(header, dict):
        raise damaged(f"its header is a {type(header).__name__}, not an object")
    header.pop("__metadata__", None)

    entries: dict[str, Entry] = {}
    ends = 0
    spans = sorted((_span(name, value, damaged), name) for name, value in header.items())
    for (start, end), name in spans:
        code, shape = header[name].get("dtype"), header[name].get("shape")
        if not isinstance(code, str) or code not in DTYPES:
            raise ValueError(f"{file}: tensor {name} has dtype {code!r}; supported are {', '.join(DTYPES)}")
        if not _counts(shape):
            raise damaged(f"tensor {name} has the shape {shape!r}")
        entry = Entry(file=file, dtype=np.dtype(DTYPES[code]), shape=tuple(shape), start=8 + length + start)
        if entry.size != end - start:
            raise damaged(
                f"tensor {name} is {code}{list(shape)}, {entry.size:,} bytes, but takes {end - start:,} in the file"
            )
        if start != ends:
            raise damaged(f"tensor {name} starts at byte {start:,} of the data, where {ends:,} was due")
        ends = end
        entries[name] = entry
    if 8 + length + ends != total:
        raise damaged(f"its tensors end at byte {8 + length + ends:,}, but the file has {total:,} (truncated?)")
    return entries


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        twins = sorted(name for name, count in collections.Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"{twins[:4]} stand in it twice")
    return values


def _counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(n) is int and 0 <= n < 2**63 for n in values)


def _span(name: str, value: Any, damaged: Any) -> tuple[int, int]:
    span = value.get("data_offsets") if isinstance(value, dict) else None
    if not _counts(span) or len(span) != 2 or span[0] > span[1]:
        raise damaged(f"tensor {name} has the offsets {span!r}")
    return span[0], span[1]


class SafetensorsReader:
    """The tensors of some files as one set of names."""

    def __init__(self, entries: Mapping[str, Entry]):
        self.entries = dict(entries)

    def names(self) -> set[str]:
        return set(self.entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.entries[name].shape

    def dtype(self, name: str) -> np.dtype:
        return self.entries[name].dtype

    def read(self, name: str) -> np.ndarray:
        """A fresh array.  Read, not mapped: pages of a mapped file would count as this process's memory."""
        entry = self.entries[name]
        array = np.empty(entry.shape, entry.dtype)
        read_into(entry.file, entry.start, array)
        return array


def read_into(file: Path, start: int, array: np.ndarray) -> None:
    """Fills a contiguous array with the bytes of ``file`` from ``start`` on."""
    view = memoryview(array.reshape(-1).view(np.uint8))
    with file.open("rb", buffering=0) as stream:
        stream.seek(start)
        done = 0
        while done < len(view):
            count = stream.readinto(view[done : done + 2**30])
            if not count:
                raise ValueError(f"{file} ends at byte {start + done:,}, inside a tensor; fetch it again")
            done += count


def open_safetensors(folder: Path) -> SafetensorsReader:
    """The weights of a folder: ``model.safetensors``, or the shards that its index lists.

    Raises ValueError for a folder without any, with pickles only, or whose index and shards do not agree.
    """
    index = folder / INDEX
    if index.exists():
        return SafetensorsReader(_indexed(index))
    files = sorted(folder.glob("*.safetensors"))
    file = folder / SINGLE
    if not file.exists():
        if not files:
            raise ValueError(no_weights(folder))
        if len(files) > 1:
            raise ValueError(
                f"{folder} has {len(files)} safetensors files, but neither {SINGLE} nor {INDEX} that says how they "
                "belong together"
            )
        file = files[0]
    return SafetensorsReader(read_header(file))


def no_weights(folder: Path) -> str:
    """What to say of a folder without safetensors."""
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if pickles:
        return (
            f"{folder} holds {', '.join(pickles[:3])}, which are pickles: opening one runs whatever code is in it, so "
            "it is refused. Convert it where you trust its author: transformers' "
            "AutoModel.from_pretrained(SRC).save_pretrained(DIR) writes safetensors"
        )
    others = sorted(path.name for path in folder.iterdir() if path.suffix in OTHERS)
    found = f" (found {', '.join(others[:3])})" if others else ""
    return f"{folder} has no {SINGLE} and no {INDEX}{found}"


def _indexed(index: Path) -> dict[str, Entry]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{index} is damaged: no weight_map can be read from it ({error!r})") from None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} is damaged: its weight_map is {weight_map!r:.80}")
    for name, shard in weight_map.items():
        # A shard is a file beside the index; anything else would read what the user did not point at.
        if not isinstance(shard, str) or not re.fullmatch(r"(?!\.)[^/\\\0:]+\.safetensors", shard):
            raise ValueError(
                f"{index} puts tensor {name} into {shard!r}, which is not the name of a safetensors file in that folder"
            )
    shards = sorted(set(weight_map.values()))
    missing = [shard for shard in shards if not (index.parent / shard).is_file()]
    if missing:
        raise ValueError(f"{index} lists {len(missing)} shards that are missing: {', '.join(missing[:4])}")
    entries: dict[str, Entry] = {}
    for shard in shards:
        found = read_header(index.parent / shard)
        listed = {name for name, where in weight_map.items() if where == shard}
        for what, names in (("lacks", listed - set(found)), ("has unlisted", set(found) - listed)):
            if names:
                raise ValueError(
                    f"{index.parent / shard} and {index.name} do not agree: the shard {what} {len(names)} tensors: "
                    f"{', '.join(sorted(names)[:4])}"
                )
        entries |= found
    return entries


class SafetensorsWriter:
    """Writes tensors, in any order, to shards whose layout is known beforehand.

    Every file is written under another name and renamed by ``finish``, the index last: a folder with an index (or a
    ``model.safetensors``) is whole.
    """

    def __init__(
        self, folder: Path, plan: Iterable[tuple[str, np.dtype, tuple[int, ...]]], *, max_shard_bytes: float = 5e9
    ):
        """plan: (name, dtype, shape) of every tensor, in the order in which they are laid out."""
        self.folder = folder
        shards: list[list[tuple[str, np.dtype, tuple[int, ...]]]] = [[]]
        size = self.total = 0
        for name, dtype, shape in plan:
            bytes_ = math.prod(shape) * np.dtype(dtype).itemsize
            if shards[-1] and size + bytes_ > max_shard_bytes:
                shards.append([])
                size = 0
            shards[-1].append((name, np.dtype(dtype), tuple(shape)))
            size += bytes_
            self.total += bytes_
        count = len(shards)
        names = [SINGLE] if count == 1 else [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
        self.entries: dict[str, Entry] = {}
        self._final: dict[Path, Path] = {}
        for file_name, tensors in zip(names, shards, strict=True):
            scratch = folder / f"{file_name}.tmp"
            self._final[scratch] = folder / file_name
            self._start(scratch, tensors)
        self._left = set(self.entries)

    def _start(self, scratch: Path, tensors: list[tuple[str, np.dtype, tuple[int, ...]]]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, dtype, shape in tensors:
            size = math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [end, end + size]}
            end += size
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)  # so that the data are aligned
        with scratch.open("wb") as stream:
            stream.write(struct.pack("<Q", len(text)) + text)
            stream.truncate(8 + len(text) + end)
        for name, dtype, shape in tensors:
            assert name not in self.entries, f"two tensors called {name}"
            start = 8 + len(text) + header[name]["data_offsets"][0]
            self.entries[name] = Entry(file=scratch, dtype=dtype, shape=shape, start=start)

    def write(self, name: str, array: np.ndarray) -> None:
        """Puts one tensor into its place."""
        entry = self.entries[name]
        assert array.shape == entry.shape and array.dtype == entry.dtype, f"{name}: {array.dtype}{array.shape}"
        array = contiguous(array).reshape(entry.shape)
        with entry.file.open("r+b", buffering=0) as stream:
            stream.seek(entry.start)
            view = memoryview(array.reshape(-1).view(np.uint8))
            done = 0
            while done < len(view):
                done += stream.write(view[done : done + 2**30])
        self._left.discard(name)

    def finish(self) -> list[Path]:
        """Makes the files visible; returns them."""
        assert not self._left, f"never written: {sorted(self._left)[:4]}"
        for scratch, final in self._final.items():
            with scratch.open("rb") as stream:
                os.fsync(stream.fileno())
            os.replace(scratch, final)
        files = list(self._final.values())
        if len(files) > 1:
            weight_map = {name: self._final[entry.file].name for name, entry in sorted(self.entries.items())}
            index = self.folder / INDEX
            scratch = index.with_name(f"{INDEX}.tmp")
            text = json.dumps({"metadata": {"total_size": self.total}, "weight_map": weight_map}, indent=2)
            scratch.write_text(text + "\n", encoding="utf-8")
            os.replace(scratch, index)
        return files
