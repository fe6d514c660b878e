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
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    names = jax.tree.leaves(axes, is_leaf=lambda x: isinstance(x, tuple))
    assert len(leaves) == len(names), "axes must have the structure of shapes"
    known = {path_name(path): (leaf.shape, name) for (path, leaf), name in zip(leaves, names, strict=True)}

    def find(path, leaf):
        parts = path_name(path).split("/")
        for start in range(len(parts)):  # the longest suffix first
            shape, name = known.get("/".join(parts[start:]), (None, None))
            if shape is not None and len(shape) == len(leaf.shape):
                pairs = list(zip(leaf.shape, shape, name, strict=True))
                if all(own in (1, size) for own, size, _ in pairs):
                    return tuple(n if own == size else None for own, size, n in pairs)
        return (None,) * len(leaf.shape)

    return jax.tree_util.tree_map_with_path(find, state)
