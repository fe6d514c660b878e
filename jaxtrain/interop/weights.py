"""Rules between other people's tensors and our arrays, and the few shapes that nearly all of them have.

A family's table is a tuple of ``Weight``s.  A rule is about one layer (and one expert) at a time: their files hold
one tensor a layer, our arrays stack the layers on a leading axis, and neither has to be held in memory whole.

    linear("model.layers.{layer}.mlp.up_proj.weight", "layers/mlp/up/kernel", layers=config.num_layers)

Only layout changes here, never a value or a dtype, so that what is imported exports bit for bit.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

Arrays = list[np.ndarray]
Shapes = list[tuple[int, ...]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weight:
    """One rule: some of their tensors are some of our arrays.

    theirs: names of their tensors; "{layer}" and "{expert}" are filled in.
    ours: paths below params (``layers/mlp/up/kernel``).  Without layers and experts an array is meant as it is.
    to_ours: (their arrays, the shapes of our slices) -> our slices.
    to_theirs: the inverse, from our slices alone.
    layers: 0, or the size of our arrays' leading axis; its slice i is their layer ``first_layer + i``.
    experts: 0, or the size of the next axis (the leading one where ``layers`` is 0).
    optional: their tensors may all be absent; ours then stay as they were initialised.
    """

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    to_ours: Callable[[Arrays, Shapes], Arrays]
    to_theirs: Callable[[Arrays], Arrays]
    layers: int = 0
    first_layer: int = 0
    experts: int = 0
    optional: bool = False

    def __post_init__(self):
        for name, count in (("{layer}", self.layers), ("{expert}", self.experts)):
            for theirs in self.theirs:
                assert (name in theirs) == (count > 0), f"{theirs}: {name} and a count of {count} do not go together"

    def slices(self) -> Iterator[tuple[tuple[int, ...], tuple[str, ...]]]:
        """Every (index into the leading axes of our arrays, names of their tensors)."""
        for index in itertools.product(*(range(count) for count in self.stacked)):
            rest = list(index)
            fill = {}
            if self.layers:
                fill["layer"] = self.first_layer + rest.pop(0)
            if self.experts:
                fill["expert"] = rest.pop(0)
            yield index, tuple(name.format(**fill) for name in self.theirs)

    @property
    def stacked(self) -> tuple[int, ...]:
        """The leading axes of our arrays that their files do not have."""
        return tuple(count for count in (self.layers, self.experts) if count)


def vector(theirs: str, ours: str, **where: Any) -> Weight:
    """A norm's scale or a bias: their ``[n]`` is our ``[n]``, or ``[heads, head_dim]``."""
    return Weight(
        theirs=(theirs,),
        ours=(ours,),
        to_ours=lambda found, shapes: [found[0].reshape(shapes[0])],
        to_theirs=lambda mine: [mine[0].reshape(-1)],
        **where,
    )


def table(theirs: str, ours: str, **where: Any) -> Weight:
    """An array of the same shape on both sides: an embedding ``[V, D]``, a stack of experts' matrices."""
    return Weight(
        theirs=(theirs,),
        ours=(ours,),
        to_ours=lambda found, shapes: [found[0]],
        to_theirs=lambda mine: [mine[0]],
        **where,
    )


def linear(theirs: str, ours: str, *, inputs: int = 1, **where: Any) -> Weight:
    """torch's Linear: their ``[out, in]`` is our ``[in..., out...]``.

    inputs: how many of our dimensions are contracted (2 for an attention's output ``[N, H, D]``).
    """
    return Weight(
        theirs=(theirs,),
        ours=(ours,),
        to_ours=lambda found, shapes: [contiguous(found[0].T).reshape(shapes[0])],
        to_theirs=lambda mine: [_flat(mine[0], inputs).T],
        **where,
    )


def conv1d(theirs: str, ours: str, *, inputs: int = 1, **where: Any) -> Weight:
    """GPT-2's Conv1D: their ``[in, out]`` is our ``[in..., out...]``."""
    return Weight(
        theirs=(theirs,),
        ours=(ours,),
        to_ours=lambda found, shapes: [found[0].reshape(shapes[0])],
        to_theirs=lambda mine: [_flat(mine[0], inputs)],
        **where,
    )


