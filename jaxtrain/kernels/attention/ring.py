"""Attention over a sequence that is split over devices: a ring, and an all-gather for short rings.

Both are backends (see ``flash``) made of another backend, called inside a ``shard_map`` with one device's part of the
sequence.  Letters: B rows, T queries and S keys of one device, N query heads, K key heads, H size of queries and keys,
V of values; n devices.

**Ring** (2310.01889).  Keys and values go round; every device adds what its own queries read from those that are with
it.  Parts of the softmax are merged by their log-sum-exp.  Backward they go round once more, and the gradient of each
travels one step behind, in float32.  What is sent on is sent before the work on it begins, and what arrives is needed
only afterwards, so that the transfer takes place during the work.  Bytes that a device sends, with X those of its own k
and v: forward (n - 1) X; backward (n - 1) X, and in float32 (n - 1) times dk and dv, which a last step takes home in
their own type.

**Balance.**  Under a causal mask the device with the sequence's end would do 2n - 1 times the work of the first, and
the ring waits for the slowest in every step.  So queries and keys are dealt again first ("zigzag"; compare the stripes
of 2311.09431): the sequence is cut into 2n chunks and device d gets chunks d and 2n - 1 - d.  Of the four pairs of
chunks in a step every device computes two, and in the first step three, two of them half hidden: the work of two in
each of n steps, where contiguous parts would cost four in each step but the first.  Dealing moves every device's q, k
and v once and its output back, as much as the ring itself moves in 1 + (q + out) / (k + v) steps, and saves nearly half
of work that grows with the length squared.

**Skipping.**  A pair of chunks that ``extents`` rules out, by causality, window or segments, is not computed.  Nothing
relies on the order of the tokens: the marks say all.
"""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxtrain.kernels.attention.extents import Extents, key_extents, may_meet, query_extents
from jaxtrain.kernels.attention.masks import Marks, Spec


