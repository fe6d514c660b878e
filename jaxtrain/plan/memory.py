"""Bytes of a device's memory that a program needs, from shapes alone, without a compiler.

Parameters, optimizer and gradients follow from shapes and shardings, exactly.  What is saved for the backward pass is
what JAX itself would save: the step's loss is traced, in no more time than a trace takes, and its residuals are added
up, whatever ``remat``, objective, model and kernels are.  Temporaries are those of the largest moment: the backward
pass of the layer that needs most, or the gradient of the embedding.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxtrain.models import build_model
from jaxtrain.models.cache import init_cache
from jaxtrain.plan.programs import Program
from jaxtrain.train.step import with_auxiliary
from jaxtrain.types import path_name

PARTS = (
    "parameters",
    "optimizer",
    "gradients",
    "activations saved",
    "loss",
    "temporaries",
    "batch",
    "reference and critic",
    "kv cache",
)


def placed_bytes(tree: Any) -> int:
    """Bytes that one device holds of ShapeDtypeStructs with shardings."""
    return sum(_size(x.sharding.shard_shape(x.shape), x.dtype) for x in jax.tree.leaves(tree))


def train_memory(program: Program, mesh: Any) -> dict[str, int]:
    """Bytes a device by part, at the moment of the train step that needs most."""
    learner, batch = program.learner, program.args[1]
    params = program.params
    found = {
        "parameters": placed_bytes(params),
        "optimizer": placed_bytes(learner.target.opt_state),
        "batch": placed_bytes(batch),
    }
    # Sums over microbatches are float32, and stay beside those of the one being computed.
    whole = (mesh.shape["fsdp"] if program.zero < 3 else 1) * (mesh.shape["data"] if program.zero_data else 1)
    own = _float32_bytes(params)
    sums = own * (whole if program.zero == 1 else 1)
    found["gradients"] = sums if program.accumulate == 1 else sums + own * whole
    saved, loss = saved_activations(program, mesh)
    found["activations saved"], found["loss"] = saved, loss
    found["temporaries"] = working_set(program, mesh)
    # The compiler casts whole stacks of weights to the compute type before the loop over layers.
    itemsize = jnp.dtype(program.model.config.compute_dtype).itemsize
    if whole > 1 or itemsize < 4:
        found["temporaries"] += own // 4 * itemsize * whole
    return found


def forward_memory(program: Program, mesh: Any) -> dict[str, int]:
    """The same of a forward pass."""
    return {
        "parameters": placed_bytes(program.params),
        "batch": placed_bytes(program.args[-1]),
        "temporaries": working_set(program, mesh),
    }


def decode_memory(program: Program, mesh: Any) -> dict[str, int]:
    """Of sampling: the parameters as training holds them, their copies as decoding reads them, and the cache."""
    config, params = program.model.config, program.params
    cache = jax.eval_shape(lambda: init_cache(config, program.rows, program.length))
    rows, heads = program.split(mesh, "batch"), program.split(mesh, "kv_heads")

    def of(x: Any) -> float:
        split = rows * (heads if x.ndim > 1 and x.shape[1] % heads == 0 else 1)
        return x.size * x.dtype.itemsize / split

    dtype = jnp.dtype(config.compute_dtype)
    # Layer by layer rather than stacked, in the compute type.
    copies = sum(_size(x.sharding.shard_shape(x.shape), dtype) for x in jax.tree.leaves(params))
    return {
        "parameters": placed_bytes(params) + copies,
        "kv cache": int(sum(map(of, jax.tree.leaves(cache)))),
        "temporaries": 2 * 4 * program.rows * config.vocab_size // program.split(mesh, "batch", "act_vocab"),
    }


def saved_activations(program: Program, mesh: Any) -> tuple[int, int]:
    """Bytes a device of what the forward pass leaves for the backward pass: (of the model, of the loss after it).

    A residual that has the sizes of a parameter (such as its copy in another type) is split as that is; others are
    split over the rows' devices, and over those of ``tensor`` by heads, or by sequence where they are as wide as the
    model.
    """
    residuals = _residuals(program, mesh)
    model = program.model
    shards = {leaf.shape: leaf.sharding for leaf in jax.tree.leaves(program.params)}
    held = {(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(program.params)}
    rows, heads = program.split(mesh, "batch", "sequence"), program.split(mesh, "act_heads")
    stream = program.split(mesh, "batch", "stream_sequence")
    width, vocab = model.config.d_model, model.config.vocab_size
    offloaded, layers = getattr(model.config, "remat_offload", ()), model.config.num_layers
    saved = loss = 0.0
    for leaf in residuals:
        size = leaf.size * leaf.dtype.itemsize
        if leaf.shape in shards:
            # The parameter itself is counted elsewhere.
            own = _size(shards[leaf.shape].shard_shape(leaf.shape), leaf.dtype)
            saved += 0 if (leaf.shape, leaf.dtype) in held else own
        elif leaf.shape and leaf.shape[-1] == vocab and leaf.shape[0] != layers:
            loss += size / rows / program.split(mesh, "act_vocab")
        elif leaf.ndim < 2:
            saved += size
        else:
            on_host = layers > 1 and "stream" in offloaded and leaf.shape[0] == layers and leaf.shape[-1] == width
            saved += 0 if on_host else size / (stream if leaf.shape[-1] == width else rows * heads)
    return int(saved), int(loss)


def _residuals(program: Program, mesh: Any) -> list[Any]:
    batch, model = program.args[1], program.model
    if getattr(model.config, "remat_offload", ()):
        # What goes to the host is as good as not saved.
        model = build_model(dataclasses.replace(model.config, remat_offload=()))
    count = program.accumulate
    micro = jax.tree.map(lambda x: jax.ShapeDtypeStruct((x.shape[0] // count, *x.shape[1:]), x.dtype), batch)
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), program.params)
    key = jax.eval_shape(lambda: jax.random.key(0))

    def backward(params, micro, key):
        def total(p):
            return with_auxiliary(model.apply, program.objective, p, micro, key).total

        return jax.vjp(total, params)[1]

    with jax.sharding.use_abstract_mesh(mesh):
        return [leaf for leaf in jax.tree.leaves(jax.eval_shape(backward, params, micro, key)) if leaf.size]


def working_set(program: Program, mesh: Any) -> int:
    """What is alive only for a while, in bytes a device: while a layer is differentiated, its weights as gathered
    (twice, since the next layer's are on their way), what it computed, and a gradient of as much; or, where that is
    more, the embedding as gathered and the gradient of it."""
    config = program.model.config
    train = program.kind == "train"
    itemsize = jnp.dtype(config.compute_dtype).itemsize
    tokens = program.rows * program.length / program.accumulate / program.split(mesh, "batch", "sequence")
    tensor = program.split(mesh, "act_heads")
    gathered: dict[str, float] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(program.params):
        names = path_name(path).split("/")
        size = math.prod(leaf.shape) / max(1, tensor) * itemsize
        stacked = names[0] in config.spec().stacks
        gathered[names[0]] = gathered.get(names[0], 0.0) + size / (leaf.shape[0] if stacked else 1)
    layer = max(gathered[name] for name in config.spec().stacks)
    computed = max(_layer_activations(config, spec, tensor) for spec in config.spec().layers()) * tokens * itemsize
    embedding = gathered.get("embed", 0.0)
    if not train:
        return int(2 * layer + computed + embedding)
    return int(max(2 * layer + 2 * computed, 3 * embedding))


def _layer_activations(config: Any, spec: Any, tensor: int) -> float:
    """Numbers a token that one layer computes and its backward pass reads."""
    attention, mlp = spec.attention, spec.mlp
    D = config.d_model
    heads = getattr(attention, "num_heads", 0) * getattr(attention, "head_dim", 0)
    keys = getattr(attention, "num_kv_heads", 0) * getattr(attention, "head_dim", 0)
    hidden = getattr(mlp, "d_ff", 0) * getattr(mlp, "top_k", 1) * 3
    return 3 * D + (2 * heads + 2 * keys + hidden) / tensor


def _float32_bytes(params: Any) -> int:
    return sum(4 * math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(params))


def _size(shape: tuple[int, ...], dtype: Any) -> int:
    return math.prod(shape) * jnp.dtype(dtype).itemsize


def program_memory(program: Program, mesh: Any) -> dict[str, int]:
    """By kind of program.  Parts that it has not are absent."""
    count = {"train": train_memory, "forward": forward_memory, "decode": decode_memory}[program.kind]
    return count(program, mesh)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Peak:
    """The program of a stage that needs most, and the bytes a device by part then; others' arrays that lie beside it
    are "reference and critic"."""

    program: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def stage_memory(programs: list[Program], mesh: Any) -> list[Peak]:
    """A peak for each program, with what else the stage keeps on the devices at that time."""
    kept = resident(programs)
    peaks = []
    for program in programs:
        parts = program_memory(program, mesh)
        beside = kept_beside(program, kept)
        if beside:
            parts = parts | {"reference and critic": beside}
        peaks.append(Peak(program=program.name, parts={name: parts[name] for name in PARTS if parts.get(name)}))
    return peaks


def resident(programs: list[Program]) -> dict[str, int]:
    """Bytes a device of what lives through the whole stage: states of trained models, parameters of frozen ones."""
    kept = {}
    for program in programs:
        name = program.name.removeprefix("train: ").removeprefix("score: ")
        if program.kind == "train":
            kept[name] = placed_bytes(program.learner.target)
    for program in programs:
        name = program.name.removeprefix("train: ").removeprefix("score: ")
        if program.kind == "forward" and name not in kept:
            kept[name] = placed_bytes(program.params)
    return kept


def kept_beside(program: Program, kept: dict[str, int]) -> int:
    """Bytes of what is resident and no argument of the program."""
    name = program.name.removeprefix("train: ").removeprefix("score: ")
    beside = sum(size for other, size in kept.items() if other != name)
    if program.kind != "train" and name in kept:
        # Its own state is there too, of which the program takes the parameters.
        beside += max(0, kept[name] - placed_bytes(program.params))
    if program.kind == "decode" and "policy" in kept:
        beside += -placed_bytes(program.params)
    return beside
