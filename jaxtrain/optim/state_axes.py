"""Logical axes of an optimizer's state, so that it is sharded as its parameters are."""

from __future__ import annotations

from typing import Any

import jax

from jaxtrain.types import path_name


def state_axes(state: Any, shapes: Any, axes: Any) -> Any:
    """A tree like ``state`` with a tuple of logical axis names (None: not sharded) for every array.

    state: an optimizer state or its ``jax.eval_shape``.  shapes, axes: as for ``Optimizer.build``.

    A state array belongs to the parameter whose path ends its own (``0/mu/layers/mlp/up/kernel``).  It has
    that parameter's names where the sizes agree, and None where its own size is 1 (Adafactor's moments).
    Anything else, such as the count or a scalar, is replicated.
    """
    leaves = jax.tree.leaves(shapes)
    names = jax.tree.leaves(axes, is_leaf=lambda x: isinstance(x, tuple))
    assert len(leaves) == len(names), "axes must have the structure of shapes"

    def one(leaf, owner):
        if owner < 0:
            return (None,) * len(leaf.shape)
        sizes = leaves[owner].shape
        return tuple(n if own == size else None for own, size, n in zip(leaf.shape, sizes, names[owner], strict=True))

    return jax.tree.map(one, state, state_owners(state, shapes))


def state_owners(state: Any, shapes: Any) -> Any:
    """A tree like ``state`` with the number of the parameter (among the leaves of ``shapes``) that an array belongs to,
    as ``state_axes`` says; -1 for what belongs to none."""
    known = {
        path_name(path): (number, leaf.shape)
        for number, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(shapes))
    }

    def find(path, leaf):
        parts = path_name(path).split("/")
        for start in range(len(parts)):  # the longest suffix first
            number, shape = known.get("/".join(parts[start:]), (-1, None))
            same_rank = shape is not None and len(shape) == len(leaf.shape)
            if same_rank and all(own in (1, size) for own, size in zip(leaf.shape, shape, strict=True)):
                return number
        return -1

    return jax.tree_util.tree_map_with_path(find, state)
