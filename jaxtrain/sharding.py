"""One mesh with every axis, and one table from logical names to mesh axes.

Models name the dimensions of parameters and activations (``("layers", "embed", "mlp")``); the table says which
mesh axes each name is split over.  A name that the table does not know, or two names of one array that claim the
same mesh axis, raise: a misspelt rule must never turn into silent replication.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxtrain.types import path_name

AXES = ("data", "fsdp", "tensor", "context", "expert", "stage")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each axis of the mesh; 1 where an axis is unused, -1 on at most one axis for "all the rest".

    data: copies of the model, each on its own rows.  fsdp: rows too, with parameters and optimizer split.
    tensor: heads, MLP width and vocabulary split.  context: the sequence split.  expert: experts of a
    mixture split; dense models use it as one more data axis.  stage: layers of a decoder split, microbatches passing
    through (see ``models.pipeline``); rows are split over it outside of them, and in models without a pipeline.

    zero: what stays split over ``fsdp`` while a step runs, after ZeRO (1910.02054): 1 the optimizer's state, 2
    gradients too, 3 parameters too.  It changes neither results nor checkpoints, only memory and what is sent: see
    ``train.zero``.  zero_data: the state is split over ``data`` too.
    """

    data: int = 1
    fsdp: int = 1
    tensor: int = 1
    context: int = 1
    expert: int = 1
    stage: int = 1
    zero: int = 3
    zero_data: bool = False

    def __post_init__(self):
        sizes = self._sizes()
        if self.zero not in (1, 2, 3):
            raise ValueError(f"MeshConfig.zero is {self.zero}: 1 splits the optimizer's state, 2 gradients too, 3 all")
        wrong = {name: size for name, size in sizes.items() if size < 1 and size != -1}
        if wrong:
            raise ValueError(f"MeshConfig: {wrong} must be at least 1, or -1 for the remaining devices")
        if list(sizes.values()).count(-1) > 1:
            raise ValueError(f"MeshConfig: only one axis may be -1, found {sizes}")

    def _sizes(self) -> dict[str, int]:
        return {axis: getattr(self, axis) for axis in AXES}

    def sizes(self, num_devices: int) -> dict[str, int]:
        """The size of each axis on ``num_devices`` devices; raises ValueError when they do not divide."""
        sizes = self._sizes()
        fixed = math.prod(size for size in sizes.values() if size != -1)
        for name, size in sizes.items():
            if size == -1:
                if num_devices % fixed:
                    raise ValueError(
                        f"MeshConfig.{name} is -1, but {num_devices} devices are not divisible by the {fixed} "
                        f"that the other axes take"
                    )
                sizes[name] = num_devices // fixed
        return sizes


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Builds the mesh over ``devices`` (default: as many of all the visible devices as the config asks for).

    Raises ValueError when the config needs more devices than there are, leaves some of a multi-process
    job's devices out, or has no axis for several slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = config.sizes(len(devices))
    count = math.prod(sizes.values())
    if count > len(devices):
        raise ValueError(f"the mesh {sizes} needs {count} devices, but only {len(devices)} are visible")
    if count < len(devices) and jax.process_count() > 1:
        raise ValueError(f"the mesh {sizes} uses {count} of {len(devices)} devices: every host must take part")
    if count == len(jax.devices()) == len(devices):
        return whole_mesh(sizes, devices)
    # A subset of the machine: physical order is all there is to go by.
    grid = np.array(devices[:count]).reshape(tuple(sizes.values()))
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def whole_mesh(sizes: Mapping[str, int], devices: Sequence[Any]) -> Mesh:
    """The mesh over all devices of a machine, laid out over the torus of each of its slices."""
    # Devices that a compiler only describes have no number of their slice where there is but one.
    slices = slices_of(devices)
    between = slice_axes(sizes, slices)
    inside = [sizes[axis] // between.get(axis, 1) for axis in AXES]

    def lay_out(**kwargs):
        if slices == 1:
            return mesh_utils.create_device_mesh(inside, devices, **kwargs)
        return mesh_utils.create_hybrid_device_mesh(inside, [between.get(axis, 1) for axis in AXES], devices, **kwargs)

    try:
        grid = lay_out()
    except NotImplementedError:  # a dimension of the torus has to be shared by two axes
        grid = lay_out(allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def slices_of(devices: Iterable[Any]) -> int:
    """How many slices of TPUs there are; 1 for other devices, whatever joins them."""
    # Where there is but one, JAX may not number it.
    return len({getattr(device, "slice_index", 0) for device in devices if device.platform == "tpu"}) or 1


def slice_axes(sizes: Mapping[str, int], slices: int) -> dict[str, int]:
    """Into how many parts slices, joined by a slow network, cut each axis that is cut: ``data``, then ``stage``.

    Raises ValueError where these do not divide.
    """
    found, left = {}, slices
    for axis in ("data", "stage"):
        part = math.gcd(sizes.get(axis, 1), left)
        left //= part
        if part > 1:
            found[axis] = part
    if left > 1:
        raise ValueError(
            f"the mesh {dict(sizes)} has no axis for {slices} slices: the network between slices is too slow for all "
            f"but MeshConfig.data and MeshConfig.stage, so make one of them a multiple of {slices}"
        )
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardingRules:
    """An ordered table from logical dimension names to mesh axes (none, one or several)."""

    table: tuple[tuple[str, tuple[str, ...]], ...]

    def __post_init__(self):
        names = [name for name, _ in self.table]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"ShardingRules: {twice} stand in the table more than once")
        for name, axes in self.table:
            unknown = [axis for axis in axes if axis not in AXES]
            if unknown:
                raise ValueError(f"ShardingRules: {name!r} maps to unknown mesh axes {unknown}; axes are {AXES}")

    def spec(self, names: Sequence[str | None]) -> PartitionSpec:
        """The PartitionSpec of an array whose dimensions are called ``names`` (None: never split)."""
        table = dict(self.table)
        used: dict[str, str] = {}
        entries = []
        for name in names:
            if name is None:
                entries.append(None)
                continue
            if name not in table:
                raise ValueError(f"no sharding rule for {name!r} in {tuple(names)}; known: {sorted(table)}")
            for axis in table[name]:
                if axis in used:
                    raise ValueError(f"{tuple(names)}: {used[axis]!r} and {name!r} would both be split over {axis!r}")
                used[axis] = name
            entries.append(table[name] if table[name] else None)
        return PartitionSpec(*entries)


DEFAULT_RULES = ShardingRules(
    table=(
        # parameters
        ("layers", ()),
        ("pipeline", ("stage",)),
        ("vocab", ("tensor",)),
        ("positions", ()),
        ("embed", ("fsdp",)),
        ("q_heads", ("tensor",)),
        ("kv_heads", ("tensor",)),
        ("head_dim", ()),
        ("mlp", ("tensor",)),
        ("norm", ()),
        ("scalar", ()),
        ("experts", ("expert",)),
        ("router", ()),
        ("rank", ()),
        ("rank_inputs", ("fsdp",)),
        ("features", ("tensor",)),
        ("labels", ()),
        ("types", ()),
        ("buckets", ()),
        # activations
        ("batch", ("data", "fsdp", "expert", "stage")),
        ("sequence", ("context",)),
        ("tokens", ("data", "fsdp", "expert", "stage", "tensor")),
        ("stream_sequence", ("context", "tensor")),
        ("act_embed", ()),
        ("act_heads", ("tensor",)),
        ("act_mlp", ("tensor",)),
        ("act_vocab", ("tensor",)),
    )
)


def state_rules(rules: ShardingRules, config: MeshConfig) -> ShardingRules:
    """Where a training state lives between steps: what is split over ``fsdp`` is so over ``data`` too, if asked for."""
    if not config.zero_data:
        return rules
    return ShardingRules(
        table=tuple(
            (name, (*axes, "data") if "fsdp" in axes and "data" not in axes else axes) for name, axes in rules.table
        )
    )


def constrain(x: jax.Array, names: Sequence[str | None], rules: ShardingRules) -> jax.Array:
    """Constrains an activation to its logical sharding on the current mesh.

    The names are checked with or without a mesh, so a wrong one fails on a laptop too.
    """
    if x.ndim != len(names):
        raise ValueError(f"an array of shape {x.shape} has {x.ndim} dimensions, named {tuple(names)}")
    spec = rules.spec(names)
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec)


