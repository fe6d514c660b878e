"""Checkpoints: Orbax for the arrays, a digest of every array beside them, and a JSON record of what they are.

Orbax restores an array with a flipped bit without a word, so each array's digest is saved and compared.
"""

from __future__ import annotations

import errno
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from jaxtrain.types import path_name

log = logging.getLogger("jaxtrain")
TRASH = "trash"


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, or of something else."""


class DiskFullError(ValueError):
    """Not enough room for a checkpoint.  The ones saved before are untouched."""


def _words(x: jax.Array) -> jax.Array:
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    bits = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    return jax.lax.bitcast_convert_type(x, bits).astype(jnp.uint32)


def _mix(x: jax.Array) -> jax.Array:
    """A bijection of words that spreads each bit over all (MurmurHash3's finalizer, A. Appleby).

    Without it the top bits would cancel in a wrapping sum: two flipped signs would go unseen.
    """
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


@jax.jit
def _digests(leaves: list[jax.Array]) -> list[jax.Array]:
    def one(x):
        words = _mix(_words(x))
        index, stride = jnp.ones((), jnp.uint32), 1
        for dim in range(x.ndim - 1, -1, -1):
            index = index + jax.lax.broadcasted_iota(jnp.uint32, x.shape, dim) * jnp.uint32(stride % 2**32)
            stride *= x.shape[dim]
        return jnp.stack([jnp.sum(words, dtype=jnp.uint32), jnp.sum(words * index, dtype=jnp.uint32)])

    return [one(x) for x in leaves]


def digests(tree: Any) -> dict[str, str]:
    """path -> 16 hex digits: the wrapping sum of the array's mixed words, and their position-weighted sum.

    The same for every mesh, since integer addition does not care for order.
    """
    paths = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    sums = jax.device_get(_digests(jax.tree.leaves(tree)))
    return {path: f"{int(a):08x}{int(b):08x}" for path, (a, b) in zip(paths, sums, strict=True)}


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


class Checkpoints:
    """The checkpoints of one run, in one directory, by step."""

    def __init__(self, directory: Path | str, *, keep: int = 2):
        """``keep``: how many of the newest to preserve."""
        self.directory = Path(directory).absolute()
        self.directory.mkdir(parents=True, exist_ok=True)
        # Orbax moves what it prunes there, so that a kill never leaves half a step listed, but never empties it.
        shutil.rmtree(self.directory / TRASH, ignore_errors=True)
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep, todelete_subdir=TRASH, cleanup_tmp_directories=True, step_prefix=None
            ),
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
        if need > free:
            raise DiskFullError(
                f"the disk is full: checkpoint {step} needs {need / 1e6:.1f} MB in {self.directory}, where "
                f"{free / 1e6:.1f} MB are free; make room and run the same command again to continue from "
                f"step {max(self.steps(), default=0)}"
            )
        kinds = {name: shapes(tree) for name, tree in trees.items()}
        sums = {name: digests(tree) for name, tree in trees.items()}
        meta = {**meta, "step": step, "shapes": kinds, "digests": sums}
        items = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
        self._guard(self._manager.save, step, args=ocp.args.Composite(**items, meta=ocp.args.JsonSave(meta)))

    def wait(self) -> None:
        """Until what was saved is on disk; an error of the background write is raised here or at the next save."""
        self._guard(self._manager.wait_until_finished)

    def close(self) -> None:
        self._guard(self._manager.wait_until_finished)
        self._manager.close()
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
