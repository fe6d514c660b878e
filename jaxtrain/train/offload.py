"""The optimizer's state in the host's memory between steps (as in ZeRO-Offload, 2101.06840, but updated on the device).

It comes to the device for the update and goes back.  Layers take turns, in a loop over the stacks, so that the device
holds the state of one or two of them at a time.  What is in no stack (embeddings, heads), or in one whose layers are
split over devices, or has less than two dimensions a layer, comes in one piece.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxtrain.optim import apply_updates, state_owners
from jaxtrain.types import Array, Params, TrainState

HOST = "pinned_host"
LAYERS = ("layers", "pipeline")


def update_where(
    tx: optax.GradientTransformation, good: Array, grads: Params, opt_state: Any, params: Params
) -> tuple[Params, Any]:
    """One update: the new parameters and state, or where not ``good`` the old ones."""
    updates, new_state = tx.update(grads, opt_state, params)
    new = apply_updates(params, updates, new_state), new_state
    return jax.tree.map(lambda new, old: jnp.where(good, new, old), new, (params, opt_state))


def on_host(shardings: Any, state: Any, shapes: Params) -> Any:
    """Shardings of an optimizer's ``state``, with what belongs to a parameter in the host's memory.

    Counts and the like stay on the device.
    """
    return jax.tree.map(
        lambda sharding, owner: sharding if owner < 0 else sharding.with_memory_kind(HOST),
        shardings,
        state_owners(state, shapes),
    )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Offload:
    """How the update is cut up.

    owners: of each array of the optimizer's state the number of its parameter, -1 where there is none.
    turns: number of layers -> numbers of the parameters that are updated layer by layer.  alone: of the others.
    """

    owners: tuple[int, ...]
    turns: dict[int, tuple[int, ...]]
    alone: tuple[int, ...]

    @classmethod
    def of(cls, target: TrainState, axes: Params) -> Offload:
        """For a state like ``target`` (ShapeDtypeStructs with shardings).  axes: the parameters' logical names."""
        leaves = jax.tree.leaves(target.params)
        names = jax.tree.leaves(axes, is_leaf=lambda x: isinstance(x, tuple))
        turns: dict[int, tuple[int, ...]] = {}
        for number, (leaf, name) in enumerate(zip(leaves, names, strict=True)):
            whole = leaf.sharding.shard_shape(leaf.shape)[:1] == leaf.shape[:1]
            # A row of a matrix does not lie in one piece in a TPU's memory (tiles of 8 x 128): it cannot be sent alone.
            if leaf.ndim > 2 and name[0] in LAYERS and whole:
                turns[leaf.shape[0]] = (*turns.get(leaf.shape[0], ()), number)
        looped = {number for numbers in turns.values() for number in numbers}
        return cls(
            owners=tuple(jax.tree.leaves(state_owners(target.opt_state, target.params))),
            turns=turns,
            alone=tuple(number for number in range(len(leaves)) if number not in looped),
        )

    def update(
        self, tx: optax.GradientTransformation, good: Array, grads: Params, opt_state: Any, params: Params
    ) -> tuple[Params, Any]:
        """``update_where`` of a state on the host, where it stays.

        No parameter's update may depend on another parameter or another layer.
        """
        structures = tuple(map(jax.tree.structure, (grads, opt_state, params)))
        all_grads, all_state, all_params = map(jax.tree.leaves, (grads, opt_state, params))
        counters = {i: leaf for i, leaf in enumerate(all_state) if self.owners[i] < 0}

        def some(grads, state, params):
            """``update_where`` of some leaves, by number.  Tiny arrays stand in for the others, and are dropped."""
            trees = [
                jax.tree.unflatten(
                    structure,
                    [found.get(i, jnp.zeros((1,) * leaf.ndim, leaf.dtype)) for i, leaf in enumerate(all_of_them)],
                )
                for structure, found, all_of_them in zip(
                    structures, (grads, counters | state, params), (all_grads, all_state, all_params), strict=True
                )
            ]
            return [dict(enumerate(jax.tree.leaves(tree))) for tree in update_where(tx, good, *trees)]

        def through(grads, held):
            """``held``: parameters, and their state on the host, by number; and so is the result."""
            params, state = held
            new_params, new_state = some(grads, jax.device_put(state, jax.memory.Space.Device), params)
            new_state = jax.device_put({i: new_state[i] for i in state}, jax.memory.Space.Host)
            return {i: new_params[i] for i in params}, new_state

        def in_turns(grads, held, count):
            def turn(layer, held):
                mine, own = jax.tree.map(
                    lambda leaf: jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=True), (grads, held)
                )
                return jax.tree.map(
                    lambda all_of_them, new: jax.lax.dynamic_update_slice_in_dim(all_of_them, new, layer, 0),
                    held,
                    through(mine, own),
                )

            return jax.lax.fori_loop(0, count, turn, held)

        def found(numbers):
            state = {i: leaf for i, leaf in enumerate(all_state) if self.owners[i] in numbers}
            return {i: all_grads[i] for i in numbers}, ({i: all_params[i] for i in numbers}, state)

        new_params: dict[int, Array] = {}
        new_state = {i: leaf for i, leaf in some({}, {}, {})[1].items() if i in counters}
        for part in [
            *(in_turns(*found(numbers), count) for count, numbers in self.turns.items()),
            *(through(*found((number,))) for number in self.alone),
        ]:
            new_params |= part[0]
            new_state |= part[1]
        return (
            jax.tree.unflatten(structures[2], [new_params[i] for i in range(len(all_params))]),
            jax.tree.unflatten(structures[1], [new_state[i] for i in range(len(all_state))]),
        )
