"""Attention over a mesh: every device runs a backend on its part of rows and heads, and shares out a split sequence.

The compiler cannot split a kernel, so it runs under ``shard_map``: rows over the mesh axes of the rule "batch", heads
over those of "act_heads", the sequence over those of "sequence", where ``ring`` takes over.

Letters: B rows, T queries, S keys, N query heads, K key heads, H size of queries and keys, V of values.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxtrain.kernels.attention.flash import flash
from jaxtrain.kernels.attention.masks import Marks, Spec
from jaxtrain.kernels.attention.ring import Gather, Ring
from jaxtrain.sharding import ShardingRules, free_axes, vary_like

ACROSS = ("auto", "ring", "gather")


def attend(
    backend: Any, spec: Spec, q_BNTH, k_BKSH, v_BKSV, marks: Marks, *, rules: ShardingRules, across: str = "auto"
) -> tuple[jax.Array, jax.Array]:
    """``flash`` on the current mesh, if there is one: ``out [B, N, T, V]``, ``lse`` float32 ``[B, N, T]``.

    Sizes that do not divide are padded: rows and tokens by padding, which costs next to nothing; heads by heads of
    zeros, since devices without a head of their own would only wait.  Where there are fewer key heads than devices to
    split them over, or the parts do not fit, keys and values are repeated until every device has what its queries read.

    across: how a sequence that is split over devices is attended to: "ring", "gather", or "auto" for
        :func:`choose_across`.
    Mesh axes that are already manual are those of a ``shard_map`` of the caller's: what comes in is whole for us.
    """
    arrays = (q_BNTH, k_BKSH, v_BKSV, *jax.tree.leaves(marks))
    # A custom gradient must vary over the axes of a shard_map that its argument varies over.
    q_BNTH, k_BKSH, v_BKSV = (vary_like(x, *arrays) for x in arrays[:3])
    layout = Layout.of(rules)
    if layout is None:
        return flash(backend, spec, q_BNTH, k_BKSH, v_BKSV, marks)
    B, N, T, _ = q_BNTH.shape
    K, S = k_BKSH.shape[1:3]
    chunks = layout.ways(layout.sequence)
    if chunks > 1:
        # A causal mask over one sequence leaves the later devices more to do.
        zigzag = spec.high and T == S
        across = choose_across(chunks) if across == "auto" else across
        backend = {"ring": Ring, "gather": Gather}[across](backend, layout.sequence, zigzag)
        chunks *= 2 if zigzag else 1
    heads, each = _heads(N, K, layout.ways(layout.heads))
    rows = layout.ways(layout.rows)
    k_BKSH, v_BKSV = (jnp.repeat(x, each, axis=1) if each > 1 else x for x in (k_BKSH, v_BKSV))
    k_heads = heads * k_BKSH.shape[1] // N
    q_BNTH = _pad(q_BNTH, {0: rows, 2: chunks}, {1: heads - N})
    k_BKSH, v_BKSV = (_pad(x, {0: rows, 2: chunks}, {1: k_heads - x.shape[1]}) for x in (k_BKSH, v_BKSV))
    marks = jax.tree.map(lambda x: _pad(x, {0: rows, 1: chunks}), marks)
    # What it promises is only read where there are as many keys as queries, which padding may bring about.
    spec = dataclasses.replace(spec, in_order=spec.in_order and T == S)
    out_BNTV, lse_BNT = flash(OnMesh(backend, layout), spec, q_BNTH, k_BKSH, v_BKSV, marks)
    return out_BNTV[:B, :N, :T], lse_BNT[:B, :N, :T]


def splits_sequence(rules: ShardingRules) -> bool:
    """Whether the current mesh splits sequences over several devices."""
    layout = Layout.of(rules)
    return layout is not None and layout.ways(layout.sequence) > 1


def choose_across(n: int) -> str:
    """How n devices share out a sequence.

    Two of them gather: there is one transfer either way, a ring would hide it behind half of the work at the price of
    merging two softmaxes, and the gathered keys and values are only twice a device's own.  More of them form a ring,
    whose memory does not grow with their number.
    """
    return "gather" if n <= 2 else "ring"


@dataclasses.dataclass(frozen=True)
class Layout:
    """The axes of the current mesh that split rows, heads and the sequence; ``free``: all that are not manual yet."""

    sizes: tuple[tuple[str, int], ...]
    free: frozenset[str]
    rows: tuple[str, ...]
    heads: tuple[str, ...]
    sequence: tuple[str, ...]

    @classmethod
    def of(cls, rules: ShardingRules) -> Layout | None:
        """None without a mesh, and where the mesh has nothing left to split over."""
        mesh = jax.sharding.get_abstract_mesh()
        free = free_axes(mesh)
        if math.prod(mesh.shape[axis] for axis in free) == 1:
            return None
        # All at once, so that rules which collide are refused.
        entries = rules.spec(("batch", "act_heads", "sequence"))
        # A PartitionSpec holds the name itself where there is but one.
        entries = ((entry,) if isinstance(entry, str) else entry or () for entry in entries)
        rows, heads, sequence = (tuple(axis for axis in entry if axis in free) for entry in entries)
        # A ppermute takes axes in the order of the mesh, whatever order they are named in.
        sequence = tuple(axis for axis in mesh.axis_names if axis in sequence)
        return cls(tuple(mesh.shape.items()), free, rows, heads, sequence)

    def ways(self, axes: tuple[str, ...]) -> int:
        """Over how many devices ``axes`` split."""
        return math.prod(size for axis, size in self.sizes if axis in axes)


@dataclasses.dataclass(frozen=True)
class OnMesh:
    """``backend`` under a ``shard_map``, as a backend of whole arrays whose sizes divide."""

    backend: Any
    layout: Layout

    def _specs(self):
        at = self.layout
        token, marks = P(at.rows, at.heads, at.sequence), P(at.rows, at.sequence)
        marks = Marks(**{field.name: marks for field in dataclasses.fields(Marks)})
        return P(*token, None), token, marks

    def _run(self, function, in_specs, out_specs, *args):
        # Nothing is differentiated through: forward and backward are maps of their own.
        free = self.layout.free
        mapped = jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, axis_names=free, check_vma=False)
        return jax.tree.map(lambda x: vary_like(x, *jax.tree.leaves(args)), mapped(*args))

    def forward(self, spec: Spec, q_BNTH, k_BKSH, v_BKSV, marks: Marks) -> tuple[jax.Array, jax.Array]:
        vector, number, mark = self._specs()
        function = partial(self.backend.forward, spec)
        return self._run(function, (vector,) * 3 + (mark,), (vector, number), q_BNTH, k_BKSH, v_BKSV, marks)

    def backward(self, spec: Spec, q_BNTH, k_BKSH, v_BKSV, marks: Marks, lse_BNT, delta_BNT, d_out_BNTV):
        vector, number, mark = self._specs()
        specs = (vector,) * 3 + (mark, number, number, vector)
        args = (q_BNTH, k_BKSH, v_BKSV, marks, lse_BNT, delta_BNT, d_out_BNTV)
        return self._run(partial(self.backend.backward, spec), specs, (vector,) * 3, *args)


def _heads(N: int, K: int, ways: int) -> tuple[int, int]:
    """How many query heads there must be, with padding, and how often each key head is repeated.

    Every device gets ``heads / ways`` query heads; g of them, in order, share a key head both before and after.
    """
    heads = N + -N % ways
    g = math.gcd(heads // ways, N // K)
    return heads, N // K // g


def _pad(x: jax.Array, multiples: dict[int, int], more: dict[int, int] | None = None) -> jax.Array:
    """Zeros at the ends of dimensions: up to multiples, or so many."""
    width = {dim: -x.shape[dim] % n for dim, n in multiples.items()} | (more or {})
    return jnp.pad(x, [(0, width.get(dim, 0)) for dim in range(x.ndim)]) if any(width.values()) else x