def fused(theirs: str, ours: Sequence[str], sizes: Sequence[int], *, transposed: bool = True, **where: Any) -> Weight:
    """One of their matrices that is several of our kernels, side by side along its outputs.

    sizes: how many outputs each of ours has, in their order.
    transposed: theirs is torch's ``[out, in]``; False for GPT-2's Conv1D ``[in, out]``.
    """
    ends = list(itertools.accumulate(sizes))

    def to_ours(found: Arrays, shapes: Shapes) -> Arrays:
        whole = found[0].T if transposed else found[0]
        parts = np.split(whole, ends[:-1], axis=1)
        return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]

    def to_theirs(mine: Arrays) -> Arrays:
        whole = np.concatenate([part.reshape(-1, size) for part, size in zip(mine, sizes, strict=True)], axis=1)
        return [whole.T if transposed else whole]

    return Weight(theirs=(theirs,), ours=tuple(ours), to_ours=to_ours, to_theirs=to_theirs, **where)


def fused_vector(theirs: str, ours: Sequence[str], sizes: Sequence[int], **where: Any) -> Weight:
    """One of their vectors that is several of ours, end to end: the bias of a ``fused`` matrix."""
    ends = list(itertools.accumulate(sizes))

    def to_ours(found: Arrays, shapes: Shapes) -> Arrays:
        return [part.reshape(shape) for part, shape in zip(np.split(found[0], ends[:-1]), shapes, strict=True)]

    def to_theirs(mine: Arrays) -> Arrays:
        return [np.concatenate([part.reshape(-1) for part in mine])]

    return Weight(theirs=(theirs,), ours=tuple(ours), to_ours=to_ours, to_theirs=to_theirs, **where)


def rotary(rule: Weight, *, rotary_dim: int = 0, start: int = 0, which: Sequence[int] | None = None) -> Weight:
    """``rule`` for a family that turns neighbouring pairs (2i, 2i + 1) where we turn (i, i + rotary_dim / 2).

    Reorders the last dimension (a head's) of our arrays; a score is a sum over it, so nothing else changes.

    rotary_dim: how many of its entries are turned, from ``start`` on; 0: all from there.
    which: the numbers of the arrays among ``rule.ours`` that are turned; all by default.
    """
    turned = range(len(rule.ours)) if which is None else which

    def reorder(arrays: Arrays, *, inverse: bool) -> Arrays:
        arrays = list(arrays)
        for number in turned:
            order = half_split_order(arrays[number].shape[-1], rotary_dim, start)
            arrays[number] = arrays[number][..., np.argsort(order) if inverse else order]
        return arrays

    return dataclasses.replace(
        rule,
        to_ours=lambda found, shapes: reorder(rule.to_ours(found, shapes), inverse=False),
        to_theirs=lambda mine: rule.to_theirs(reorder(mine, inverse=True)),
    )


def half_split_order(size: int, rotary_dim: int = 0, start: int = 0) -> np.ndarray:
    """``interleaved[order]`` is half-split: evens first, then odds, among the ``rotary_dim`` entries from ``start``."""
    end = start + (rotary_dim or size - start)
    assert end <= size and (end - start) % 2 == 0, f"cannot turn {end - start} entries from {start} of {size}"
    order = np.arange(size)
    order[start:end] = np.concatenate([np.arange(start, end, 2), np.arange(start + 1, end, 2)])
    return order


def contiguous(array: np.ndarray) -> np.ndarray:
    """The same in row-major order.  A large transposed matrix goes in strips: up to three times as fast."""
    if array.flags.c_contiguous or array.ndim != 2 or array.size < 2**16:
        return np.ascontiguousarray(array)
    result = np.empty(array.shape, array.dtype)
    for start in range(0, array.shape[1], 64):
        result[:, start : start + 64] = array[:, start : start + 64]
    return result


def _flat(kernel: np.ndarray, inputs: int) -> np.ndarray:
    """``[in..., out...] -> [in, out]``."""
    size = int(np.prod(kernel.shape[:inputs]))
    return kernel.reshape(size, -1)
