"""Blocks that model families share.

Letters: D model width, F MLP width.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxtrain.kernels.target import target
from jaxtrain.models import quantize
from jaxtrain.models.functional import param
from jaxtrain.models.int8 import Int8
from jaxtrain.sharding import Constrain
from jaxtrain.types import Array

# The names of all but the last dimension of what a layer computes with, ``[B * T, D]`` or ``[B, T, D]``, and of the
# residual stream between its parts.
ROWS = {2: ("batch",), 3: ("batch", "sequence")}
STREAM = {2: ("tokens",), 3: ("batch", "stream_sequence")}


def normal(rngs: nnx.Rngs, shape: Sequence[int], std: float, dtype: Any) -> Array:
    """Truncated at two standard deviations, then rescaled so that ``std`` is the true one."""
    return (jax.random.truncated_normal(rngs.params(), -2, 2, shape, jnp.float32) * (std / 0.87962566)).astype(dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormSpec:
    """A normalisation over the last dimension.

    kind: "rms" divides by the root mean square (1910.07467); "layer" subtracts the mean first, and adds a bias
        (1607.06450).  plus_one: the factor is ``1 + scale`` and scales start at 0 (Gemma).
    """

    kind: str = "rms"
    eps: float = 1e-6
    plus_one: bool = False

    def build(self, size: int, dtype: Any) -> nnx.Module:
        if self.kind == "layer":
            return LayerNorm(size, eps=self.eps, dtype=dtype)
        return RMSNorm(size, eps=self.eps, dtype=dtype, plus_one=self.plus_one)


def rows_of(x_BTD: Array) -> Array:
    """What layers compute with: ``[B * T, D]`` on a CPU, ``[B, T, D]`` elsewhere.

    XLA's CPU backend takes the gradients of products of matrices with one dimension of rows in half the time of those
    with two (a SwiGLU of 256 x 688 over 2,048 tokens: 37 ms against 82).  The TPU's compiler lays out what attention
    reads row by row, and copies what was merged.  A sequence split over devices keeps its own dimension in any case:
    merged, the two could not both be split.
    """
    mesh = jax.sharding.get_abstract_mesh()
    merged = target()[0] == "cpu" and (mesh.empty or mesh.shape["context"] == 1)
    return x_BTD.reshape(-1, x_BTD.shape[-1]) if merged else x_BTD


def stream(x: Array, constrain: Constrain) -> Array:
    """The residual stream between the parts of layers, its tokens split over ``tensor`` too, where they divide.

    Norms, dropout and what is kept for the backward pass are then split like all else; the sums over ``tensor`` at the
    end of each part become reduce-scatters, and all-gathers stand before the next: as much is sent as by all-reduces
    (Korthikanti et al., 2205.05198).
    """
    return constrain(x, _layouts(x, constrain)[0])


def into_stream(x: Array, constrain: Constrain) -> Array:
    """What a part of a layer adds to the stream (g bar of 2205.05198)."""
    between, inside = _layouts(x, constrain)
    return _move(constrain, between, inside, x)


def out_of_stream(x: Array, constrain: Constrain) -> Array:
    """What a part of a layer reads: all tokens of its rows (g of 2205.05198)."""
    between, inside = _layouts(x, constrain)
    return _move(constrain, inside, between, x)


def _layouts(x: Array, constrain: Constrain) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the stream's dimensions between and inside the parts of layers."""
    rows = (*ROWS[x.ndim], "act_embed")
    stream = (*STREAM[x.ndim], "act_embed")
    other = constrain.ways(stream) != constrain.ways(rows)
    return (stream if other and constrain.divides(x.shape, stream) else rows), rows


def _move(constrain: Constrain, to: tuple[str, ...], of: tuple[str, ...], x: Array) -> Array:
    """``x`` from one layout to another; its gradient goes back the same way."""
    return constrain(x, to) if to == of else _moved(constrain, to, of, x)


# Both layouts are named, in this order: where a matrix product comes out, the compiler must not choose the second for
# it, because it then gathers the product's rows over ``fsdp`` rather than the matrix.
@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _moved(constrain, to, of, x):
    return constrain(constrain(x, of), to)


_moved.defvjp(
    lambda constrain, to, of, x: (constrain(constrain(x, of), to), None),
    lambda constrain, to, of, _, d_x: (constrain(constrain(d_x, to), of),),
)


class RMSNorm(nnx.Module):
    """``x / rms(x) * scale`` in float32 (1910.07467)."""

    def __init__(self, size: int, *, eps: float, dtype: Any, plus_one: bool = False):
        self.scale = param((jnp.zeros if plus_one else jnp.ones)((size,), dtype), "norm")
        self.eps = eps
        self.plus_one = plus_one

    def __call__(self, x: Array) -> Array:
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        scale = self.scale[...].astype(jnp.float32)
        return (x32 * (1.0 + scale if self.plus_one else scale)).astype(x.dtype)


