"""What reads the last hidden states: next-token logits, a scalar reward, a value."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx

from jaxtrain.models.functional import param
from jaxtrain.models.layers import contract, normal
from jaxtrain.types import Array


class ScalarHead(nnx.Module):
    """``[B, T, D] -> float32 [B, T]``, no bias, computed in float32.

    A reward head starts at std ``1 / sqrt(D + 1)`` (2403.17031), a value head at ``std=0``: a fresh critic then
    says 0 everywhere.
    """

    def __init__(self, size: int, rngs: nnx.Rngs, *, std: float, dtype: Any):
        self.kernel = param(normal(rngs, (size, 1), std, dtype), "embed", "scalar")

    def __call__(self, hidden_BTD: Array) -> Array:
        kernel = self.kernel[...].astype(jnp.float32)
        return jnp.einsum("btd,do->bto", hidden_BTD.astype(jnp.float32), kernel)[..., 0]


def lm_logits(hidden: Array, kernel: Array, *, transpose: bool) -> Array:
    """``[..., D] -> float32 [..., V]``, with float32 accumulation.

    kernel: ``[D, V]``, or with ``transpose`` a table ``[V, D]``.
    """
    kernel = kernel.astype(hidden.dtype)
    return contract(hidden, kernel.T if transpose else kernel, preferred_element_type=jnp.float32)
