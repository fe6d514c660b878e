"""Bytes of a device's memory that a program needs, from shapes alone, without a compiler.

Parameters, optimizer and batch follow from shapes and shardings, exactly; what a train step needs beside them is added
up moment by moment (``moments``).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxtrain.models.cache import init_cache
from jaxtrain.plan.moments import Traces, Weights, layer_activations, moments
from jaxtrain.plan.programs import Program

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
    """Bytes that one device holds of ShapeDtypeStructs with shardings; not what lives in the host's memory."""
    return sum(
        _size(x.sharding.shard_shape(x.shape), x.dtype)
        for x in jax.tree.leaves(tree)
        if x.sharding.memory_kind != "pinned_host"
    )


def train_memory(program: Program, mesh: Any, traces: Traces) -> tuple[dict[str, int], str]:
    """Bytes a device by part, at the moment of the train step that needs most, and that moment's name."""
    most = max(moments(program, mesh, traces), key=lambda moment: moment.total)
    parts = {
        "parameters": placed_bytes(program.params),
        "optimizer": placed_bytes(program.learner.target.opt_state),
        "batch": placed_bytes(program.args[1]),
        "gradients": most.gradients,
        "activations saved": most.saved,
        "loss": most.loss,
        "temporaries": most.working,
    }
    return parts, most.name


def forward_memory(program: Program, mesh: Any) -> dict[str, int]:
    """The same of a forward pass.  The layers' weights are cast to the compute type before the loop over them."""
    return {
        "parameters": placed_bytes(program.params),
        "batch": placed_bytes(program.args[-1]),
        "temporaries": Weights(program, mesh).copies + working_set(program, mesh),
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


def prefill_memory(program: Program, mesh: Any) -> dict[str, int]:
    """Of reading prompts, beside the slots that are being written."""
    found = decode_memory(program, mesh)
    found["kv cache"] += placed_bytes(program.slots)
    found["temporaries"] += working_set(program, mesh)
    return found


def working_set(program: Program, mesh: Any) -> int:
    """What is alive only for a while in a forward pass, in bytes a device: the embedding, gathered, and its copy; or a
    layer's weights as gathered, two of its widest activations, and what goes into and out of it."""
    itemsize = jnp.dtype(program.model.config.compute_dtype).itemsize
    weights, layer = Weights(program, mesh), layer_activations(program, mesh)
    tokens = program.rows * program.length / program.split(mesh, "batch", "sequence")
    stream = tokens * program.model.config.d_model * itemsize
    return int(max(2 * weights.table, weights.layer_gathered + 2 * layer.widest + 2 * stream))


def _size(shape: tuple[int, ...], dtype: Any) -> int:
    return math.prod(shape) * jnp.dtype(dtype).itemsize


def program_memory(program: Program, mesh: Any, traces: Traces | None = None) -> tuple[dict[str, int], str]:
    """Bytes a device by part, and the moment when.  Parts that a program has not are absent."""
    if program.kind == "train":
        return train_memory(program, mesh, traces or Traces())
    kinds = {"forward": forward_memory, "prefill": prefill_memory, "decode": decode_memory}
    return kinds[program.kind](program, mesh), ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Peak:
    """The program of a stage that needs most, and the bytes a device by part then; others' arrays that lie beside it
    are "reference and critic".  moment: of a train step, which of its moments that is."""

    program: str
    parts: dict[str, int]
    moment: str = ""

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def stage_memory(programs: list[Program], mesh: Any, traces: Traces | None = None) -> list[Peak]:
    """A peak for each program, with what else the stage keeps on the devices at that time."""
    traces = traces or Traces()
    kept = resident(programs)
    peaks = []
    for program in programs:
        parts, moment = program_memory(program, mesh, traces)
        beside = kept_beside(program, kept)
        if beside:
            parts = parts | {"reference and critic": beside}
        parts = {name: parts[name] for name in PARTS if parts.get(name)}
        peaks.append(Peak(program=program.name, parts=parts, moment=moment))
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
    if program.kind in ("prefill", "decode") and "policy" in kept:
        beside += -placed_bytes(program.params)
    return beside
