"""Which axes of a parameter are the rows and columns of its matrix, from their logical names.

A stacked attention kernel ``[layers, embed, q_heads, head_dim]`` is, for each layer, one matrix from
``embed`` to ``q_heads * head_dim``.  Optimizers that treat matrices as such (Muon, Adafactor) need to know.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

# Copies of a matrix, each on its own.
BATCH_NAMES = frozenset({"layers", "pipeline", "expert", "experts"})
# Neighbours among these are together one side of the matrix.
HEAD_NAMES = frozenset({"heads", "q_heads", "kv_heads", "head_dim"})


class Matrix(NamedTuple):
    """Axis indices: ``batch`` counts the matrices; a matrix maps ``inputs`` to ``outputs``."""

    batch: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    def fans(self, shape: Sequence[int]) -> tuple[int, int]:
        """(fan in, fan out) of one matrix of a parameter of this shape."""
        return math.prod(shape[i] for i in self.inputs), math.prod(shape[i] for i in self.outputs)


def batch_axes(names: Sequence[str | None]) -> tuple[int, ...]:
    """The axes that count copies: layers and experts."""
    return tuple(i for i, name in enumerate(names) if name in BATCH_NAMES)


def as_matrix(names: Sequence[str | None], path: str) -> Matrix | None:
    """The matrix in a parameter with these logical axes; None for a vector or scalar (norms, biases).

    Raises ValueError naming ``path`` if the axes make more than two sides.
    """
    batch = batch_axes(names)
    sides: list[list[int]] = []
    for i, name in enumerate(names):
        if i in batch:
            continue
        together = sides and sides[-1][-1] == i - 1 and {name, names[i - 1]} <= HEAD_NAMES
        if together:
            sides[-1].append(i)
        else:
            sides.append([i])
    if len(sides) < 2:
        return None
    if len(sides) > 2:
        raise ValueError(
            f"The parameter {path!r} has axes {tuple(names)}, which make {len(sides)} sides; a matrix has "
            f"an input and an output. Copies are {sorted(BATCH_NAMES)}; joined are {sorted(HEAD_NAMES)}."
        )
    return Matrix(batch, tuple(sides[0]), tuple(sides[1]))
