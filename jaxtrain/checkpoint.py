"""Checkpoints: Orbax for the arrays, a digest of every array beside them, and a JSON record of what they are.

Orbax restores an array with a flipped bit without a word, so each array's digest is saved and compared.
"""

from __future__ import annotations

import errno
import functools
import json
import logging
import math
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from jaxtrain.distributed import fetch, is_writer
from jaxtrain.types import path_name

log = logging.getLogger("jaxtrain")
TRASH = "trash"
PART = 2**21  # elements of an array whose digest is taken at a time


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, or of something else."""


class DiskFullError(ValueError):
    """Not enough room for a checkpoint.  The ones saved before are untouched."""


def _bits(x: jax.Array) -> jax.Array:
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint8)
    return jax.lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize])


def _mix(x: jax.Array) -> jax.Array:
    """A bijection of words that spreads each bit over all (MurmurHash3's finalizer, A. Appleby).

    Without it the top bits would cancel in a wrapping sum: two flipped signs would go unseen.
    """
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _sums(x: jax.Array, index: jax.Array | int, strides: list[int]) -> jax.Array:
    """Both sums over ``x``, whose first element has the number ``index`` (from 1) in the whole array."""
    words = _mix(_bits(x).astype(jnp.uint32))
    index = jnp.asarray(index, jnp.uint32)
    for dim, stride in enumerate(strides):
        index = index + jax.lax.broadcasted_iota(jnp.uint32, x.shape, dim) * jnp.uint32(stride % 2**32)
    return jnp.stack([jnp.sum(words, dtype=jnp.uint32), jnp.sum(words * index, dtype=jnp.uint32)])


def _strides(shape: tuple[int, ...]) -> list[int]:
    return [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]


@jax.jit
def _digests(leaves: list[jax.Array]) -> list[jax.Array]:
    return [_sums(x, 1, _strides(x.shape)) for x in leaves]


@functools.partial(jax.jit, static_argnums=(2, 3))
def _digest_of_part(x: jax.Array, start: jax.Array, count: int, axis: int) -> jax.Array:
    strides = _strides(x.shape)
    index = 1 + start.astype(jnp.uint32) * jnp.uint32(strides[axis] % 2**32)
    return _sums(jax.lax.dynamic_slice_in_dim(x, start, count, axis), index, strides)


def _digest_in_parts(x: jax.Array, axis: int) -> jax.Array:
    """The digest of a large array, a part at a time: its words take four bytes each, however small its own dtype.

    A loop within one program would not do: XLA takes what it can of the loop's body, all the words, out of it.
    """
    size = x.shape[axis]
    rows = min(size, max(1, PART // (x.size // size)))
    total = jnp.zeros(2, jnp.uint32)
    for start in range(0, size, rows):
        total = total + _digest_of_part(x, jnp.int32(start), min(rows, size - start), axis)
    return total


def _part_axis(x: Any) -> int | None:
    """The dimension along which a large array is taken in parts; None for a small one, or one split in every dimension.

    One that is not split over devices, so that parts stay where they lie, and the first that is long enough.
    """
    if x.size <= PART or not isinstance(x, jax.Array):
        return None
    local = x.sharding.shard_shape(x.shape)
    whole = [axis for axis, size in enumerate(x.shape) if local[axis] == size > 1]
    enough = [axis for axis in whole if x.shape[axis] >= x.size / PART]
    return enough[0] if enough else max(whole, key=lambda axis: x.shape[axis], default=None)


def _on_device(x: Any) -> Any:
    """An array that lives in the host's memory (an optimizer's state may) as one that can be computed with."""
    host = isinstance(x, jax.Array) and x.sharding.memory_kind not in (None, "device")
    return jax.device_put(x, x.sharding.with_memory_kind("device")) if host else x


def digests(tree: Any) -> dict[str, str]:
    """path -> 16 hex digits: the wrapping sum of the array's mixed words, and their position-weighted sum.

    The same for every mesh, since integer addition does not care for order.  With several hosts each adds up what it
    holds, and only the two sums travel.
    """
    paths = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    leaves = jax.tree.leaves(tree)
    axes = [_part_axis(x) for x in leaves]
    small = iter(_digests([_on_device(x) for x, axis in zip(leaves, axes) if axis is None]))
    # Each is waited for: together, their temporary buffers would add up.
    sums = [
        next(small) if axis is None else _digest_in_parts(_on_device(x), axis).block_until_ready()
        for x, axis in zip(leaves, axes)
    ]
    return {path: f"{int(a):08x}{int(b):08x}" for path, (a, b) in zip(paths, map(fetch, sums), strict=True)}


def shapes(tree: Any) -> dict[str, str]:
    """path -> ``float32[16,8]``, for arrays and ShapeDtypeStructs."""
    return {
        path_name(path): f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def diff(want: Any, found: Any, where: str = "") -> list[str]:
    """Human-readable differences between two JSON trees."""
    if isinstance(want, dict) and isinstance(found, dict):
        lines = []
        for key in sorted(set(want) | set(found)):
            lines += diff(want.get(key, "(absent)"), found.get(key, "(absent)"), f"{where}.{key}" if where else key)
        return lines
    return [] if want == found else [f"{where}: expected {want}, found {found}"]


def _frugal_handlers(most: int) -> Any:
    # Without a limit, every compressed chunk of every array waits in memory for the disk.
    handler = ocp.PyTreeCheckpointHandler(save_concurrent_gb=(most + 2**20) / 1e9)  # more, lest rounding make it less
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    for args in (ocp.args.PyTreeSave, ocp.args.PyTreeRestore):
        registry.add(None, args, handler)
    return registry


def _save_frugally(tree: Any) -> Any:
    # Orbax compresses a chunk (by default a whole array) at a time and keeps a file (2 GB) in memory until it is full.
    args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=2**24), tree)
    return ocp.args.PyTreeSave(tree, save_args=args, ocdbt_target_data_file_size=2**25)


class Checkpoints:
    """The checkpoints of one run, in one directory, by step.  Several hosts write one together, each what it holds."""

    def __init__(self, directory: Path | str, *, keep: int = 2, frugal: int = 0):
        """keep: how many of the newest to preserve.
        frugal: 0, or save in the foreground with at most so many bytes on their way to the disk, so that hardly any
            memory is needed beside the arrays; at least the largest array's.
        """
        self.frugal = frugal
        self.directory = Path(directory).absolute()
        self.directory.mkdir(parents=True, exist_ok=True)
        self._empty_trash()
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                todelete_subdir=TRASH,
                cleanup_tmp_directories=True,
                step_prefix=None,
                enable_async_checkpointing=not frugal,
            ),
            handler_registry=_frugal_handlers(frugal) if frugal else None,
        )

    def steps(self) -> list[int]:
        """The saved steps, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, trees: dict[str, Any], meta: dict[str, Any]) -> None:
        """Saves named trees of arrays in the background; the arrays may be donated as soon as this returns.

        Raises DiskFullError before writing anything when the file system has not enough room.
        """
        if step in self._manager.all_steps():
            return
        need = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(trees))
        free = shutil.disk_usage(self.directory).free
        if need > free and is_writer():
            raise DiskFullError(
                f"the disk is full: checkpoint {step} needs {need / 1e6:.1f} MB in {self.directory}, where "
                f"{free / 1e6:.1f} MB are free; make room and run the same command again to continue from "
                f"step {max(self.steps(), default=0)}"
            )
        kinds = {name: shapes(tree) for name, tree in trees.items()}
        sums = {name: digests(tree) for name, tree in trees.items()}
        meta = {**meta, "step": step, "shapes": kinds, "digests": sums}
        save = _save_frugally if self.frugal else ocp.args.StandardSave
        items = {name: save(tree) for name, tree in trees.items()}
        self._guard(self._manager.save, step, args=ocp.args.Composite(**items, meta=ocp.args.JsonSave(meta)))

    def wait(self) -> None:
        """Until what was saved is on disk; an error of the background write is raised here or at the next save."""
        self._guard(self._manager.wait_until_finished)

    def close(self) -> None:
        self._guard(self._manager.wait_until_finished)
        self._manager.close()
        self._empty_trash()

    def _empty_trash(self) -> None:
        # Orbax moves what it prunes there, so that a kill never leaves half a step listed, but never empties it.
        if is_writer():
            shutil.rmtree(self.directory / TRASH, ignore_errors=True)

    def _guard(self, call: Any, *args: Any, **kwargs: Any) -> None:
        try:
            call(*args, **kwargs)
        except Exception as error:
            if _is_disk_full(error):
                raise DiskFullError(
                    f"the disk is full: {self.directory} could not take a checkpoint ({error}); make room and run "
                    "the same command again to continue from the last one saved"
                ) from error
            raise

    def meta(self, step: int) -> dict[str, Any]:
        """The JSON record of one checkpoint."""
        return _record(self.directory / str(step))

    def restore(self, step: int, targets: dict[str, Any]) -> dict[str, Any]:
        """Reads named trees into ``targets`` (ShapeDtypeStructs with shardings) and compares their digests.

        Raises CheckpointError for an array that is missing, of another shape, or whose bits have changed.
        """
        saved = self.meta(step)
        for name, target in targets.items():
            lines = diff(shapes(target), saved["shapes"].get(name, {}))
            if lines:
                raise CheckpointError(
                    f"checkpoint {self.directory / str(step)} is of another model: {'; '.join(lines[:5])}"
                )
        items = {name: ocp.args.StandardRestore(target) for name, target in targets.items()}
        try:
            trees = self._manager.restore(step, args=ocp.args.Composite(**items))
        except (ValueError, OSError, KeyError) as error:
            raise CheckpointError(
                f"checkpoint {self.directory / str(step)} cannot be restored here: {error}"
            ) from error
        for name in targets:
            changed = [path for path, found in digests(trees[name]).items() if found != saved["digests"][name][path]]
            if changed:
                more = f" and {len(changed) - 1} more arrays" if len(changed) > 1 else ""
                raise CheckpointError(
                    f"checkpoint {self.directory / str(step)} is damaged: the bits of {name}/{changed[0]}{more} have "
                    "changed since it was saved"
                )
        return {name: trees[name] for name in targets}

    def restore_latest(self, targets: dict[str, Any], expect: dict[str, Any]) -> tuple[int, dict[str, Any]] | None:
        """The newest undamaged checkpoint as (step, trees), or None if there is none at all.

        expect: parts of the record that must be equal (model, data, …); a difference raises CheckpointError that
            lists it.  A damaged checkpoint is passed over for the one before, with a warning.
        """
        for step in reversed(self.steps()):
            try:
                saved = self.meta(step)
                lines = diff(expect, {key: saved.get(key, "(absent)") for key in expect})
                if lines:
                    raise ValueError(
                        f"{self.directory / str(step)} was made by another run: {'; '.join(lines[:8])}. "
                        "Use another --out, or delete that folder"
                    )
                return step, self.restore(step, targets)
            except CheckpointError as error:
                log.warning("%s; trying the one before", error)
        if self.steps():
            raise CheckpointError(f"none of the checkpoints {self.steps()} in {self.directory} can be used")
        return None


