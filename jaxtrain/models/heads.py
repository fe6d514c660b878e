"""What reads the last hidden states: next-token logits, a scalar reward, a value."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtrain.models.functional import param
from jaxtrain.models.layers import normal
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


def lm_logits(hidden_BTD: Array, kernel: Array, *, transpose: bool) -> Array:
    """float32 ``[B, T, V]`` with float32 accumulation, from a ``[D, V]`` kernel or (transposed) a ``[V, D]`` table."""
    kernel = kernel.astype(hidden_BTD.dtype)
    return jax.lax.dot_general(
        hidden_BTD, kernel, (((2,), (1 if transpose else 0,)), ((), ())), preferred_element_type=jnp.float32
    )
