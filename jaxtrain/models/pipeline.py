"""Layers split over the mesh axis ``stage``: each group of devices has some of them, and microbatches pass through.

The schedule is that of GPipe (1811.06965), with rounds as in the interleaved one (2104.04473): with S stages, M
microbatches and R rounds, stage s has the R groups of layers s, s + S, ..., and works at tick t on item ``t - s``:
microbatch ``item % M`` in round ``item // M``.  There are ``R M + S - 1`` ticks, of which every stage idles (computes
what nobody reads) in S - 1: that is the bubble.  The backward pass is the same read backwards.

Outside of the layers ``stage`` splits rows like ``data``, so that no device computes embeddings or losses twice.

Letters: B rows, T tokens, D model width, L layers, S stages, M microbatches, R rounds.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxtrain.sharding import Constrain, ShardingRules
from jaxtrain.types import Array, Params

STAGE = "stage"
# More than these microbatches a stage shrink the bubble little (below a fifth), and the matrices much.
MICROBATCHES_A_STAGE = 4


def stages() -> int:
    """How many stages the current mesh has."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape[STAGE]


def bubble(stages: int, microbatches: int, rounds: int) -> float:
    """The part of a stage's time in which it has nothing to do."""
    return (stages - 1) / (rounds * microbatches + stages - 1)


def divides(layers: Sequence[Any], parts: int) -> bool:
    """Whether so many parts of layers are alike, kind by kind."""
    each = len(layers) // parts
    return len(layers) % parts == 0 and all(layers[i] == layers[i % each] for i in range(len(layers)))


