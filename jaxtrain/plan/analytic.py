"""A program as its mathematics says it runs, for where there is no compiler: the same items that a walk yields.

Layers are one loop forward and one backward, all of the average size.  What the compiler decides is assumed: weights
split over ``fsdp`` are gathered, and gradients scattered, behind the layer's work; sums over ``tensor`` are waited for.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxtrain.kernels.attention.tpu import group_parts
from jaxtrain.kernels.target import target
from jaxtrain.models.attention import AttentionSpec
from jaxtrain.models.flops import forward_flops_per_token, head_flops_per_token, seen_keys
from jaxtrain.models.layers import MLPSpec
from jaxtrain.models.pipeline import Pipeline
from jaxtrain.plan.hlo import Collective, Done, Item, Loop, Start, Work
from jaxtrain.plan.memory import decode_memory, placed_bytes
from jaxtrain.plan.moments import in_parts
from jaxtrain.plan.programs import Program
from jaxtrain.sharding import Constrain
from jaxtrain.types import path_name

# Times that what a layer hands on, ``[tokens, d_model]``, goes to or from HBM outside of products and kernels: read off
# the walked step of Llama-3-8B on v5e (8,192 tokens a chip, full remat: 7.4 forward, 37.8 backward, recomputation
# included).
FORWARD_PASSES, BACKWARD_PASSES = 7.4, 37.8
# Flash attention's backward pass is five products of matrices to the forward's two (2205.14135), or seven in two
# kernels.
ATTENTION_BACKWARD, IN_TWO_KERNELS = 2.5, 3.5
# Adam reads and writes parameter and two moments, and reads the gradient.
OPTIMIZER_PASSES = 7


def items_of(program: Program, mesh: Any) -> tuple[Item, ...]:
    """What one device does in one call."""
    if program.kind == "decode":
        return (Loop(program.new_tokens, (_decode_step(program, mesh),)),)
    layers = _Layers(program, mesh)
    once = [*layers.forward()]
    if program.kind == "train":
        once += layers.backward()
        once += layers.added() if program.accumulate > 1 else []
    items: list[Item] = [Loop(program.accumulate, tuple(once))] if program.accumulate > 1 else once
    if program.kind == "train":
        if program.zero_data and not layers.data_inside:
            items = [*layers.once("all-gather", layers.itemsize, "data"), *items]
        if program.zero < 3:
            items = [*layers.once("all-gather", layers.itemsize), *items]
        if program.zero == 1:
            items += layers.once("reduce-scatter", 4)
        items += layers.update()
    return tuple(items)


def executed_flops(program: Program, mesh: Any) -> tuple[float, float]:
    """(of matrix products, of attention kernels) on one device in one call, with what remat computes again."""
    if program.kind == "decode":
        return _decode_flops(program, mesh)
    layers = _Layers(program, mesh)
    times, idle = program.accumulate, layers.turns / layers.busy
    if program.kind != "train":
        return times * (idle * layers.products + layers.head), times * idle * layers.kernels
    products = idle * (layers.products * 3 + layers.again) + layers.head * layers.head_times
    return times * products, times * idle * layers.kernels * (1 + layers.kernels_again + layers.kernels_back)


class _Layers:
    """Figures of one microbatch on one device.

    turns: of the loop over layers, of which ``busy`` do what the others, in a pipeline's bubble, do for nothing.
    """

    def __init__(self, program: Program, mesh: Any):
        self.program, self.mesh = program, mesh
        config = program.model.config
        self.config = config
        spec = config.spec()
        self.count = len(spec.layers())

        def split(*names: str) -> int:
            return program.split(mesh, *names)

        self.rows = split("batch", "sequence")
        self.tensor = split("act_heads")
        self.data_inside = program.data_in_layers(mesh)
        self.tokens = program.rows * program.length / program.accumulate / self.rows
        self.itemsize = jnp.dtype(config.compute_dtype).itemsize
        T = program.length
        attention = sum(_attention(layer.attention, T) for layer in spec.layers())
        heads = head_flops_per_token(config)
        whole = forward_flops_per_token(config, T)
        share = self.tokens / self.tensor
        self.kernels = attention * share
        self.head = heads * share / (T if program.kind == "prefill" else 1)
        self.products = (whole - attention - heads) * share
        down = sum(2 * layer.mlp.d_ff * config.d_model for layer in spec.layers() if isinstance(layer.mlp, MLPSpec))
        # The last product of a layer is not needed for its gradient, so remat leaves it out; "dots" keeps products.
        kept = (*getattr(config, "remat_save", ()), *getattr(config, "remat_offload", ()))
        named = sum(_named_products(layer, config.d_model, kept) for layer in spec.layers())
        self.again = {"none": 0.0, "dots": 0.0}.get(config.remat, self.products - (down + named) * share)
        self.kernels_again = 0 if config.remat == "none" or "attention" in kept else 1
        self.kernels_back = self._kernels_back()
        self.head_times = 4 if in_parts(program, mesh) else 3
        self.params = params = program.params
        stacked = [
            leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(params)
            if path_name(path).split("/")[0] in spec.stacks
        ]
        self.layer_params = sum(math.prod(leaf.shape) for leaf in stacked) / self.count / self.tensor
        self.experts = split("experts")
        self.turns, self.busy, self.pipe = self.count, self.count, self._pipeline(spec)
        if self.pipe is not None:
            # Stages have a part of the layers, and of each other's rows as many more.
            each = self.count / (self.pipe.stages * self.pipe.rounds)
            self.turns, self.busy = (
                round(each * self.pipe.ticks),
                round(each * self.pipe.rounds * self.pipe.microbatches),
            )
        self.stream = self.tokens * config.d_model * self.itemsize * self.count / self.busy

    def _kernels_back(self) -> float:
        """The backward kernel's FLOPs over the forward one's."""
        with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
            if target()[0] != "tpu":
                return ATTENTION_BACKWARD
            length = self.program.length // self.program.split(self.mesh, "sequence")
            specs = {layer.attention for layer in self.config.spec().layers()}
            fits = [
                group_parts(spec.num_heads // spec.num_kv_heads, length, spec.head_dim, self.itemsize)
                for spec in specs
                if isinstance(spec, AttentionSpec)
            ]
            return IN_TWO_KERNELS if None in fits else ATTENTION_BACKWARD

    def _pipeline(self, spec: Any) -> Pipeline | None:
        if self.mesh.shape["stage"] == 1 or self.program.kind == "decode":
            return None
        with jax.sharding.use_abstract_mesh(self.mesh):
            rows = self.program.rows // self.program.accumulate
            return Pipeline.of(self.config, spec.stacks[spec.pipelined], rows, Constrain(self.program.model.rules))

    def passed(self) -> list[Item]:
        """Through a pipeline, in one direction: a microbatch on to the next stage at every tick; before and after it
        every other stage's to and from the first, and with several rounds all weights to where they are used."""
        if self.pipe is None:
            return []
        S, R = self.pipe.stages, self.pipe.rounds
        found = [Collective("collective-permute", self.stream, ("stage",), S)] * self.pipe.ticks
        rows = self.stream * self.pipe.microbatches / S
        found += [Collective("collective-permute", rows, ("stage",), S)] * (2 * (S - 1))
        if R > 1:
            own = sum(
                math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
                for leaf in jax.tree.leaves(self.params[self.config.spec().pipelined])
            )
            found += [Collective("collective-permute", own * -(-R // S) / R, ("stage",), S)] * (S - 1)
        return [Start(one.kind, one, False) for one in found]

    def gathers(self, key: str) -> tuple[list[Item], list[Item]]:
        """Starts and ends of what a layer's weights need, by the level of ZeRO."""
        fsdp, data, zero = self.mesh.shape["fsdp"], self.mesh.shape["data"], self.program.zero
        kinds = {"all-gather": zero == 3, "reduce-scatter": zero >= 2 and key == "backward"}
        found: list[Item] = []
        ends: list[Item] = []
        size = self.layer_params * self.itemsize
        # Over data, if there at all, the part that fsdp leaves to each.
        axes = {"fsdp": (fsdp, size), "data": (data if self.data_inside else 1, size / fsdp)}
        for kind, wanted in kinds.items():
            for axis, (members, size) in axes.items():
                if wanted and members > 1:
                    name = f"{key} {kind} {axis}"
                    found.append(Start(name, Collective(kind, size, (axis,), members), True))
                    ends.append(Done(name))
        return found, ends

    def once(self, kind: str, itemsize: int, axis: str = "fsdp") -> list[Item]:
        """All layers' weights or gradients over an axis, once a step."""
        members, size = self.mesh.shape[axis], self.layer_params * self.count * itemsize
        if axis == "data" and self.program.zero == 3:
            size /= self.mesh.shape["fsdp"]
        return [Start(kind, Collective(kind, size, (axis,), members), False)] if members > 1 else []

    def sums(self, count: int) -> list[Item]:
        """Of activations over ``tensor`` (and their exchange over ``expert`` and ``context``)."""
        found: list[Item] = []
        shape = self.mesh.shape
        if shape["tensor"] > 1:
            # Between blocks a sequence is split: an all-reduce in two halves, before and after.
            for kind in ("all-gather", "reduce-scatter"):
                found += [Start(kind, Collective(kind, self.stream, ("tensor",), shape["tensor"]), False)] * count
        moe = [layer.mlp for layer in self.config.spec().layers() if hasattr(layer.mlp, "top_k")]
        if self.experts > 1 and moe:
            size = self.stream * moe[0].top_k * len(moe) / self.count
            found += [Start("experts", Collective("all-to-all", size, ("expert",), self.experts), False)] * count
        return found

    def ring(self, key: str, arrays: int) -> tuple[list[Item], list[Item]]:
        context = self.mesh.shape["context"]
        specs = [layer.attention for layer in self.config.spec().layers() if isinstance(layer.attention, AttentionSpec)]
        if context == 1 or not specs:
            return [], []
        size = self.tokens * specs[0].num_kv_heads * specs[0].head_dim * self.itemsize / self.tensor
        one = Collective("collective-permute", arrays * size * (context - 1), ("context",), 2)
        return [Start(key, one, True)], [Done(key)]

    def forward(self) -> list[Item]:
        starts, ends = self.gathers("forward")
        ring, rung = self.ring("forward ring", 2)
        L = self.busy
        turn = (
            *starts,
            Work("products", self.products / L),
            *ring,
            Work("attention", self.kernels / L, kernel=True),
            *rung,
            Work("other", bytes=FORWARD_PASSES * self.stream),
            *self.sums(2),
            *ends,
        )
        train = self.program.kind == "train"
        head = Work("head", self.head * (self.head_times if train else 1))
        return [Loop(self.turns, turn), *self.passed(), head]

    def backward(self) -> list[Item]:
        starts, ends = self.gathers("backward")
        ring, rung = self.ring("backward ring", 6)
        L = self.busy
        again = self.kernels_again
        turn = (
            *starts,
            Work("products", (2 * self.products + self.again) / L),
            *ring,
            Work("attention", self.kernels / L * (again + self.kernels_back), kernel=True),
            *rung,
            Work("other", bytes=BACKWARD_PASSES * self.stream),
            *self.sums(2 + (2 if self.again else 0)),
            *ends,
        )
        return [Loop(self.turns, turn), *self.passed()]

    def added(self) -> list[Item]:
        """A microbatch's gradients onto the sums: both are read, and the sums, in float32, written."""
        own = sum(4 * math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(self.params))
        return [Work("sums", bytes=3 * own * (self.mesh.shape["fsdp"] if self.program.zero == 1 else 1))]

    def update(self) -> list[Item]:
        shape = self.mesh.shape
        own = sum(4 * math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(self.params))
        found: list[Item] = []
        split = self.program.zero_data and shape["data"] > 1
        copies = tuple(axis for axis in ("data", "context")[split:] if shape[axis] > 1)
        if split:
            left = own * shape["data"]
            if self.data_inside:
                left -= 4 * self.layer_params * self.count / shape["fsdp"]
            collective = Collective("reduce-scatter", left, ("data",), shape["data"])
            found.append(Start("gradients", collective, False))
        if copies:
            members = math.prod(shape[axis] for axis in copies)
            found.append(Start("copies", Collective("all-reduce", own, copies, members), False))
        return [*found, Work("optimizer", bytes=OPTIMIZER_PASSES * own)]


def _named_products(layer: Any, d_model: int, names: tuple[str, ...]) -> float:
    """FLOPs a token of the products that ``remat_save`` and ``remat_offload`` keep, see ``REMAT_NAMES``."""
    found = 0.0
    if isinstance(layer.attention, AttentionSpec):
        q, k = (n * layer.attention.head_dim for n in (layer.attention.num_heads, layer.attention.num_kv_heads))
        widths = {"query": q, "key": k, "value": k, "attention_out": q}
        found += sum(2 * d_model * width for name, width in widths.items() if name in names)
    if isinstance(layer.mlp, MLPSpec):
        found += sum(2 * d_model * layer.mlp.d_ff for name in ("mlp_gate", "mlp_up") if name in names)
    return found


def _attention(spec: Any, length: int) -> float:
    """FLOPs a token of the kernel alone."""
    if isinstance(spec, AttentionSpec):
        return 4 * spec.num_heads * spec.head_dim * seen_keys(length, spec.window)
    # What grows with the length is the kernel's.
    D = 1
    return spec.flops_per_token(D, length) - spec.flops_per_token(D, 1)


def _decode_flops(program: Program, mesh: Any) -> tuple[float, float]:
    """See ``executed_flops``: of whole rows, less of their prompts."""
    config, length = program.model.config, program.length
    layers = config.spec().layers()

    def row(length: int) -> tuple[float, float]:
        attention = sum(_attention(layer.attention, length) for layer in layers)
        return length * (forward_flops_per_token(config, length) - attention), length * attention

    rows = program.rows / program.split(mesh, "batch", "act_heads")
    whole, prompt = row(length), row(max(1, length - program.new_tokens))
    return rows * (whole[0] - prompt[0]), rows * (whole[1] - prompt[1])


def _decode_step(program: Program, mesh: Any) -> Item:
    """One token of every row: the weights and the cache so far, on average half full beyond the prompt, are read."""
    config = program.model.config
    parts = decode_memory(program, mesh)
    params = placed_bytes(program.params)
    itemsize = jnp.dtype(config.compute_dtype).itemsize / jax.tree.leaves(program.params)[0].dtype.itemsize
    fsdp = mesh.shape["fsdp"]
    prompt = program.length - program.new_tokens
    filled = (prompt + program.new_tokens / 2) / program.length
    flops = sum(_decode_flops(program, mesh)) / program.new_tokens
    weights = params * itemsize * fsdp
    found: list[Item] = []
    if fsdp > 1:
        found.append(Start("weights", Collective("all-gather", weights, ("fsdp",), fsdp), False))
    return Loop(1, (*found, Work("decode", flops, weights + filled * parts["kv cache"])))
