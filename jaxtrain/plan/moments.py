"""What a device holds at each moment of a train step that could be the one that needs most.

Arguments (parameters, optimizer, batch) are there throughout, and so are copies of the layers' weights in the compute
type.  Beside them lie

    the embedding's lookup      a device's columns of the table, and what it has looked up for others and for itself;
                                where the sequence is split the table, gathered, and once more as the lookup wants it
    the loss                    what the layers saved; what the final norm and the loss saved; as much for gradients
    a layer's backward pass     what the layers saved; all layers' gradients; what a layer computes again; its weights
                                as gathered; the gradients of its widest activation and of its largest matrix
    the embedding's gradient    all gradients; the table's as scattered, and once more as it is sent

This is what the buffers of compiled steps show.  What is saved is what JAX itself would save: the loss is traced and
its residuals are added up, whatever ``remat``, objective, model and kernels are.

Against the compiler (libtpu 0.0.42; shipped recipes: v5p, v5e and v6e, SFT, DPO, 128k tokens, a mixture) -4% to +4%;
Llama 3 8B cut to 4 layers +6%, the policy's step of a PPO job -7%.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxtrain.kernels.cross_entropy.api import KEPT_BYTES
from jaxtrain.models import build_model
from jaxtrain.models.latent import LatentSpec
from jaxtrain.models.moe import MoESpec, exchanged
from jaxtrain.models.pipeline import most_microbatches
from jaxtrain.plan.programs import Program
from jaxtrain.train.step import with_auxiliary
from jaxtrain.types import path_name


@dataclasses.dataclass(frozen=True, kw_only=True)
class Moment:
    """name: which.  Bytes a device: saved: by the layers, for the backward pass.  loss: by what follows them.
    gradients: whole stacks.  working: all that is alive for a short while."""

    name: str
    saved: int = 0
    loss: int = 0
    gradients: int = 0
    working: int = 0

    @property
    def total(self) -> int:
        return self.saved + self.loss + self.gradients + self.working


def moments(program: Program, mesh: Any, traces: Traces) -> list[Moment]:
    """All of them, in order."""
    config = program.model.config
    weights = Weights(program, mesh)
    saved, kept, logits = saved_activations(program, mesh, traces)
    layer = layer_activations(program, mesh)
    layers = len(config.spec().layers())
    again = max(0.0, layer.read - saved / layers)
    # Computed again a part of the vocabulary at a time, or kept whole.
    logits_again = 2 * min(KEPT_BYTES, kept) if in_parts(program, mesh) else logits
    float_stream = 4 * _stream_bytes(program, mesh) // jnp.dtype(config.compute_dtype).itemsize
    copies, table = weights.copies, weights.table
    # A loop over microbatches keeps their sums, and does not make anew what does not depend on them.
    several = program.accumulate > 1
    sums, kept_table = (weights.sums, table) if several else (0, 0)
    after = copies if several else 0
    gradients = sums + weights.gradients
    backward = again + layer.widest + weights.layer_gathered + weights.largest_gradient
    # What others' rows and one's own take, before and after they are exchanged.
    exchanged = 2 * _stream_bytes(program, mesh) if mesh.shape["fsdp"] > 1 and mesh.shape["context"] == 1 else 0
    looked_up = 2 * table + exchanged
    found = [
        Moment(name="the embedding's lookup", gradients=sums, working=copies + looked_up),
        Moment(
            name="the loss",
            saved=saved,
            loss=kept + logits,
            gradients=sums + weights.head_gradient,
            working=copies + kept_table + logits_again + 2 * float_stream,
        ),
        Moment(
            name="a layer's backward pass",
            saved=saved,
            gradients=gradients,
            working=int(copies + kept_table + backward),
        ),
        Moment(
            name="the embedding's gradient", gradients=gradients, working=after + kept_table + 2 * table + exchanged
        ),
    ]
    if onload := _onload(program, layers):
        found.append(Moment(name="the update", gradients=weights.gradients, working=onload))
    return found


class Weights:
    """Bytes a device of copies and gradients.

    copies: of the layers' weights in the compute type, whole over what the level of ZeRO makes whole.
    gradients: of all parameters after a microbatch's backward pass: of the layers in the type and the place that ZeRO
        gives them, of the head as its loss leaves them.  sums: of microbatches, float32.
    head_gradient: whole over ``data``, whose devices' are added at the end.
    layer_gathered: one layer's weights over ``fsdp``.  largest_gradient: of one of its matrices, before it is split.
    table: of the embedding, what a lookup reads, in the compute type.
    """

    def __init__(self, program: Program, mesh: Any):
        config = program.model.config
        stacks = config.spec().stacks
        size = jnp.dtype(config.compute_dtype).itemsize
        shape = mesh.shape
        over_data = shape["data"] if program.zero_data else 1
        in_layers = program.data_in_layers(mesh)
        made_whole = (shape["fsdp"] if program.zero < 3 else 1) * (1 if in_layers else over_data)
        self.copies = self.gradients = self.sums = self.table = self.head_gradient = 0
        gathered: dict[str, int] = {}
        largest = 0
        dtypes = jax.tree.leaves(program.model.dtypes)
        leaves = jax.tree_util.tree_leaves_with_path(program.params)
        for (path, leaf), dtype in zip(leaves, dtypes, strict=True):
            name = path_name(path).split("/")[0]
            own = math.prod(leaf.sharding.shard_shape(leaf.shape))
            self.sums += 4 * own * (made_whole if program.zero == 1 else 1)
            if name in stacks:
                used_in = jnp.dtype(dtype).itemsize if dtype else leaf.dtype.itemsize
                whole = own * made_whole if dtype else own
                if whole > own or used_in != leaf.dtype.itemsize:
                    self.copies += whole * used_in
                is_copy = (made_whole > 1 or in_layers) and dtype
                kept = whole if program.zero == 1 else own
                self.gradients += kept * used_in if is_copy else own * leaf.dtype.itemsize
                each = leaf.size * used_in // leaf.shape[0] // _ways(leaf, mesh, "tensor", "expert", "stage")
                gathered[name] = gathered.get(name, 0) + each
                largest = max(largest, each)
            elif name == "embed":
                ways = _ways(leaf, mesh, "tensor") * (1 if shape["context"] > 1 else shape["fsdp"])
                self.table = max(self.table, leaf.size * size // ways)
                self.gradients += own * leaf.dtype.itemsize
            else:
                self.gradients += own * leaf.dtype.itemsize * over_data
                self.head_gradient += own * leaf.dtype.itemsize * over_data
        inside = shape["fsdp"] > 1 and program.zero == 3
        self.layer_gathered = max(gathered.values()) if inside else 0
        self.largest_gradient = largest if inside or over_data > 1 or shape["data"] > 1 else 0


def _ways(leaf: Any, mesh: Any, *axes: str) -> int:
    """Over how many devices of these axes an array is split."""
    used = {axis for entry in leaf.sharding.spec for axis in ((entry,) if isinstance(entry, str) else entry or ())}
    return math.prod(mesh.shape[axis] for axis in axes if axis in used)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerActivations:
    """Bytes a device: read: by the backward pass of the layer that needs most.  widest: of its widest activation's
    gradient, and of what is gathered over ``tensor`` before and added after its products."""

    read: float
    widest: float


def layer_activations(program: Program, mesh: Any) -> LayerActivations:
    """Of one microbatch."""
    config = program.model.config
    itemsize = jnp.dtype(config.compute_dtype).itemsize
    tokens = program.rows * program.length / program.accumulate / program.split(mesh, "batch", "sequence")
    tensor = program.split(mesh, "act_heads")
    found = []
    for spec in dict.fromkeys(config.spec().layers()):
        D, mlp = config.d_model, spec.mlp
        queries, keys = _attention_widths(spec.attention)
        routed = isinstance(mlp, MoESpec)
        hidden = mlp.shared_d_ff if routed else mlp.d_ff
        read = 3 * D + (queries + keys + 3 * hidden) / tensor
        widest = max(D, queries / 2 / tensor, hidden / tensor) + (2 * D if tensor > 1 else 0)
        if routed:
            read += _routed(mlp, D, tensor, exchanged(program.model.rules, mesh))
        found.append((read * tokens * itemsize, widest * tokens * itemsize))
    read, widest = max(found, key=sum)
    return LayerActivations(read=read, widest=widest)


def _attention_widths(spec: Any) -> tuple[int, int]:
    """Of queries and what they read, and of keys and values, all heads together."""
    if isinstance(spec, LatentSpec):
        both = spec.num_heads * (spec.plain_dim + spec.rope_dim + spec.value_dim)
        return both, both
    return 2 * spec.num_heads * spec.head_dim, 2 * spec.num_kv_heads * spec.head_dim


def _routed(spec: MoESpec, d_model: int, tensor: int, among: int) -> float:
    """Elements a token that are alive together in a mixture's backward pass.  Every device has room for all tokens of
    those it shares experts with, in case that all choose its own: of each assignment the three of its expert's width;
    the row itself, its gradient and its result; the gradients by gate and by up, and what the kernels made of
    these and of the result, before rows beyond the last are cleared.  And the tokens' gradients in float32."""
    return among * (spec.top_k * (3 * spec.d_ff / tensor + 7 * d_model) + 2 * d_model)