def most_microbatches(stages: int, rows: int) -> int:
    """Into how many microbatches a pipeline cuts ``rows`` of each device where its config does not say."""
    return stages * max(n for n in range(1, min(rows, MICROBATCHES_A_STAGE) + 1) if rows % n == 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pipeline:
    """How many of everything; rows: devices over which the rows of one microbatch are split."""

    stages: int
    rounds: int
    microbatches: int
    rows: int

    @classmethod
    def of(cls, config: Any, layers: Sequence[Any], B: int, pin: Constrain) -> Pipeline:
        """Of ``layers`` and a batch of B rows on the current mesh.

        Raises ValueError, saying what to change, where they do not divide.
        """
        S, R = stages(), config.pipeline_rounds
        split = math.prod(pin.ways(("batch",)))
        rows = split // S
        if len(layers) % (S * R):
            raise ValueError(
                f"{len(layers)} layers are not divisible by MeshConfig.stage={S} times pipeline_rounds={R}: choose "
                "stages (and rounds) that divide them"
            )
        if not divides(layers, S * R):
            each = len(layers) // (S * R)
            raise ValueError(
                f"with MeshConfig.stage={S} and pipeline_rounds={R} every stage has {each} layers at a time, but their "
                "kinds (windows, positions) do not repeat after so many; choose fewer stages or rounds"
            )
        if B % split:
            raise ValueError(
                f"{B} rows of a (micro)batch are not divisible by the {split} devices of the mesh's row axes, which "
                "include its stages: choose a larger batch size, fewer accumulations or fewer stages"
            )
        groups = B // split  # rows a device, and so microbatches a stage at most
        asked = config.pipeline_microbatches or most_microbatches(S, groups)
        if asked % S or groups % (asked // S):
            raise ValueError(
                f"pipeline_microbatches={asked} must be a multiple of MeshConfig.stage={S} that divides the "
                f"{groups * S} rows of each of {rows} row groups"
            )
        return cls(stages=S, rounds=R, microbatches=asked, rows=rows)

    @property
    def ticks(self) -> int:
        return self.rounds * self.microbatches + self.stages - 1

    def split(self, x: Array, pin: Constrain, names: tuple[str | None, ...]) -> Array:
        """``[B, ...] -> [M, B / M, ...]``.  Rows are split over (row axes, stage) in blocks: every device cuts its own
        into equal parts, each of which is of another microbatch, and nothing moves."""
        S, groups = self.stages, self.microbatches // self.stages
        x = x.reshape(self.rows, S, groups, -1, *x.shape[1:])
        x = jnp.moveaxis(x, 0, 2)
        return _pin(x.reshape(S * groups, -1, *x.shape[4:]), pin, names)

    def join(self, x: Array, pin: Constrain, names: tuple[str | None, ...]) -> Array:
        """The inverse of ``split``."""
        S, groups = self.stages, self.microbatches // self.stages
        x = jnp.moveaxis(x.reshape(S, groups, self.rows, -1, *x.shape[2:]), 2, 0)
        return pin(x.reshape(-1, *x.shape[4:]), names)

    def groups(self, params: Params, s: Array) -> Params:
        """Of stage s, ``[L / S, ...] -> [L / (R S), R, ...]``: in round r it has group ``r * S + s`` of the layers.

        With one round it has them already, with more they are sent to it in every step: between steps layers lie in
        their order, as other meshes read them.
        """
        S, R = self.stages, self.rounds

        def one(x):
            if R == 1:
                return x[:, None]
            x = x.reshape(R, -1, *x.shape[1:])
            # Before, this stage's j-th group is number s * R + j; a slot for each that may go to the same stage.
            slots = -(-R // S)
            mine = (jnp.arange(S)[:, None] - s * R) % S + S * jnp.arange(slots)
            x = _exchange(x[jnp.minimum(mine, R - 1)], s)
            number = jnp.arange(R) * S + s
            return jnp.moveaxis(x[number // R, number % R // S], 0, 1)

        return jax.tree.map(one, params)


def _pin(x: Array, pin: Constrain, names: tuple[str | None, ...]) -> Array:
    """``[M, B / M, ...]`` with microbatches split over stages."""
    spec = without_stage(pin.rules).spec(names)
    return jax.lax.with_sharding_constraint(x, P(STAGE, *spec))


def without_stage(rules: ShardingRules) -> ShardingRules:
    """The rules inside the pipeline, where a device sees one stage only."""
    return ShardingRules(
        table=tuple((name, tuple(axis for axis in axes if axis != STAGE)) for name, axes in rules.table)
    )


def run_pipeline(
    run: Callable[..., tuple[Array, Any]],
    pipe: Pipeline,
    params: Params,
    x_BTD: Array,
    marks: dict[str, Array],
    rng: Array | None,
    pin: Constrain,
) -> tuple[Array, Any]:
    """All layers of a stack: x, and what they say about their balance, ``[L, ...]``, summed over microbatches.

    run: ``(layers, of_round, x, marks, rng, constrain) -> (x, balance)``: the ``L / (R S)`` layers of one group, for
        the rows of one microbatch.  layers: a tree with as many on its leading axis; ``of_round`` makes the parameters
        of one of them, inside of what is rematerialised, or a copy of them is kept for every tick.
    marks: int32 ``[B, T]`` each, what belongs to the tokens.
    """
    S, R, M = pipe.stages, pipe.rounds, pipe.microbatches
    rows = ("batch", "sequence", "act_embed")
    inner = Constrain(without_stage(pin.rules))
    x_M = pipe.split(x_BTD, pin, rows)
    marks_M = {name: pipe.split(mark, pin, rows[:2]) for name, mark in marks.items()}

    def stage(params, x_M, marks_M, rng):
        s = jax.lax.axis_index(STAGE)
        params, of_round = _by_round(pipe.groups(params, s))
        # What stage 0 has to work on, or has got back from the last stage: a place for each microbatch.
        queue = jnp.concatenate(_to_first(x_M, S))

        def at(item):
            item = jnp.clip(item, 0, R * M - 1)
            return (0 if R == 1 else item // M), item % M

        def tick(carry, t):
            queue, received, said = carry
            number, micro = at(t - s)
            x = jnp.where(s == 0, queue[micro], received)
            marks = {name: mark[micro] for name, mark in marks_M.items()}
            mine = None if rng is None else jax.random.fold_in(rng, ((number * S + s) * M) + micro)
            x, new = run(params, partial(of_round, number), x, marks, mine, inner)
            busy = (t >= s) & (t - s < R * M)
            said = jax.tree.map(lambda sums, one: sums.at[number].add(jnp.where(busy, one, 0)), said, new)
            received = jax.lax.ppermute(x, STAGE, [(i, (i + 1) % S) for i in range(S)])
            done = t - (S - 1)  # the item that the last stage was at
            place = at(done)[1]
            back = (s == 0) & (done >= 0)
            queue = queue.at[place].set(jnp.where(back, received, queue[place]))
            return (queue, received, said), None

        first = jax.tree.map(lambda mark: mark[0], marks_M)
        said = jax.eval_shape(lambda: run(params, partial(of_round, 0), queue[0], first, rng, inner)[1])
        said = jax.tree.map(lambda one: jnp.zeros((R, *one.shape), one.dtype), said)
        carry = (queue, jnp.zeros_like(queue[0]), said)
        (queue, _, said), _ = jax.lax.scan(tick, carry, jnp.arange(pipe.ticks))
        return _from_first(queue.reshape(S, *x_M.shape), s), jax.tree.map(lambda sums: sums[:, None], said)

    # Unchecked: with checks, a shard_map inside (of experts) would name this one's axis in what it keeps for its
    # backward pass.  Nothing that is differentiated goes in or comes out the same on several stages.
    x_M, said = jax.shard_map(
        stage,
        in_specs=(P(STAGE), P(STAGE), P(), P()),
        out_specs=(P(STAGE), P(None, STAGE)),
        axis_names={STAGE},
        check_vma=False,
    )(params, x_M, marks_M, rng)
    return pipe.join(x_M, pin, rows), jax.tree.map(lambda sums: sums.reshape(-1, *sums.shape[3:]), said)


def _by_round(params: Params) -> tuple[Params, Callable[[Array | int, Params], Params]]:
    """``params [layers, R, ...]`` as ``run`` scans them, and ``of_round(number, layer)``.

    Over microbatches gradients are added up in float32, also of parameters that came in a smaller type: they then go to
    a copy in float32 that is read by nothing else, and so never made.
    """
    leaves, tree = jax.tree.flatten(params)
    small = {i: leaf.astype(jnp.float32) for i, leaf in enumerate(leaves) if leaf.dtype == jnp.bfloat16}

    def of_round(number, layer):
        leaves = [leaf[number] for leaf in layer["leaves"]]
        for i, sums in layer["sums"].items():
            leaves[i] = _summed_as(leaves[i], sums[number])
        return jax.tree.unflatten(tree, leaves)

    return {"leaves": leaves, "sums": small}, of_round


# What follows is of permutes alone.  The partitioner leaves their operands split over the other axes; those of an
# all-to-all or an all-gather it would make whole first.  And nothing is added up, nor in the gradient.


def _to_first(x: Array, S: int) -> list[Array]:
    """On stage 0 every stage's x, in their order; zeros elsewhere."""
    return [x, *(jax.lax.ppermute(x, STAGE, [(k, 0)]) for k in range(1, S))]


def _from_first(x: Array, s: Array) -> Array:
    """``[S, ...] -> [...]``: stage s gets entry s of stage 0's."""
    mine = x[0]
    for k in range(1, len(x)):
        mine = jnp.where(s == k, jax.lax.ppermute(x[k], STAGE, [(0, k)]), mine)
    return mine


def _exchange(x: Array, s: Array) -> Array:
    """``[S, ...] -> [S, ...]``, an all-to-all: to each stage its entry, and what the stages had for stage s."""
    S = len(x)
    found = x
    for step in range(1, S):
        sent = jax.lax.ppermute(x[(s + step) % S], STAGE, [(i, (i + step) % S) for i in range(S)])
        found = found.at[(s - step) % S].set(sent)
    return found


@jax.custom_vjp
def _summed_as(leaf: Array, other: Array) -> Array:
    """``leaf``, whose gradient goes to ``other`` in that one's type."""
    return leaf


_summed_as.defvjp(
    lambda leaf, other: (_summed_as(leaf, other), other[:0]), lambda none, d: (None, d.astype(none.dtype))
)