class LayerNorm(nnx.Module):
    """``(x - mean(x)) / std(x) * scale + bias`` in float32 (1607.06450)."""

    def __init__(self, size: int, *, eps: float, dtype: Any):
        self.scale = param(jnp.ones((size,), dtype), "norm")
        self.bias = param(jnp.zeros((size,), dtype), "norm")
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        x32 = x.astype(jnp.float32)
        x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        return (x32 * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)).astype(x.dtype)


class Linear(nnx.Module):
    """A matrix whose dimensions are grouped: ``inputs`` are contracted, ``outputs`` appear, and may have a bias.

    quantize: see ``models.quantize``.
    """

    def __init__(
        self,
        rngs,
        inputs,
        outputs,
        names,
        *,
        std: float,
        dtype: Any,
        compute: Any,
        bias: bool = False,
        quantize: str = quantize.NONE,
    ):
        self.kernel = param(normal(rngs, (*inputs, *outputs), std, dtype), *names, compute=compute)
        self.bias = param(jnp.zeros(outputs, dtype), *names[len(inputs) :], compute=compute) if bias else None
        self.num_inputs = len(inputs)
        self.compute = compute
        self.quantize = quantize

    def __call__(self, x: Array) -> Array:
        y = contract(x, self.kernel[...].astype(self.compute), self.num_inputs, quantized=self.quantize)
        return y if self.bias is None else y + self.bias[...].astype(self.compute)


def linear_kinds(config: Any) -> dict[str, Any]:
    """The types in which a config's layers keep matrices and multiply by them, for ``Linear``."""
    # Encoders have no such field: none of the objectives is theirs.
    quantized = getattr(config, "quantize", quantize.NONE)
    return {"dtype": config.param_dtype, "compute": config.compute_dtype, "quantize": quantized}


def contract(x: Array, kernel: Array, num_inputs: int = 1, *, quantized: str = quantize.NONE, **kwargs: Any) -> Array:
    """``[..., inputs] x [inputs, outputs] -> [..., outputs]``; inputs and outputs may be several dimensions each."""
    if isinstance(kernel, Int8):
        return contract(x, kernel.values.astype(x.dtype), num_inputs, **kwargs) * kernel.scales.astype(x.dtype)
    size = math.prod(kernel.shape[:num_inputs])
    matmul = jnp.matmul if quantized == quantize.NONE else partial(quantize.matmul, quantized)
    product = matmul(x.reshape(*x.shape[: x.ndim - num_inputs], size), kernel.reshape(size, -1), **kwargs)
    return product.reshape(*product.shape[:-1], *kernel.shape[num_inputs:])


# "gelu" is the exact one, "gelu_tanh" its approximation by tanh (1606.08415).
ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLPSpec:
    """A feed-forward layer: ``down(act(gate(x)) * up(x))`` (2002.05202), or without a gate ``down(act(up(x)))``."""

    d_ff: int
    activation: str = "silu"
    gated: bool = True
    bias: bool = False

    def build(self, config: Any, rngs: nnx.Rngs) -> nnx.Module:
        return MLP(self, config, rngs)


class MLP(nnx.Module):
    """See ``MLPSpec``."""

    def __init__(self, spec: MLPSpec, config: Any, rngs: nnx.Rngs):
        D, F = config.d_model, spec.d_ff
        kinds = linear_kinds(config) | {"bias": spec.bias}
        if spec.gated:
            self.gate = Linear(rngs, (D,), (F,), ("embed", "mlp"), std=D**-0.5, **kinds)
        self.up = Linear(rngs, (D,), (F,), ("embed", "mlp"), std=D**-0.5, **kinds)
        outer = (F * 2 * config.num_layers) ** -0.5
        self.down = Linear(rngs, (F,), (D,), ("mlp", "embed"), std=outer, **kinds)
        self.gated = spec.gated
        self.activation = spec.activation

    def __call__(self, x, *, segments=None, constrain, decoding=False):
        """``[..., D] -> [..., D]``, and None: there is nothing to balance, which is what the other two are for."""
        act = ACTIVATIONS[self.activation]
        up = checkpoint_name(self.up(x), "mlp_up")
        h = act(checkpoint_name(self.gate(x), "mlp_gate")) * up if self.gated else act(up)
        return self.down(constrain(h, (*ROWS[h.ndim], "act_mlp"))), None


def dropout(x: Array, rate: float, rng: Array | None) -> Array:
    """Inverted dropout (1207.0580); the identity without a key."""
    if rng is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(rng, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), 0).astype(x.dtype)
