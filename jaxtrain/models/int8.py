"""Matrices held in 8 bits, for decoding."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from jaxtrain.types import Array, record


@record
class Int8:
    """``values * scales``, in the place of a matrix ``[inputs, outputs]``; either may be several dimensions.

    values: int8, in [-127, 127].  scales: float32 ``[outputs]``, of one output each: the matrix is multiplied as
    integers, and its result scaled (weights only; activations stay as they are).
    """

    values: Array
    scales: Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def __getitem__(self, index: Any) -> Int8:
        assert index is Ellipsis, "only whole matrices are read"
        return self

    def astype(self, dtype: Any) -> Int8:
        """The type of what is multiplied with it decides."""
        return self


def quantize(kernel: Array, num_inputs: int) -> Int8:
    """The nearest Int8: the largest magnitude of every output becomes 127; halves go to the even integer."""
    kernel = jnp.asarray(kernel, jnp.float32)
    largest = jnp.max(jnp.abs(kernel), axis=tuple(range(num_inputs)))
    scales = jnp.where(largest > 0, largest / 127.0, 1.0)
    return Int8(values=jnp.round(kernel / scales).astype(jnp.int8), scales=scales)
