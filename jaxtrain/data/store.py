"""Fixed-size records on disk: ArrayRecord files beside a ``meta.json``, written whole or not at all."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from array_record.python import array_record_module

_RECORDS, _META, _TEXTS = "records.array_record", "meta.json", "rows.jsonl"
_FORMAT = 1


@contextlib.contextmanager
def atomic_directory(directory: str | os.PathLike) -> Iterator[str]:
    """A temporary folder that takes the place of ``directory`` if the block ends well, else vanishes."""
    directory = os.path.abspath(directory)
    os.makedirs(os.path.dirname(directory), exist_ok=True)
    hidden = os.path.join(os.path.dirname(directory), f".{os.path.basename(directory)}.{os.getpid()}")
    temporary, old = f"{hidden}.tmp", f"{hidden}.old"
    for leftover in (temporary, old):  # of a killed process that had our number
        if os.path.exists(leftover):
            shutil.rmtree(leftover)
    os.mkdir(temporary)
    try:
        yield temporary
        if os.path.exists(directory):
            os.replace(directory, old)
            os.replace(temporary, directory)
            shutil.rmtree(old)
        else:
            os.replace(temporary, directory)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_records(
    directory: str | os.PathLike,
    fields: Mapping[str, np.ndarray],
    *,
    fingerprint: str,
    texts: Sequence[Mapping[str, Any]] | None = None,
) -> None:
    """Writes ``fields``, each ``[N, ...]``, as N records into the folder ``directory``, which must exist.

    texts: rows of the source as JSON objects, kept beside the records for RecordSource.texts.
    """
    counts = {len(values) for values in fields.values()}
    assert len(counts) == 1, f"fields differ in length: {counts}"
    (count,) = counts
    fields = {name: np.ascontiguousarray(values) for name, values in fields.items()}
    path = os.path.join(directory, _RECORDS)
    # One record a group: the order of reading is random, so a larger group would be decompressed for one
    # record.
    writer = array_record_module.ArrayRecordWriter(path, "group_size:1")
    for index in range(count):
        writer.write(b"".join(values[index].tobytes() for values in fields.values()))
    writer.close()
    if texts is not None:
        with open(os.path.join(directory, _TEXTS), "w", encoding="utf-8") as file:
            for row in texts:
                file.write(json.dumps(row) + "\n")
    meta = {
        "format": _FORMAT,
        "count": count,
        "bytes": os.path.getsize(path),
        "texts": texts is not None,
        "fingerprint": fingerprint,
        "fields": [[name, values.dtype.str, list(values.shape[1:])] for name, values in fields.items()],
    }
    with open(os.path.join(directory, _META), "w", encoding="utf-8") as file:
        json.dump(meta, file, indent=1)


class RecordSource:
    """Random access to the records that write_records wrote: ``source[i]`` is a dictionary of arrays.

    Can be pickled: the copy opens the same files.  Raises ValueError when they are missing, cut short or
    damaged (ArrayRecord keeps a checksum of every record).
    """

    def __init__(self, directory: str | os.PathLike):
        self.directory = os.fspath(directory)
        self._again = f"delete {self.directory} and prepare the data again"
        meta_path = os.path.join(self.directory, _META)
        path = os.path.join(self.directory, _RECORDS)
        try:
            with open(meta_path, encoding="utf-8") as file:
                meta = json.load(file)
            size = os.path.getsize(path)
        except FileNotFoundError as error:
            raise ValueError(f"{error.filename} is missing; {self._again}") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{meta_path} is damaged ({error}); {self._again}") from None
        if not isinstance(meta, dict) or meta.get("format") != _FORMAT:
            raise ValueError(f"{meta_path} is not of format {_FORMAT}; {self._again}")
        if size != meta["bytes"]:
            raise ValueError(f"{path} has {size} bytes instead of {meta['bytes']}; {self._again}")
        self.fingerprint: str = meta["fingerprint"]
        self._has_texts: bool = meta["texts"]
        self._count: int = meta["count"]
        # Worked out once, because reading a record is on the path of every step.
        self._layout, offset = [], 0
        for name, dtype, shape in meta["fields"]:
            dtype, size = np.dtype(dtype), int(np.prod(shape, dtype=np.int64))
            self._layout.append((name, dtype, size, offset, tuple(shape)))
            offset += size * dtype.itemsize
        try:
            self._reader = array_record_module.ArrayRecordReader(path)
            found = self._reader.num_records()
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{path} is damaged ({error}); {self._again}") from None
        if found != self._count:
            raise ValueError(f"{path} has {found} records instead of {self._count}; {self._again}")

    def __reduce__(self):
        return (RecordSource, (self.directory,))

    def __repr__(self) -> str:
        return f"RecordSource({self.directory!r})"

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not -self._count <= index < self._count:
            raise IndexError(f"record {index} of {self._count} in {self.directory}")
        index = int(index) % self._count
        try:
            (data,) = self._reader.read([index])
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"record {index} in {self.directory} is damaged ({error}); {self._again}") from None
        return {
            name: np.frombuffer(data, dtype, size, offset).reshape(shape)
            for name, dtype, size, offset, shape in self._layout
        }

    @functools.cached_property
    def texts(self) -> list[dict[str, Any]]:
        """The source's rows behind the records, in the records' order; ValueError where none were kept."""
        if not self._has_texts:
            raise ValueError(f"{self.directory} keeps no texts: only pairs and prompts do")
        path = os.path.join(self.directory, _TEXTS)
        try:
            with open(path, encoding="utf-8", newline="\n") as file:
                rows = [json.loads(line) for line in file]
        except FileNotFoundError:
            raise ValueError(f"{path} is missing; {self._again}") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is damaged ({error}); {self._again}") from None
        if len(rows) != self._count:
            raise ValueError(f"{path} has {len(rows)} rows instead of {self._count}; {self._again}")
        return rows