@dataclasses.dataclass(frozen=True)
class Deal:
    """Which chunks of a sequence a device holds: ``parts`` chunks each of n, contiguous until they are dealt.

    axis: names of mesh axes.  parts: 1 leaves all where it is, 2 is the zigzag order of this file's head.
    """

    axis: tuple[str, ...]
    n: int
    parts: int

    @property
    def pairs(self) -> tuple[int, int]:
        """Of a device's pairs of chunks in the zigzag order: those that are computed under a causal mask, and all."""
        return 2 * self.n + 1, 4 * self.n

    def cond(self, meet, run, *old):
        """``run(*old)`` where a pair of chunks meets, else ``old``.

        The name tells a reader of the compiled program, where either branch could be taken, how often it is run.
        """
        with jax.named_scope("taken_{}_of_{}".format(*self.pairs)) if self.parts == 2 else nullcontext():
            return jax.lax.cond(meet, run, lambda *old: old, *old)

    def chunk(self, device, part: int):
        """The number of the chunk that ``device`` holds as its part number ``part`` when all are dealt.

        Even chunks are first parts and odd ones second parts, so that both moves are permutations of the devices.
        """
        if self.parts == 1:
            return device
        mirrored = 2 * self.n - 1 - device
        return device + (mirrored - device) * ((device + part) % 2)

    def out(self, x: jax.Array, dim: int) -> list[jax.Array]:
        """The parts of ``x`` that this device works on; ``x`` is its contiguous part of the sequence along ``dim``."""
        if self.parts == 1:
            return [x]
        homes = [[(self.chunk(d, part) // 2, d) for d in range(self.n)] for part in range(2)]
        return [self._move(half, pairs) for half, pairs in zip(jnp.split(x, 2, axis=dim), homes, strict=True)]

    def home(self, parts: list[jax.Array], dim: int, behind: int = 0) -> jax.Array:
        """The inverse of ``out``, for what belongs to the device ``behind`` places further round the ring."""
        moved = []
        for part, x in enumerate(parts):
            holders = [((d - behind) % self.n, self.chunk(d, part) // self.parts) for d in range(self.n)]
            moved.append(self._move(x, holders))
        return jnp.concatenate(moved, axis=dim) if self.parts > 1 else moved[0]

    def onward(self, tree: Any) -> Any:
        """To the next device of the ring."""
        return self._move(tree, [(d, (d + 1) % self.n) for d in range(self.n)])

    def _move(self, tree, pairs):
        if all(source == target for source, target in pairs):
            return tree
        return jax.tree.map(lambda x: jax.lax.ppermute(x, self.axis, pairs), tree)


@dataclasses.dataclass(frozen=True)
class _Pairs:
    """One device's queries, dealt, against the chunks of keys of any device: marks, and whether they may meet."""

    deal: Deal
    spec: Spec
    q_marks: list[Marks]  # of queries, by part
    q_extents: list[Extents]
    k_marks: Marks  # of keys, [chunks, B, S of a chunk]
    k_extents: Extents

    @classmethod
    def of(cls, deal: Deal, spec: Spec, marks: Marks) -> _Pairs:
        """A few integers a key are gathered once, so that no step waits for them."""
        q_marks = _deal_marks(deal, marks)
        # [n, B, 2, parts, S / parts]
        keys = jnp.stack([marks.k_segments, marks.k_positions], axis=1)
        keys = jax.lax.all_gather(keys.reshape(*keys.shape[:2], deal.parts, -1), deal.axis)
        keys = jnp.moveaxis(keys, 3, 1).reshape(-1, *keys.shape[1:3], keys.shape[-1])
        k_marks = dataclasses.replace(marks, k_segments=keys[:, :, 0], k_positions=keys[:, :, 1])
        computed, pairs = deal.pairs
        share = min(1.0, spec.share * pairs / computed) if deal.parts == 2 else spec.share
        spec = dataclasses.replace(spec, in_order=False, share=share)
        return cls(deal, spec, q_marks, [query_extents(spec, q) for q in q_marks], k_marks, key_extents(k_marks))

    def at(self, step, a: int, b: int) -> tuple[Marks, jax.Array]:
        """Of query part ``a``, and key part ``b`` of the device whose keys are here after ``step`` steps."""
        source = (jax.lax.axis_index(self.deal.axis) - step) % self.deal.n
        chunk = self.deal.chunk(source, b)
        keys = {name: getattr(self.k_marks, name)[chunk] for name in ("k_segments", "k_positions")}
        marks = dataclasses.replace(self.q_marks[a], **keys)
        k_extents = jax.tree.map(lambda x: x[chunk], self.k_extents)
        return marks, jnp.any(may_meet(self.q_extents[a], k_extents))


@dataclasses.dataclass(frozen=True)
class Ring:
    """Ring attention by the kernels of ``backend``.  zigzag: deal the sequence for a causal mask, see above."""

    backend: Any
    axis: tuple[str, ...]
    zigzag: bool

    def _deal(self) -> Deal:
        return Deal(self.axis, jax.lax.axis_size(self.axis), 2 if self.zigzag else 1)

    def forward(self, spec: Spec, q_BNTH, k_BKSH, v_BKSV, marks: Marks) -> tuple[jax.Array, jax.Array]:
        deal = self._deal()
        pairs = _Pairs.of(deal, spec, marks)
        queries, keys = deal.out(q_BNTH, 2), _stacked(deal, k_BKSH, v_BKSV)

        def read(step, keys, read):
            """What every part of the queries has read by now, with what it reads in this step."""
            read = list(read)
            for a, query in enumerate(queries):
                for b in range(deal.parts):
                    marks, meet = pairs.at(step, a, b)
                    run = partial(_read_more, self.backend, pairs.spec, query, keys, b, marks)
                    read[a] = deal.cond(meet, run, *read[a])
            return read

        def turn(carried, step):
            keys, old = carried
            coming = deal.onward(keys)
            return (coming, read(step, keys, old)), None

        nothing = [_nothing(query, v_BKSV) for query in queries]
        (keys, found), _ = jax.lax.scan(turn, (keys, nothing), jnp.arange(deal.n - 1))
        outs, lses = zip(*read(deal.n - 1, keys, found), strict=True)
        return deal.home([out.astype(q_BNTH.dtype) for out in outs], 2), deal.home(list(lses), 2)

    def backward(self, spec: Spec, q_BNTH, k_BKSH, v_BKSV, marks: Marks, lse_BNT, delta_BNT, d_out_BNTV):
        deal = self._deal()
        pairs = _Pairs.of(deal, spec, marks)
        queries = [deal.out(x, 2) for x in (q_BNTH, lse_BNT, delta_BNT, d_out_BNTV)]
        queries = list(zip(*queries, strict=True))
        keys = _stacked(deal, k_BKSH, v_BKSV)

        def work(step, keys, d_queries):
            """Gradients of the queries so far, and of the keys that are here, from this device's queries."""
            d_queries, d_keys = list(d_queries), [_zeros([x[0] for x in keys])] * deal.parts
            for a, query in enumerate(queries):
                for b in range(deal.parts):
                    marks, meet = pairs.at(step, a, b)
                    run = partial(_differentiate_more, self.backend, pairs.spec, query, keys, b, marks)
                    d_queries[a], d_keys[b] = deal.cond(meet, run, d_queries[a], d_keys[b])
            return d_queries, [jnp.stack(parts) for parts in zip(*d_keys, strict=True)]

        def turn(carried, step):
            keys, d_keys, d_queries = carried
            coming, d_coming = deal.onward(keys), deal.onward(d_keys)
            d_queries, more = work(step, keys, d_queries)
            # Else the compiler may start sending keys only after the work, for the additions below to hide it, or wait
            # for all that is sent before the work.
            coming, d_coming, more = jax.lax.optimization_barrier((coming, d_coming, more))
            return (coming, _add(d_coming, more), d_queries), None

        coming = deal.onward(keys)
        d_queries, d_keys = work(0, keys, [_zeros(query[0]) for query in queries])
        (keys, d_keys, d_queries), _ = jax.lax.scan(turn, (coming, d_keys, d_queries), jnp.arange(1, deal.n - 1))
        d_coming = deal.onward(d_keys)
        d_queries, more = work(deal.n - 1, keys, d_queries)
        # These keys are the next device's: one step further round.
        dk, dv = (
            deal.home(list(x.astype(like.dtype)), 2, behind=1)
            for x, like in zip(_add(d_coming, more), (k_BKSH, v_BKSV), strict=True)
        )
        return deal.home([x.astype(q_BNTH.dtype) for x in d_queries], 2), dk, dv


@dataclasses.dataclass(frozen=True)
class Gather:
    """Every device gathers all keys and values, and their gradients are added up and scattered, in float32.

    Nothing hides the transfer, and the memory for keys and values is that of the whole sequence; but the kernels run
    once over all keys.  zigzag: queries alone are dealt, see above.
    """

    backend: Any
    axis: tuple[str, ...]
    zigzag: bool

    def _dealt(self, spec: Spec, marks: Marks, *of_queries):
        deal = Deal(self.axis, jax.lax.axis_size(self.axis), 2 if self.zigzag else 1)
        k_segments, k_positions = self._whole(marks.k_segments, 1), self._whole(marks.k_positions, 1)
        marks = _deal_marks(deal, dataclasses.replace(marks, k_segments=k_segments, k_positions=k_positions))
        queries = zip(*(deal.out(x, 2) for x in of_queries), strict=True)
        return deal, dataclasses.replace(spec, in_order=False), list(zip(marks, queries, strict=True))

    def _whole(self, x, dim: int):
        return jax.lax.all_gather(x, self.axis, axis=dim, tiled=True)

    def forward(self, spec: Spec, q_BNTH, k_BKSH, v_BKSV, marks: Marks) -> tuple[jax.Array, jax.Array]:
        deal, spec, parts = self._dealt(spec, marks, q_BNTH)
        k, v = self._whole(k_BKSH, 2), self._whole(v_BKSV, 2)
        outs, lses = zip(*(self.backend.forward(spec, q, k, v, marks) for marks, (q,) in parts), strict=True)
        return deal.home(list(outs), 2), deal.home(list(lses), 2)

    def backward(self, spec: Spec, q_BNTH, k_BKSH, v_BKSV, marks: Marks, lse_BNT, delta_BNT, d_out_BNTV):
        deal, spec, parts = self._dealt(spec, marks, q_BNTH, lse_BNT, delta_BNT, d_out_BNTV)
        k, v = self._whole(k_BKSH, 2), self._whole(v_BKSV, 2)
        grads = [self.backend.backward(spec, q, k, v, marks, *rest) for marks, (q, *rest) in parts]
        d_queries, dk, dv = zip(*grads, strict=True)

        def scattered(parts, like):
            whole = sum(x.astype(jnp.float32) for x in parts)
            return jax.lax.psum_scatter(whole, self.axis, scatter_dimension=2, tiled=True).astype(like.dtype)

        return deal.home(list(d_queries), 2), scattered(dk, k_BKSH), scattered(dv, v_BKSV)


def _deal_marks(deal: Deal, marks: Marks) -> list[Marks]:
    """``marks`` with those of each part of this device's queries."""
    fields = ("q_segments", "q_low", "q_high")
    parts = deal.out(jnp.stack([getattr(marks, name) for name in fields]), 2)
    return [dataclasses.replace(marks, **dict(zip(fields, part, strict=True))) for part in parts]


def _stacked(deal: Deal, k_BKSH, v_BKSV) -> list[jax.Array]:
    """k and v, dealt, their parts one array each: the compiler lets but a few transfers go on at a time."""
    return [jnp.stack(deal.out(x, 2)) for x in (k_BKSH, v_BKSV)]


def _read_more(backend, spec, q_BNTH, keys, b: int, marks, out_BNTV, lse_BNT):
    """``out`` (float32) and ``lse`` with what part ``b`` of the keys adds: 2307.08691, section 3.1."""
    more_BNTV, more_lse_BNT = backend.forward(spec, q_BNTH, *(x[b] for x in keys), marks)
    both_BNT = jnp.logaddexp(lse_BNT, more_lse_BNT)
    seen_BNT = ~jnp.isneginf(both_BNT)
    share, more_share = (jnp.where(seen_BNT, jnp.exp(x - both_BNT), 0.0)[..., None] for x in (lse_BNT, more_lse_BNT))
    return out_BNTV * share + more_BNTV.astype(jnp.float32) * more_share, both_BNT


def _nothing(q_BNTH, v_BKSV) -> tuple[jax.Array, jax.Array]:
    """What a query has read at first."""
    shape = q_BNTH.shape[:3]
    return jnp.zeros((*shape, v_BKSV.shape[-1]), jnp.float32), jnp.full(shape, -jnp.inf, jnp.float32)


def _differentiate_more(backend, spec, query, keys, b: int, marks, dq, d_key):
    q, *rest = query
    d_query, *d_more = backend.backward(spec, q, *(x[b] for x in keys), marks, *rest)
    return dq + d_query.astype(jnp.float32), _add(d_key, d_more)


def _add(tree, other):
    return jax.tree.map(lambda x, y: x + y.astype(x.dtype), tree, other)


def _zeros(tree):
    return jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), tree)