@dataclasses.dataclass(frozen=True)
class Constrain:
    """``constrain`` by one table: ``Constrain(rules)(x, names)``."""

    rules: ShardingRules

    def __call__(self, x: jax.Array, names: Sequence[str | None]) -> jax.Array:
        return constrain(x, names, self.rules)

    def ways(self, names: Sequence[str | None]) -> tuple[int, ...]:
        """Into how many parts the current mesh splits each dimension."""
        mesh, spec = jax.sharding.get_abstract_mesh(), self.rules.spec(names)
        return tuple(1 if mesh.empty else ways(mesh, entry) for entry in spec)

    def divides(self, shape: Sequence[int], names: Sequence[str | None]) -> bool:
        """Whether these parts are equal for an array of this shape."""
        return all(size % parts == 0 for size, parts in zip(shape, self.ways(names), strict=True))


def vary_like(x: jax.Array, *others: jax.Array) -> jax.Array:
    """``x`` as something that varies over all the axes of a ``shard_map`` that one of ``others`` varies over.

    Nothing is computed, but the gradient of x is then added over those axes.
    """
    axes = frozenset().union(*(_varying(other) for other in others)) - _varying(x)
    return jax.lax.pcast(x, tuple(sorted(axes)), to="varying") if axes else x


def _varying(x: jax.Array) -> frozenset[str]:
    return jax.typeof(x).manual_axis_type.varying


