"""The format against the safetensors library, both ways, and files that lie."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from jaxtrain.interop.safetensors import (
    INDEX,
    SINGLE,
    SafetensorsReader,
    SafetensorsWriter,
    open_safetensors,
    read_header,
)

KINDS = [np.float32, np.float16, ml_dtypes.bfloat16, np.float64, np.int64, np.int32, np.int8, np.uint8, np.bool_]


def some_tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = [(3, 5), (7,), (), (2, 3, 4), (0, 4), (1,), (2, 2), (5,), (4,)]
    return {
        f"t{i}": np.asarray(rng.normal(size=shape) * 50).astype(kind)
        for i, (kind, shape) in enumerate(zip(KINDS, shapes, strict=True))
    }


def write(folder, tensors, **kwargs):
    writer = SafetensorsWriter(folder, [(name, t.dtype, t.shape) for name, t in tensors.items()], **kwargs)
    for name in reversed(tensors):
        writer.write(name, tensors[name])
    return writer.finish()


def same(found, wanted):
    assert found.dtype == wanted.dtype and found.shape == wanted.shape
    assert found.tobytes() == wanted.tobytes()


def test_what_the_library_writes_is_read(tmp_path):
    library = pytest.importorskip("safetensors.numpy")
    tensors = some_tensors()
    library.save_file(tensors, tmp_path / SINGLE, metadata={"format": "np"})
    reader = open_safetensors(tmp_path)
    assert reader.names() == set(tensors)
    for name, tensor in tensors.items():
        assert reader.shape(name) == tensor.shape and reader.dtype(name) == tensor.dtype
        same(reader.read(name), tensor)


@pytest.mark.parametrize("max_shard_bytes", [1, 100, 5e9])
def test_what_is_written_is_read_by_both(tmp_path, max_shard_bytes):
    tensors = some_tensors()
    files = write(tmp_path, tensors, max_shard_bytes=max_shard_bytes)
    assert (len(files) == 1) == (max_shard_bytes == 5e9) == (not (tmp_path / INDEX).exists())
    assert sorted(os.listdir(tmp_path)) == sorted({f.name for f in files} | ({INDEX} if len(files) > 1 else set()))
    reader = open_safetensors(tmp_path)
    for name, tensor in tensors.items():
        same(reader.read(name), tensor)
    library = pytest.importorskip("safetensors")
    seen = {}
    for file in files:
        with library.safe_open(file, "np") as opened:
            assert opened.metadata() == {"format": "pt"}
            seen |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    for name, tensor in tensors.items():
        same(seen[name], tensor)


def test_a_shard_is_no_larger_than_asked(tmp_path):
    tensors = {f"t{i}": np.full((100,), i, np.float32) for i in range(10)}
    files = write(tmp_path, tensors, max_shard_bytes=1000)
    assert [len(read_header(file)) for file in files] == [2] * 5
    assert json.loads((tmp_path / INDEX).read_text())["metadata"] == {"total_size": 4000}


def test_a_folder_has_no_weights_until_all_are_written(tmp_path):
    writer = SafetensorsWriter(tmp_path, [("a", np.dtype(np.float32), (2,)), ("b", np.dtype(np.float32), (2,))])
    writer.write("a", np.zeros(2, np.float32))
    with pytest.raises(ValueError, match=r"has no model\.safetensors"):
        open_safetensors(tmp_path)
    with pytest.raises(AssertionError, match="never written"):
        writer.finish()


def raw(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def one(**changes: object) -> dict:
    return {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}}


BAD = {
    "empty": (b"", "too few"),
    "short": (b"\x01\x02", "too few"),
    "header longer than the file": (raw(one(), b"\0" * 8, length=10_000), "truncated"),
    "header of 2 ** 63 bytes": (raw(b"", length=2**63), "more than the 100,000,000"),
    "header of 101 MB": (raw(b"", length=101_000_000), "more than the 100,000,000"),
    "no JSON": (raw(b"\xff\xfe{}"), "not JSON"),
    "nested": (raw(b"[" * 100_000), "not JSON"),
    "a list": (raw([1]), "is a list"),
    "a tensor that is a number": (raw({"a": 3}), "offsets None"),
    "twice": (raw(b'{"a": {"dtype":"F32","shape":[2],"data_offsets":[0,8]}, "a": {}}', b"\0" * 8), "stand in it twice"),
    "truncated data": (raw(one(), b"\0" * 7), "truncated"),
    "trailing data": (raw(one(), b"\0" * 9), "but the file has"),
    "unknown dtype": (raw(one(dtype="F8_E4M3"), b"\0" * 8), "F8_E4M3"),
    "dtype of a wrong kind": (raw(one(dtype=["F32"]), b"\0" * 8), "dtype"),
    "shape and bytes": (raw(one(shape=[3]), b"\0" * 8), "12 bytes, but takes 8"),
    "negative shape": (raw(one(shape=[-2]), b"\0" * 8), "has the shape"),
    "shape of floats": (raw(one(shape=[2.0]), b"\0" * 8), "has the shape"),
    "shape of true": (raw(one(shape=[True, 2]), b"\0" * 8), "has the shape"),
    "shape that overflows": (raw(one(shape=[2**62, 2**62]), b"\0" * 8), "but takes 8"),
    "offsets the wrong way round": (raw(one(data_offsets=[8, 0]), b"\0" * 8), "offsets"),
    "offsets of three": (raw(one(data_offsets=[0, 4, 8]), b"\0" * 8), "offsets"),
    "a hole": (raw(one(data_offsets=[4, 12]), b"\0" * 12), "where 0 was due"),
    "overlap": (raw({**one(), "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}, b"\0" * 12), "was due"),
    "outside": (raw(one(shape=[2**20], data_offsets=[0, 2**22]), b"\0" * 8), "truncated"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_header_that_lies_is_refused(tmp_path, case):
    data, complaint = BAD[case]
    (tmp_path / SINGLE).write_bytes(data)
    with pytest.raises(ValueError, match=complaint) as error:
        open_safetensors(tmp_path)
    assert SINGLE in str(error.value)


@pytest.mark.parametrize(
    "shard",
    ["../a.safetensors", "/etc/a.safetensors", "sub/a.safetensors", "..\\a.safetensors", "c:a.safetensors",
     ".safetensors", "..", "", "a.bin", "a.safetensors\n", 3, None, ["a.safetensors"]],
)  # fmt: skip
def test_an_index_that_points_elsewhere_is_refused(tmp_path, shard):
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    for place in (tmp_path, folder / "sub"):
        (place / "a.safetensors").write_bytes(raw(one(), b"\0" * 8))
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(ValueError, match="not the name of a safetensors file in that folder"):
        open_safetensors(folder)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [("{", "damaged"), ("[]", "damaged"), ("{}", "damaged"), ('{"weight_map": {}}', "damaged"),
     ('{"weight_map": {"a": "x.safetensors", "b": "y.safetensors"}}', "1 shards that are missing: y.safetensors"),
     ('{"weight_map": {"a": "x.safetensors", "b": "x.safetensors"}}', "lacks 1 tensors: b"),
     ('{"weight_map": {"b": "x.safetensors"}}', "lacks 1 tensors: b")],
)  # fmt: skip
def test_an_index_that_does_not_fit_its_shards_is_refused(tmp_path, text, complaint):
    (tmp_path / "x.safetensors").write_bytes(raw(one(), b"\0" * 8))
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(ValueError, match=complaint):
        open_safetensors(tmp_path)


def test_a_shard_with_unlisted_tensors_is_refused(tmp_path):
    write(tmp_path, {"a": np.zeros(2), "b": np.zeros(2)})
    (tmp_path / SINGLE).rename(tmp_path / "x.safetensors")
    (tmp_path / INDEX).write_text('{"weight_map": {"a": "x.safetensors"}}')
    with pytest.raises(ValueError, match="unlisted 1 tensors: b"):
        open_safetensors(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "model.pkl"])
def test_pickles_are_refused_unopened(tmp_path, name):
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'exit 3'\ntR.")
    with pytest.raises(ValueError, match=f"{name}.*pickles.*save_pretrained"):
        open_safetensors(tmp_path)


def test_several_files_without_an_index_are_refused(tmp_path):
    for name in ("x.safetensors", "y.safetensors"):
        (tmp_path / name).write_bytes(raw(one(), b"\0" * 8))
    with pytest.raises(ValueError, match=r"neither model\.safetensors nor"):
        open_safetensors(tmp_path)


def test_a_file_that_shrinks_after_it_was_opened_is_refused(tmp_path):
    (file,) = write(tmp_path, {"a": np.arange(100.0)})
    reader = SafetensorsReader(read_header(file))
    os.truncate(file, 200)
    with pytest.raises(ValueError, match="ends at byte 200, inside a tensor"):
        reader.read("a")


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_reading_holds_one_tensor_at_a_time(tmp_path):
    """200 MB in tensors of 10 MB: a mapped file's pages, or what was read before, would show."""
    tensors = {f"t{i:02}": np.full(2_500_000, i, np.float32) for i in range(20)}
    write(tmp_path, tensors)
    code = f"""
import pathlib
from jaxtrain.interop.safetensors import open_safetensors
def peak():
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1e3
before = peak()
reader = open_safetensors(pathlib.Path({str(tmp_path)!r}))
total = sum(float(reader.read(name).sum()) for name in sorted(reader.names()))
print(total, peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    total, megabytes = map(float, done.stdout.split())
    assert total == sum(range(20)) * 2_500_000
    assert megabytes < 50
