from __future__ import annotations

import json
import pickle

import numpy as np
import pytest

from jaxtrain.data.store import RecordSource, atomic_directory, write_records

ROWS = [{"prompt": "línea\u2028uno\n\ud83d", "n": i} for i in range(50)]


@pytest.fixture
def fields():
    random = np.random.default_rng(0)
    return {
        "ids": random.integers(0, 2**31 - 1, (50, 16), np.int32),
        "weights": random.normal(size=(50, 16)).astype(np.float32),
        "margin": random.normal(size=50).astype(np.float32),
    }


@pytest.fixture
def folder(tmp_path, fields):
    write_records(tmp_path, fields, fingerprint="abc", texts=ROWS)
    return tmp_path


def test_records_come_back_exactly(folder, fields):
    source = RecordSource(folder)
    assert len(source) == 50 and source.fingerprint == "abc"
    for index in (49, 0, 17, -1):
        record = source[index]
        assert list(record) == list(fields)
        for name, values in fields.items():
            assert record[name].dtype == values.dtype and record[name].shape == values.shape[1:]
            assert np.array_equal(record[name], values[index])
    for index in (50, -51):
        with pytest.raises(IndexError, match=f"record {index} of 50"):
            source[index]


def test_texts_are_kept_in_order(folder, fields, tmp_path):
    assert RecordSource(folder).texts == ROWS
    other = tmp_path / "other"
    other.mkdir()
    write_records(other, fields, fingerprint="abc")
    with pytest.raises(ValueError, match="keeps no texts"):
        RecordSource(other).texts  # noqa: B018


def test_a_pickled_source_opens_the_same_files(folder, fields):
    copy = pickle.loads(pickle.dumps(RecordSource(folder)))
    assert np.array_equal(copy[3]["ids"], fields["ids"][3])


@pytest.mark.parametrize("name", ["records.array_record", "meta.json"])
def test_missing_files_are_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(ValueError, match=rf"{name} is missing; delete .* and prepare"):
        RecordSource(folder)


def test_truncated_records_are_refused(folder):
    path = folder / "records.array_record"
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"records\.array_record has \d+ bytes instead of \d+"):
        RecordSource(folder)


def test_a_flipped_byte_anywhere_never_gives_other_values(folder, fields):
    path = folder / "records.array_record"
    data = path.read_bytes()
    caught = 0
    for at in range(0, len(data), len(data) // 40):
        path.write_bytes(data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :])
        try:
            source = RecordSource(folder)
            found = [source[index]["ids"] for index in range(50)]
        except ValueError:
            caught += 1
            continue
        assert np.array_equal(found, fields["ids"])
    assert caught > 0


def test_damaged_meta_and_another_format_are_refused(folder):
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | {"format": 99}))
    with pytest.raises(ValueError, match="is not of format"):
        RecordSource(folder)
    (folder / "meta.json").write_text(json.dumps(meta | {"count": 51}))
    with pytest.raises(ValueError, match="has 50 records instead of 51"):
        RecordSource(folder)
    (folder / "meta.json").write_text("{")
    with pytest.raises(ValueError, match=r"meta\.json is damaged"):
        RecordSource(folder)


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "a" / "data"

    def fail():
        with atomic_directory(target) as temporary:
            with open(f"{temporary}/x", "w") as file:
                file.write("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list((tmp_path / "a").iterdir()) == []

    for content in ("first", "second"):
        with atomic_directory(target) as temporary:
            with open(f"{temporary}/x", "w") as file:
                file.write(content)
            assert not target.exists() or (target / "x").read_text() == "first"
        assert (target / "x").read_text() == content
    with pytest.raises(RuntimeError):
        fail()
    assert (target / "x").read_text() == "second"
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["data"]
