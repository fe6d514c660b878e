"""Checkpoints: restored exactly on any mesh, damage and mix-ups named, a full disk survived."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxtrain import checkpoint
from jaxtrain.checkpoint import (
    CheckpointError,
    Checkpoints,
    DiskFullError,
    diff,
    digests,
    load_params,
    read_meta,
)
from jaxtrain.sharding import MeshConfig, make_mesh

META = {"model": {"d_model": 8, "heads": ["lm"]}, "hash": "a"}


def save_and_wait(checkpoints, step, trees):
    checkpoints.save(step, trees, META)
    checkpoints.wait()


def make_trees(seed: int = 0, size: int = 16):
    rng = np.random.default_rng(seed)
    params = {"embed": rng.normal(size=(size, 8)).astype(np.float32), "scale": np.ones(8, jnp.bfloat16)}
    return {"params": params, "rest": {"step": np.int32(3), "key": np.array([1, 2**32 - 1], np.uint32)}}


def put(trees, mesh_config: MeshConfig):
    mesh = make_mesh(mesh_config)

    def one(x):
        spec = PartitionSpec(("data", "fsdp")) if np.ndim(x) == 2 else PartitionSpec()
        return jax.device_put(jnp.asarray(x), NamedSharding(mesh, spec))

    return jax.tree.map(one, trees)


def targets_of(trees):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), trees)


def assert_same_bits(found, expected):
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes(), path


@pytest.fixture
def opened():
    """``opened(directory)``: Checkpoints that are closed when the test ends."""
    made = []

    def make(directory, **settings):
        made.append(Checkpoints(directory, **settings))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.mark.smoke
@pytest.mark.parametrize(("before", "after"), [(1, 8), (8, 1)])
def test_what_is_restored_is_what_was_saved_on_another_number_of_devices(before, after, tmp_path, opened):
    trees = make_trees()
    checkpoints = opened(tmp_path / "c")
    checkpoints.save(3, put(trees, MeshConfig(data=before)), META)
    checkpoints.wait()
    wanted = targets_of(put(make_trees(1), MeshConfig(fsdp=after)))
    step, found = checkpoints.restore_latest(wanted, META)
    assert step == 3
    assert_same_bits(found, trees)
    for leaf, target in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert leaf.sharding.is_equivalent_to(target.sharding, leaf.ndim)
        assert len(leaf.sharding.device_set) == after
    # Parameters alone, as the next stage loads them.
    assert_same_bits(load_params(tmp_path / "c", wanted["params"]), trees["params"])


def test_the_arrays_may_be_donated_while_they_are_being_saved(tmp_path, opened):
    trees = put(make_trees(size=4096), MeshConfig())
    kept = jax.tree.map(np.asarray, trees)
    checkpoints = opened(tmp_path)
    checkpoints.save(1, trees, META)
    overwrite = jax.jit(lambda t: jax.tree.map(lambda x: x * 0, t), donate_argnums=0)
    jax.block_until_ready(overwrite(trees["params"]))
    checkpoints.wait()
    assert_same_bits(checkpoints.restore(1, targets_of(put(kept, MeshConfig())))["params"], kept["params"])


def test_digests_see_every_change_and_no_sharding():
    trees = make_trees()["params"]
    one = digests(put(trees, MeshConfig()))
    assert one == digests(put(trees, MeshConfig(data=4, fsdp=2)))
    changed = dict(trees, embed=trees["embed"].copy())
    changed["embed"][[2, 5]] = changed["embed"][[5, 2]]  # a swap keeps the plain sum
    assert digests(put(changed, MeshConfig()))["embed"] != one["embed"]
    changed["embed"] = trees["embed"].copy()
    changed["embed"][[1, 3], 0] *= -1  # two sign bits cancel in a wrapping sum of plain words
    assert digests(put(changed, MeshConfig()))["embed"] != one["embed"]
    assert digests({"x": np.zeros(4, np.float32)}) != digests({"x": -np.zeros(4, np.float32)})


@pytest.mark.parametrize("part", [1, 7, 64, 1000])
def test_a_digest_taken_in_parts_is_the_same(monkeypatch, part):
    """Of every dtype, of arrays that do not divide into parts, and of arrays split over devices."""
    rng = np.random.default_rng(0)
    trees = {
        "stack": rng.normal(size=(3, 16, 24)).astype(np.float32),
        "half": rng.normal(size=(8, 50)).astype(jnp.bfloat16),
        "flags": rng.normal(size=(8, 5)) > 0,
        "ids": rng.integers(0, 2**32, 328, np.uint32),
        "none": np.zeros((8, 0), np.float32),
    }
    whole = digests(put(trees, MeshConfig()))
    monkeypatch.setattr(checkpoint, "PART", part)
    for mesh in (MeshConfig(), MeshConfig(fsdp=8)):
        assert digests(put(trees, mesh)) == whole


def array_files(step_folder):
    """Files of array data, largest first."""
    files = [path for path in step_folder.rglob("*") if path.is_file() and "/d/" in str(path)]
    return sorted(files, key=lambda path: -path.stat().st_size)


def flip_byte(path, where: float = 0.5):
    data = bytearray(path.read_bytes())
    data[int(len(data) * where)] ^= 0x10
    path.write_bytes(bytes(data))


def test_a_flipped_byte_is_found_and_the_checkpoint_before_is_used(tmp_path, opened, caplog):
    """Incompressible values, so that the flip lands in a value rather than in a header."""
    old, new = put(make_trees(1, 1024), MeshConfig()), put(make_trees(2, 1024), MeshConfig())
    checkpoints = opened(tmp_path)
    checkpoints.save(1, old, META)
    checkpoints.save(2, new, META)
    checkpoints.wait()
    flip_byte(array_files(tmp_path / "2")[0])
    with pytest.raises(CheckpointError, match=r"checkpoint .*2 (is damaged: the bits of|cannot be restored)"):
        checkpoints.restore(2, targets_of(new))
    with caplog.at_level(logging.WARNING, "jaxtrain"):
        step, found = checkpoints.restore_latest(targets_of(new), META)
    assert step == 1 and "trying the one before" in caplog.text
    assert_same_bits(found, old)
    flip_byte(array_files(tmp_path / "1")[0])
    with pytest.raises(CheckpointError, match=r"none of the checkpoints \[1, 2\]"):
        checkpoints.restore_latest(targets_of(new), META)


def test_a_bit_that_orbax_does_not_notice_is_named(tmp_path, opened, monkeypatch):
    """The digests alone, whatever checksums the storage format has of its own."""
    trees = put(make_trees(), MeshConfig())
    checkpoints = opened(tmp_path)
    checkpoints.save(1, trees, META)
    checkpoints.wait()
    record = tmp_path / "1" / "meta" / "metadata"
    digest = checkpoints.meta(1)["digests"]["params"]["embed"]
    record.write_text(record.read_text().replace(digest, f"{int(digest, 16) ^ 1:016x}"))
    with pytest.raises(CheckpointError, match="is damaged: the bits of params/embed have changed"):
        checkpoints.restore(1, targets_of(trees))
    record.write_text("{")
    with pytest.raises(CheckpointError, match="no readable record"):
        checkpoints.restore(1, targets_of(trees))


def test_a_checkpoint_of_another_model_is_named(tmp_path, opened):
    trees = put(make_trees(), MeshConfig())
    checkpoints = opened(tmp_path)
    checkpoints.save(1, trees, META)
    checkpoints.wait()
    more = {**trees, "params": {**trees["params"], "lm_head": trees["params"]["embed"]}}
    with pytest.raises(CheckpointError, match=r"of another model: lm_head: expected float32\[16,8\], found \(absent\)"):
        checkpoints.restore(1, targets_of(more))
    wider = put(make_trees(size=32), MeshConfig())
    with pytest.raises(
        CheckpointError,
        match=r"checkpoint .*1 is of another model: embed: expected float32\[32,8\], found float32\[16,8\]",
    ):
        checkpoints.restore(1, targets_of(wider))


def test_a_checkpoint_of_another_run_lists_what_differs(tmp_path, opened):
    trees = put(make_trees(), MeshConfig())
    checkpoints = opened(tmp_path)
    checkpoints.save(1, trees, META)
    checkpoints.wait()
    wanted = {"model": {"d_model": 16, "heads": ["lm"]}, "hash": "a"}
    with pytest.raises(ValueError, match=r"made by another run: model\.d_model: expected 16, found 8\. Use another"):
        checkpoints.restore_latest(targets_of(trees), wanted)
    assert diff({"a": 1, "b": {"c": [1]}}, {"b": {"c": [2]}, "d": 0}) == [
        "a: expected 1, found (absent)",
        "b.c: expected [1], found [2]",
        "d: expected (absent), found 0",
    ]


def test_old_checkpoints_are_pruned_and_an_empty_folder_says_so(tmp_path, opened):
    trees = put(make_trees(), MeshConfig())
    checkpoints = opened(tmp_path / "c", keep=2)
    assert checkpoints.restore_latest(targets_of(trees), META) is None
    with pytest.raises(CheckpointError, match=r"no checkpoint  in .*c \(found steps \[\]\)"):
        read_meta(tmp_path / "c")
    for step in (1, 2, 3):
        checkpoints.save(step, trees, META)
        checkpoints.wait()
    assert checkpoints.steps() == [2, 3] == checkpoint.saved_steps(tmp_path / "c")
    assert read_meta(tmp_path / "c")["step"] == 3 and read_meta(tmp_path / "c", 2)["step"] == 2
    checkpoints.close()
    assert {path.name for path in (tmp_path / "c").iterdir()} == {"2", "3"}
    with pytest.raises(CheckpointError, match=r"no checkpoint in .*nowhere"):
        load_params(tmp_path / "nowhere", targets_of(trees)["params"])


def test_a_full_disk_is_seen_before_anything_is_written(tmp_path, opened, monkeypatch):
    trees = put(make_trees(), MeshConfig())
    checkpoints = opened(tmp_path)
    checkpoints.save(1, trees, META)
    checkpoints.wait()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(total=usage.total, used=0, free=100))
    with pytest.raises(DiskFullError, match=rf"checkpoint 2 needs 0\.0 MB in {tmp_path}.*continue from step 1"):
        checkpoints.save(2, trees, META)
    assert checkpoint.saved_steps(tmp_path) == [1]
    monkeypatch.undo()
    checkpoints.save(2, trees, META)
    checkpoints.wait()
    assert checkpoints.steps() == [1, 2]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system takes root")
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"mounting is not permitted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_fills_up_while_writing_leaves_the_checkpoints_before(small_disk, opened, monkeypatch):
    """The check in advance sees 2.9 MB free; the disk is then filled behind its back."""
    trees = put(make_trees(size=16_384), MeshConfig())  # 512 KB, incompressible
    folder = small_disk / "checkpoints"
    checkpoints = opened(folder, keep=5)
    checkpoints.save(1, trees, META)
    checkpoints.wait()
    filler = small_disk / "filler"
    free = shutil.disk_usage(small_disk).free
    filler.write_bytes(b"x" * (free - 200_000))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=10**9))
    with pytest.raises(DiskFullError, match=rf"the disk is full: {folder}"):
        save_and_wait(checkpoints, 2, trees)
    monkeypatch.undo()
    filler.unlink()
    # The same command again: a new process opens the folder and goes on from the checkpoint before.
    again = opened(folder, keep=5)
    step, found = again.restore_latest(targets_of(trees), META)
    assert step == 1
    assert_same_bits(found, trees)
    again.save(2, trees, META)
    again.wait()
    assert_same_bits(again.restore_latest(targets_of(trees), META)[1], trees)
    assert again.steps() == [1, 2]
