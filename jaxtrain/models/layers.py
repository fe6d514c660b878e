"""Blocks that model families share.

Letters: B rows, T tokens, S cache slots, D model width, N query heads, K key heads, H head size, F MLP width,
V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtrain.kernels.attention import api
from jaxtrain.models.functional import param
from jaxtrain.models.rope import apply_rope
from jaxtrain.types import Array

# The names of all but the last dimension of a residual stream ``[B * T, D]`` or ``[B, T, D]``.
ROWS = {2: ("batch",), 3: ("batch", "sequence")}


def normal(rngs: nnx.Rngs, shape: Sequence[int], std: float, dtype: Any) -> Array:
    """Truncated at two standard deviations, then rescaled so that ``std`` is the true one."""
    return (jax.random.truncated_normal(rngs.params(), -2, 2, shape, jnp.float32) * (std / 0.87962566)).astype(dtype)


class RMSNorm(nnx.Module):
    """``x / rms(x) * scale`` in float32 (1910.07467)."""

    def __init__(self, size: int, *, eps: float, dtype: Any):
        self.scale = param(jnp.ones((size,), dtype), "norm")
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        return (x32 * self.scale[...].astype(jnp.float32)).astype(x.dtype)


class Linear(nnx.Module):
    """A matrix without bias whose dimensions are grouped: ``inputs`` are contracted, ``outputs`` appear."""

    def __init__(self, rngs, inputs, outputs, names, *, std: float, dtype: Any, compute: Any):
        self.kernel = param(normal(rngs, (*inputs, *outputs), std, dtype), *names)
        self.num_inputs = len(inputs)
        self.compute = compute

    def __call__(self, x: Array) -> Array:
        return contract(x, self.kernel[...].astype(self.compute), self.num_inputs)


def contract(x: Array, kernel: Array, num_inputs: int = 1, **kwargs: Any) -> Array:
    """``[..., inputs] x [inputs, outputs] -> [..., outputs]``; inputs and outputs may be several dimensions each."""
    size = math.prod(kernel.shape[:num_inputs])
    product = jnp.matmul(x.reshape(*x.shape[: x.ndim - num_inputs], size), kernel.reshape(size, -1), **kwargs)
    return product.reshape(*product.shape[:-1], *kernel.shape[num_inputs:])


class Attention(nnx.Module):
    """Grouped-query self-attention with rotary positions and optional query and key norms (2302.05442)."""

    def __init__(self, config: Any, rngs: nnx.Rngs):
        D, N, K, H = config.d_model, config.num_heads, config.num_kv_heads, config.head_dim
        kinds = dict(dtype=config.param_dtype, compute=config.compute_dtype)
        inner = D**-0.5
        self.query = Linear(rngs, (D,), (N, H), ("embed", "q_heads", "head_dim"), std=inner, **kinds)
        self.key = Linear(rngs, (D,), (K, H), ("embed", "kv_heads", "head_dim"), std=inner, **kinds)
        self.value = Linear(rngs, (D,), (K, H), ("embed", "kv_heads", "head_dim"), std=inner, **kinds)
        # GPT-2's rule: residual branches start smaller, so that depth does not blow the stream up.
        outer = (N * H * 2 * config.num_layers) ** -0.5
        self.out = Linear(rngs, (N, H), (D,), ("q_heads", "head_dim", "embed"), std=outer, **kinds)
        if config.qk_norm:
            self.query_norm = RMSNorm(H, eps=config.norm_eps, dtype=config.param_dtype)
            self.key_norm = RMSNorm(H, eps=config.norm_eps, dtype=config.param_dtype)
        self.qk_norm = config.qk_norm
        self.backend = config.attention

    def __call__(self, x, *, rope, positions, segments, constrain, cache=None):
        """``x``: ``[B, T, D]`` or ``[B * T, D]``, and so is the first result.

        cache: (keys ``[B, S, K, H]``, values, positions, segments, index), or None to attend within x.
        """
        q_BTNH, k_BTKH, v_BTKH = (
            heads.reshape(*positions.shape, *heads.shape[-2:]) for heads in (self.query(x), self.key(x), self.value(x))
        )
        if self.qk_norm:
            q_BTNH, k_BTKH = self.query_norm(q_BTNH), self.key_norm(k_BTKH)
        q_BTNH = constrain(apply_rope(q_BTNH, *rope), ("batch", "sequence", "act_heads", None))
        k_BTKH = apply_rope(k_BTKH, *rope)
        if cache is None:
            keys, values, k_positions, k_segments = k_BTKH, v_BTKH, positions, segments
        else:
            keys, values, k_positions, k_segments, index = cache
            keys = jax.lax.dynamic_update_slice_in_dim(keys, k_BTKH.astype(keys.dtype), index, axis=1)
            values = jax.lax.dynamic_update_slice_in_dim(values, v_BTKH.astype(values.dtype), index, axis=1)
        out_BTNH = api.attention(
            q_BTNH,
            keys,
            values,
            q_positions=positions,
            k_positions=k_positions,
            q_segments=segments,
            k_segments=k_segments,
            in_order=cache is None,
            backend=self.backend,
        )
        out = out_BTNH.reshape(*x.shape[:-1], *out_BTNH.shape[-2:])
        return self.out(out), (None if cache is None else (keys, values))


class SwiGLU(nnx.Module):
    """``down(silu(gate(x)) * up(x))`` (2002.05202)."""

    def __init__(self, config: Any, rngs: nnx.Rngs):
        D, F = config.d_model, config.d_ff
        kinds = dict(dtype=config.param_dtype, compute=config.compute_dtype)
        self.gate = Linear(rngs, (D,), (F,), ("embed", "mlp"), std=D**-0.5, **kinds)
        self.up = Linear(rngs, (D,), (F,), ("embed", "mlp"), std=D**-0.5, **kinds)
        outer = (F * 2 * config.num_layers) ** -0.5
        self.down = Linear(rngs, (F,), (D,), ("mlp", "embed"), std=outer, **kinds)

    def __call__(self, x, constrain):
        """``[..., D] -> [..., D]``."""
        h = jax.nn.silu(self.gate(x)) * self.up(x)
        return self.down(constrain(h, (*ROWS[h.ndim], "act_mlp")))


def dropout(x: Array, rate: float, rng: Array | None) -> Array:
    """Inverted dropout (1207.0580); the identity without a key."""
    if rng is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(rng, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), 0).astype(x.dtype)