def _stream_bytes(program: Program, mesh: Any) -> int:
    """Of what a layer hands on."""
    config = program.model.config
    tokens = program.rows * program.length // program.accumulate
    size = tokens * config.d_model * jnp.dtype(config.compute_dtype).itemsize
    return size // program.split(mesh, "batch", "stream_sequence")


def _onload(program: Program, layers: int) -> int:
    """Bytes of the optimizer's state that come from the host at a time: of two layers, or what is in no stack."""
    stacked = alone = 0
    for leaf in jax.tree.leaves(program.learner.target.opt_state):
        if leaf.sharding.memory_kind == "pinned_host":
            size = math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            if leaf.ndim > 2:
                stacked += size
            else:
                alone += size
    return max(2 * stacked // layers, alone)


def saved_activations(program: Program, mesh: Any, traces: Traces) -> tuple[int, int, int]:
    """Bytes a device of what the forward pass leaves for the backward pass: (by the layers, after them, logits).

    Parameters, and copies of them, are counted elsewhere.  The rest is split over the rows' devices, and over those of
    ``tensor`` by heads, or by sequence where it is as wide as the model.
    """
    model = program.model
    shapes = {leaf.shape for leaf in jax.tree.leaves(program.params)}
    rows, heads = program.split(mesh, "batch", "sequence"), program.split(mesh, "act_heads")
    stream = program.split(mesh, "batch", "stream_sequence")
    width, vocab = model.config.d_model, model.config.vocab_size
    columns = program.split(mesh, "act_vocab")
    offloaded = getattr(model.config, "remat_offload", ())
    stacks = {len(layers) for layers in model.config.spec().stacks.values()}
    micro, length = program.rows // program.accumulate, program.length
    saved = kept = logits = 0.0
    for leaf in traces.residuals(program, mesh):
        size = leaf.size * leaf.dtype.itemsize
        # [B, T, ...], or [B * T, ...] as models make of it; of pairs, each side by itself.
        outside = leaf.ndim < 2 or leaf.shape[0] in (micro * length, micro * length // 2)
        outside |= leaf.ndim > 1 and leaf.shape[0] in (micro, micro // 2) and leaf.shape[1] == length
        if leaf.shape in shapes:
            continue
        if leaf.ndim < 2:
            kept += size
        elif outside and leaf.shape[-1] == vocab:
            logits += size / rows / columns
        elif outside:
            kept += size / (stream if leaf.shape[-1] == width else rows * heads)
        elif "stream" in offloaded and leaf.shape[0] in stacks and leaf.shape[-1] == width:
            continue  # on the host
        else:
            saved += size / (stream if leaf.shape[-1] == width else rows * heads)
    return int(saved), int(kept), int(logits)


class Traces:
    """Residuals of losses, each traced once: what is traced depends on a mesh only by which kernels it makes choose,
    and its shapes change in one way with the number of rows."""

    def __init__(self):
        self.found: dict[Any, dict[int, list[jax.ShapeDtypeStruct]]] = {}

    def residuals(self, program: Program, mesh: Any) -> list[jax.ShapeDtypeStruct]:
        """As ``jax.vjp`` leaves them for one microbatch: global shapes."""
        shape = mesh.shape
        kinds = tuple((axis, shape[axis]) for axis in ("context", "expert", "stage"))
        key = (
            program.model,
            program.objective,
            program.length,
            kinds,
            shape["tensor"] > 1,
            math.prod(shape.values()) > 1,
            in_parts(program, mesh),
            pipeline_microbatches(program, mesh),
        )
        try:
            by_rows = self.found.setdefault(key, {})
        except TypeError:  # an objective that cannot be hashed
            return trace_residuals(program, mesh)
        rows = program.rows // program.accumulate
        if rows not in by_rows:
            by_rows[rows] = _between(by_rows, rows) or trace_residuals(program, mesh)
        return by_rows[rows]


def _between(by_rows: dict[int, list[Any]], rows: int) -> list[Any] | None:
    """The shapes for another number of rows, on the line through two that are known; None where there are none."""
    if len(by_rows) < 2:
        return None
    (first, one), (second, other) = list(by_rows.items())[:2]
    if [(x.ndim, x.dtype) for x in one] != [(x.ndim, x.dtype) for x in other]:
        return None

    def size(a: int, b: int) -> float:
        return a + (b - a) * (rows - first) / (second - first)

    shapes = [[size(a, b) for a, b in zip(x.shape, y.shape, strict=True)] for x, y in zip(one, other, strict=True)]
    if any(dim != int(dim) or dim < 0 for shape in shapes for dim in shape):
        return None
    return [jax.ShapeDtypeStruct(tuple(map(int, shape)), x.dtype) for shape, x in zip(shapes, one, strict=True)]


def trace_residuals(program: Program, mesh: Any) -> list[jax.ShapeDtypeStruct]:
    """Traces the loss of one microbatch."""
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
        leaves = jax.tree.leaves(jax.eval_shape(backward, params, micro, key))
    return [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves if leaf.size]


def pipeline_microbatches(program: Program, mesh: Any) -> int:
    """Into how many a pipeline cuts the rows that pass it together; 0 without one."""
    if mesh.shape["stage"] == 1 or not hasattr(program.model.config, "pipeline_microbatches"):
        return 0
    rows = program.rows // program.accumulate // program.split(mesh, "batch")
    return program.model.config.pipeline_microbatches or most_microbatches(mesh.shape["stage"], max(1, rows))


def in_parts(program: Program, mesh: Any) -> bool:
    """Whether the loss computes logits a part of the vocabulary at a time, see ``kernels.cross_entropy``."""
    config = program.model.config
    if "lm" not in config.heads:
        return False
    if config.cross_entropy != "auto":
        return config.cross_entropy == "chunked"
    tokens = program.rows * program.length / program.accumulate / program.split(mesh, "batch", "sequence")
    return tokens * config.vocab_size / program.split(mesh, "act_vocab") * 4 > KEPT_BYTES
