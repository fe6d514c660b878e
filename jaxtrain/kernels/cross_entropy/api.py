"""The loss that objectives call: checks shapes, chooses a backend, and hands over to it on every device.

On a mesh each device has its own rows, positions and part of the vocabulary: it never sees others' logits or matrix,
only the sums of their softmax.  Gradients of the matrix are added over devices once, at the end.

Letters: N tokens, D model width, V vocabulary.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxtrain.kernels.cross_entropy import chunked, reference
from jaxtrain.kernels.cross_entropy.reference import Scores
from jaxtrain.sharding import DEFAULT_RULES, ShardingRules, constrain

BACKENDS = ("auto", "chunked", "dense")

# A device's logits up to this size are kept for the backward pass: computing them again would be a third more work.
KEPT_BYTES = 64 * 2**20
# Larger ones are computed in parts of this size ...
PART_BYTES = 64 * 2**20
# ... but of no fewer columns than these, or a part of the vocabulary if that is less.  For C columns every token's
# hidden state is read and its gradient in float32 read and written, 10 D bytes for 6 C D operations, where chips do 240
# (v5e) to 650 a byte: 1,024 keep the matrix units busy, but the bytes were then 9% of all that a step of Llama 3 8B
# with 32,768 tokens a chip moves.
LEAST_COLUMNS = 4096
LEAST_PARTS = 16
BUSY_COLUMNS = 1024


def cross_entropy(
    hidden: jax.Array,
    matrix: jax.Array,
    targets: jax.Array,
    *,
    bias: jax.Array | None = None,
    table: bool = False,
    softcap: float = 0.0,
    temperature: float = 1.0,
    entropy: bool = False,
    mean: bool = False,
    rules: ShardingRules = DEFAULT_RULES,
    backend: str = "auto",
) -> Scores:
    """Log-probabilities of the targets, and the rest of ``Scores``, without the logits of all tokens.

    hidden: ``[..., D]`` in the compute dtype.  On a mesh its dimensions are rows and positions, ``[B, T, D]``, or rows.
    matrix: ``[D, V]``, or a ``table`` ``[V, D]``, of any float type: it is cast to the compute dtype where it is used,
        and its gradient is summed in float32.
    targets: int ``[...]``, each in ``[0, V)``.  bias: ``[V]``.
    softcap: logits become ``softcap * tanh(logits / softcap)``; 0: unchanged.  temperature: positive; divides them.
    entropy, mean: whether ``Scores.entropy`` and ``Scores.mean_logps`` are wanted.
    rules: which mesh axes rows, positions, vocabulary and width are split over.
    backend: "dense" computes all logits and keeps them; "chunked" a part of the vocabulary at a time, again in the
        backward pass; "auto" is dense where a device's logits take at most ``KEPT_BYTES``.
    Returns float32 (float64 for float64), differentiable by hidden, matrix and bias.
    Raises ValueError for shapes that do not fit, for an unknown backend, and where "chunked" meets a matrix that does
    not divide among the devices it is split over.
    """
    if backend not in BACKENDS:
        raise ValueError(f"cross_entropy backend {backend!r} is unknown; one of {BACKENDS}")
    V, D = matrix.shape if table else matrix.shape[::-1]
    if hidden.shape != (*targets.shape, D) or (bias is not None and bias.shape != (V,)):
        raise ValueError(
            f"cross_entropy: hidden {hidden.shape}, matrix {matrix.shape} {'(a table)' if table else ''}, targets "
            f"{targets.shape} and bias {getattr(bias, 'shape', None)} do not fit: want [..., D], "
            f"{'[V, D]' if table else '[D, V]'}, [...] and [V]"
        )
    if not temperature > 0:
        raise ValueError(f"cross_entropy: the temperature must be above 0, found {temperature}")
    layout = Layout.of(rules, hidden.ndim - 1)
    tokens = math.prod(-(-size // ways) for size, ways in zip(targets.shape, layout.ways, strict=True))
    columns = V // layout.vocab_ways
    size = jnp.dtype(jnp.promote_types(hidden.dtype, jnp.float32)).itemsize
    if backend == "auto":
        backend = "dense" if tokens * columns * size <= KEPT_BYTES else "chunked"
    if backend == "dense":
        shape = targets.shape
        # One dimension of rows, which XLA's CPU backend differentiates faster; not where a row is split over devices.
        if all(ways == 1 for ways in layout.ways[1:]):
            hidden, targets = hidden.reshape(-1, D), targets.reshape(-1)
        logits = dense_logits(hidden, matrix, bias, table=table, softcap=softcap, rules=rules)
        found = reference.scores(logits, targets, temperature=temperature, entropy=entropy, mean=mean)
        return jax.tree.map(lambda x: x.reshape(shape), found)
    if V % layout.vocab_ways or D % layout.embed_ways:
        raise ValueError(
            f"cross_entropy: a matrix of {V} tokens and width {D} is not divisible by the {layout.vocab_ways} devices "
            f"of mesh axes {layout.vocab} and the {layout.embed_ways} of {layout.embed}"
        )
    spec = chunked.Spec(
        softcap=float(softcap),
        temperature=float(temperature),
        table=table,
        entropy=entropy,
        mean=mean,
        columns=part_columns(tokens, columns, size),
        size=V,
        vocab=layout.vocab,
        embed=layout.embed,
    )
    hidden, targets = (jnp.asarray(x) for x in (hidden, targets))
    if layout.ways == (1,) * targets.ndim:
        found = _chunked(spec, layout, hidden, matrix, bias, targets)
    else:
        # A shard_map wants even parts.
        uneven = [(0, -size % ways) for size, ways in zip(targets.shape, layout.ways, strict=True)]
        padded = jnp.pad(hidden, (*uneven, (0, 0))), matrix, bias, jnp.pad(targets, uneven)
        found = _chunked(spec, layout, *padded)
    inside = tuple(slice(size) for size in targets.shape)
    return jax.tree.map(lambda x: x[inside], found)


def dense_logits(
    hidden: jax.Array,
    matrix: jax.Array,
    bias: jax.Array | None = None,
    *,
    table: bool = False,
    softcap: float = 0.0,
    rules: ShardingRules = DEFAULT_RULES,
) -> jax.Array:
    """``[..., D] -> float32 [..., V]``, split over rows, positions and vocabulary. Arguments: ``cross_entropy``."""
    names = ("vocab", "act_embed") if table else ("act_embed", "vocab")
    matrix = constrain(matrix.astype(hidden.dtype), names, rules)
    logits = reference.project(hidden, matrix, bias, softcap=softcap, table=table)
    others = (None,) * (logits.ndim - 3)
    return constrain(logits, (*("batch", "sequence")[: logits.ndim - 1], *others, "act_vocab"), rules)


def part_columns(tokens: int, columns: int, size: int = 4) -> int:
    """How many columns of a device's vocabulary to take at a time: as many as make logits of ``PART_BYTES``, or as the
    constants above want at least, in parts as even as multiples of 128 allow."""
    least = min(LEAST_COLUMNS, max(BUSY_COLUMNS, columns // LEAST_PARTS))
    most = max(PART_BYTES // (size * max(tokens, 1)), least)
    if columns <= most:
        return columns
    parts = -(-columns // most)
    return -(-columns // (parts * 128)) * 128


class Layout(NamedTuple):
    """How the current mesh splits the arguments.

    tokens: mesh axes of each of the targets' dimensions.  vocab, embed: of the matrix's sides; where its width is split
    over axes that do not split tokens, the compiler gathers it.  The others: over how many devices.
    """

    tokens: tuple[tuple[str, ...], ...]
    vocab: tuple[str, ...]
    embed: tuple[str, ...]
    ways: tuple[int, ...]
    vocab_ways: int
    embed_ways: int

    @classmethod
    def of(cls, rules: ShardingRules, ndim: int) -> Layout:
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty or mesh.size == 1:
            return cls(((),) * ndim, (), (), (1,) * ndim, 1, 1)

        def split(*names):
            entries = rules.spec(names)
            entries = ((entry,) if isinstance(entry, str) else entry or () for entry in entries)
            return tuple(tuple(axis for axis in entry if mesh.shape[axis] > 1) for entry in entries)

        *tokens, vocab = split(*("batch", "sequence")[:ndim], "vocab")
        tokens = (*tokens, *((),) * (ndim - 2))
        embed = tuple(axis for axis in split("embed")[0] if any(axis in axes for axes in tokens))
        ways = [math.prod(mesh.shape[axis] for axis in axes) for axes in (*tokens, vocab, embed)]
        return cls(tokens, vocab, embed, tuple(ways[:-2]), *ways[-2:])

    @property
    def summed(self) -> tuple[str, ...]:
        """Axes over which devices have other tokens and the same part of the matrix."""
        return tuple(axis for axes in self.tokens for axis in axes if axis not in self.embed)

    def specs(self, table: bool, bias: bool) -> tuple[PartitionSpec, ...]:
        """Of hidden, matrix, bias and targets; ``None`` in the place of a bias that there is not."""
        sides = (self.vocab, self.embed) if table else (self.embed, self.vocab)
        vocab = PartitionSpec(self.vocab) if bias else None
        return PartitionSpec(*self.tokens, None), PartitionSpec(*sides), vocab, PartitionSpec(*self.tokens)

    def map(self, function, in_specs, out_specs):
        """``shard_map``, or the function itself where nothing is split."""
        if not any((*self.tokens, self.vocab)):
            return function
        return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _chunked(spec: chunked.Spec, layout: Layout, hidden, matrix, bias, targets) -> Scores:
    specs = layout.specs(spec.table, bias is not None)

    def local(hidden, matrix, bias, targets):
        found = chunked.forward(spec, _rows(hidden), matrix, bias, targets.reshape(-1))
        return jax.tree.map(lambda x: x.reshape(targets.shape), found)

    return layout.map(local, specs, specs[3])(hidden, matrix, bias, targets)


def _forward(spec, layout, hidden, matrix, bias, targets):
    found = _chunked(spec, layout, hidden, matrix, bias, targets)
    return found, (hidden, matrix, bias, targets, found)


def _backward(spec, layout, saved, grads):
    hidden, matrix, bias, targets, found = saved
    specs = layout.specs(spec.table, bias is not None)

    def local(hidden, matrix, bias, targets, found, grads):
        flat = jax.tree.map(lambda x: x.reshape(-1), (targets, found, grads))
        # What is still to be added over devices stays in float32 until then.
        kind = jnp.promote_types(hidden.dtype, jnp.float32) if layout.summed else matrix.dtype
        d_hidden, d_matrix, d_bias = chunked.backward(spec, _rows(hidden), matrix, bias, *flat, kind)
        d_matrix = _sum(d_matrix, layout.summed).astype(matrix.dtype)
        d_bias = None if bias is None else _sum(d_bias, (*layout.summed, *layout.embed)).astype(bias.dtype)
        return d_hidden.reshape(hidden.shape), d_matrix, d_bias

    run = layout.map(local, (*specs, specs[3], specs[3]), specs[:3])
    return *run(hidden, matrix, bias, targets, found, grads), None


_chunked.defvjp(_forward, _backward)


def _rows(hidden: jax.Array) -> jax.Array:
    return hidden.reshape(-1, hidden.shape[-1])


def _sum(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    return jax.lax.psum(x, axes) if axes else x
