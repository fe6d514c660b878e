"""Products of matrices in 8 bits, in training too, by qwix's quantised training (https://github.com/google/qwix).

Parameters and activations stay what they are.  Both operands of a product are rounded when it is computed, each row of
activations and each column of a matrix with a scale of its own, set by its largest magnitude.  In the backward pass the
incoming gradient is multiplied by the scales of the other operand, as that was rounded in the forward pass, and then
rounded too, once for either product.  Sums are int32, or float32 for 8-bit floats; scales and results are float32.

Where matrices are split over ``fsdp``, XLA gathers them in 8 bits, half of bfloat16's bytes; but it adds up their
gradients over devices as int32 in an all-reduce, where bfloat16's are reduce-scattered: four times the bytes (compiled
for TPU v5e by libtpu 0.0.42).
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxtrain.sharding import vary_like
from jaxtrain.types import Array

NONE = "none"
RESULT = "quantized_product"  # for ``jax.checkpoint``
# Types of weights, activations and gradients.  Of 8-bit floats gradients take the ones with the longer exponent
# (2209.05433, section 3).
KINDS = {
    "int8": ("int8", "int8", "int8"),
    "fp8": ("float8_e4m3fn", "float8_e4m3fn", "float8_e5m2"),
}


def check(kind: str) -> None:
    """Raises ValueError where a config's ``quantize`` is unknown, or qwix is not installed."""
    if kind != NONE and kind not in KINDS:
        raise ValueError(f"quantize={kind!r}; one of {(NONE, *KINDS)}")
    if kind != NONE and importlib.util.find_spec("qwix") is None:
        raise ValueError(f"quantize={kind!r} needs qwix, which is not installed: pip install 'jaxtrain[quantize]'")


@functools.cache
def _provider(kind: str) -> Any:
    import qwix

    weight, act, backward = KINDS[kind]
    return qwix.QtProvider([qwix.QtRule(weight_qtype=weight, act_qtype=act, bwd_qtype=backward)])


class _Here(nnx.Module):
    """Where products stand: qwix looks for the innermost module among its callers, and for this path of it."""

    qwix_path = ()

    def dot(self, kind: str, x: Array, matrix: Array) -> Array:
        return _provider(kind).dot_general(x, matrix, (((x.ndim - 1,), (0,)), ((), ())))

    def ragged_dot(self, kind: str, x: Array, matrices: Array, sizes: Array) -> Array:
        return _provider(kind).ragged_dot(x, matrices, sizes)


def matmul(kind: str, x: Array, matrix: Array) -> Array:
    """``[..., K] x [K, N] -> [..., N]``, in the type of x."""
    # A custom gradient must vary over the axes of a shard_map that its argument varies over.
    x32, matrix32 = (vary_like(a, x, matrix).astype(jnp.float32) for a in (x, matrix))
    return checkpoint_name(_Here().dot(kind, x32, matrix32).astype(x.dtype), RESULT)


def grouped_matmul(kind: str, x_MK: Array, w_EKN: Array, sizes_E: Array) -> Array:
    """``kernels.grouped_matmul``, whose conditions are the same.  Columns of all groups' matrices share a scale."""
    arrays = (x_MK, w_EKN, sizes_E)
    x_MK, w_EKN, sizes_E = (vary_like(x, *arrays) for x in arrays)
    inside_M1 = jnp.arange(x_MK.shape[0])[:, None] < jnp.sum(sizes_E)
    x32_MK = jnp.where(inside_M1, x_MK.astype(jnp.float32), 0)
    out_MN = _Here().ragged_dot(kind, x32_MK, w_EKN.astype(jnp.float32), sizes_E)
    # What a ragged product gives for the rows beyond differs between backends.
    return jnp.where(inside_M1, out_MN, 0).astype(x_MK.dtype)


def saves_products(policy: Any) -> Any:
    """A ``jax.checkpoint`` policy that saves what ``policy`` does, but results of quantised products rather than their
    sums, which take four bytes."""

    def saves(primitive, *args, **params):
        return params.get("preferred_element_type") != jnp.int32 and policy(primitive, *args, **params)

    return jax.checkpoint_policies.save_from_both_policies(saves, jax.checkpoint_policies.save_only_these_names(RESULT))