def _is_disk_full(error: BaseException | None) -> bool:
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left on device" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def load_params(directory: Path | str, target: Any, name: str = "params", step: int | None = None) -> Any:
    """Parameters alone from a run's newest checkpoint (or ``step``), into ``target``."""
    steps = saved_steps(directory)
    if not steps:
        raise CheckpointError(f"no checkpoint in {directory}")
    checkpoints = Checkpoints(directory, keep=len(steps) + 1)
    try:
        return checkpoints.restore(steps[-1] if step is None else step, {name: target})[name]
    finally:
        checkpoints.close()


def saved_array(directory: Path | str, saved: dict[str, Any], name: str, path: str) -> np.ndarray:
    """One array of the tree ``name``, restored to the host by itself, its digest compared.

    saved: what ``read_meta`` told of the checkpoint.
    Raises CheckpointError as ``Checkpoints.restore`` does.
    """
    folder = Path(directory).absolute() / str(saved["step"])
    if path not in saved["shapes"].get(name, {}):
        raise CheckpointError(f"checkpoint {folder} has no {name}/{path}")
    one: Any = ocp.RestoreArgs(restore_type=np.ndarray)
    item: Any = 0
    for key in reversed(path.split("/")):
        one, item = {key: one}, {key: item}
    args = ocp.args.PyTreeRestore(item, restore_args=one, partial_restore=True)
    try:
        (array,) = jax.tree.leaves(ocp.PyTreeCheckpointHandler().restore(folder / name, args=args))
    except (ValueError, OSError, KeyError) as error:
        raise CheckpointError(f"checkpoint {folder} cannot be restored here: {error}") from error
    if digests({path: jnp.asarray(array)})[path] != saved["digests"][name][path]:
        raise CheckpointError(
            f"checkpoint {folder} is damaged: the bits of {name}/{path} have changed since it was saved"
        )
    return array


def saved_steps(directory: Path | str) -> list[int]:
    """The steps that a directory holds, without opening it for writing."""
    directory = Path(directory)
    if not directory.is_dir():
        return []
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdigit() and (path / "meta").is_dir())


def read_meta(directory: Path | str, step: int | None = None) -> dict[str, Any]:
    """The JSON record of the newest checkpoint (or of ``step``) in ``directory``."""
    steps = saved_steps(directory)
    if not steps or (step is not None and step not in steps):
        raise CheckpointError(f"no checkpoint {'' if step is None else step} in {directory} (found steps {steps})")
    return _record(Path(directory) / str(steps[-1] if step is None else step))


def _record(checkpoint: Path) -> dict[str, Any]:
    try:
        return json.loads((checkpoint / "meta" / "metadata").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"checkpoint {checkpoint} has no readable record: {error}") from error