def free_axes(mesh: Any) -> frozenset[str]:
    """The axes of a mesh that are not those of a ``shard_map`` around; an empty mesh has none."""
    kinds = () if mesh.empty else mesh.axis_types
    return frozenset(axis for axis, kind in zip(mesh.axis_names, kinds, strict=False) if kind != AxisType.Manual)


def is_names(leaf: Any) -> bool:
    """True for a leaf of a tree of logical axes: a plain tuple of names or None, not a named one like optax's."""
    return type(leaf) is tuple and all(name is None or isinstance(name, str) for name in leaf)


def ways(mesh: Any, entry: str | tuple[str, ...] | None) -> int:
    """Over how many devices one entry of a PartitionSpec splits its dimension."""
    axes = (entry,) if isinstance(entry, str) else entry or ()
    return math.prod(mesh.shape[axis] for axis in axes)


def param_shardings(axes: Any, shapes: Any, mesh: Mesh, rules: ShardingRules) -> Any:
    """NamedShardings for a parameter tree; ``shapes`` has the same structure and leaves with ``.shape``.

    Raises ValueError, naming parameter, dimension and mesh axes, where a dimension does not divide.
    """

    def one(path, names, leaf):
        spec = rules.spec(names)
        for dim, (name, entry) in enumerate(zip(names, spec, strict=True)):
            if leaf.shape[dim] % ways(mesh, entry):
                raise ValueError(
                    f"parameter {path_name(path)} has shape {tuple(leaf.shape)}: dimension {name!r} of size "
                    f"{leaf.shape[dim]} is not divisible by the {ways(mesh, entry)} devices of mesh axes {entry}"
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(one, axes, shapes, is_leaf=is_names)


def batch_sharding(mesh: Mesh, rules: ShardingRules = DEFAULT_RULES) -> NamedSharding:
    """How a batch's leading (row) dimension is split."""
    return NamedSharding(mesh, rules.spec(("batch",)))


def local_rows(count: int, mesh: Mesh, rules: ShardingRules = DEFAULT_RULES) -> np.ndarray:
    """Which of a batch's ``count`` rows lie on this process's devices: int64, ascending.

    Raises ValueError when the row count does not divide among the devices.
    """
    sharding = batch_sharding(mesh, rules)
    devices = ways(mesh, sharding.spec[0])
    if count % devices:
        raise ValueError(
            f"a batch of {count} rows is not divisible by the {devices} devices of the mesh's row axes "
            f"{sharding.spec[0]}; choose a batch size that is a multiple of {devices}"
        )
    numbers = np.arange(count)
    parts = sharding.addressable_devices_indices_map((count,)).values()
    return np.unique(np.concatenate([numbers[index] for index in parts]))


def put_batch(batch: Any, mesh: Mesh, rules: ShardingRules = DEFAULT_RULES, count: int | None = None) -> Any:
    """Places a NumPy batch on the mesh, split by rows.

    count: None where ``batch`` has all rows, the same on every host; else the number of rows on all hosts together, of
        which ``batch`` has those that ``local_rows`` names, in that order: consecutive ones or, on some meshes, not.

    Raises ValueError when the row count does not divide among the devices.
    """
    sharding = batch_sharding(mesh, rules)

    def one(x):
        x = np.asarray(x)
        rows = len(x) if count is None else count
        held = local_rows(rows, mesh, rules)
        if count is None:
            return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])
        assert len(x) == len(held), f"{len(x)} rows, where this process holds {len(held)} of {count}"

        def read(index):
            start, stop, _ = index[0].indices(rows)
            first = np.searchsorted(held, start)
            return x[(slice(first, first + stop - start), *index[1:])]

        return jax.make_array_from_callback((rows, *x.shape[1:]), sharding, read)

    return jax.tree.map(one, batch)


def put_everywhere(tree: Any, mesh: Mesh) -> Any:
    """Copies of host values (the same on every host) on every device of the mesh: what several hosts can save."""
    sharding = NamedSharding(mesh, PartitionSpec())

    def one(x):
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(one, tree)
