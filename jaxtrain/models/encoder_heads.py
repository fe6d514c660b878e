"""What reads an encoder's hidden states, and sentence embeddings.

Letters: B rows, T tokens, D model width, E embedding width, V vocabulary.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtrain.models.functional import param
from jaxtrain.models.layers import ACTIVATIONS, Linear, NormSpec, normal
from jaxtrain.types import Array


class Table(nnx.Module):
    """A vector (of ``width``) for each of ``size`` ids, positions, types or buckets."""

    def __init__(self, size: int, width: int, names: tuple[str, str], rngs: nnx.Rngs, *, std: float, dtype: Any):
        self.embedding = param(normal(rngs, (size, width), std, dtype), *names)


class Matrix(nnx.Module):
    """An output matrix ``[D, V]`` of its own, where embeddings are not tied."""

    def __init__(self, inputs: int, outputs: int, rngs: nnx.Rngs, *, dtype: Any):
        self.kernel = param(normal(rngs, (inputs, outputs), inputs**-0.5, dtype), "embed", "vocab")


class Bias(nnx.Module):
    """A bias of every id's logit."""

    def __init__(self, size: int, *, dtype: Any):
        self.bias = param(jnp.zeros((size,), dtype), "vocab")


def dense(config: Any, rngs: nnx.Rngs, outputs: int, names: tuple[str, str] = ("embed", "features")) -> Linear:
    """A layer with a bias from the model's width."""
    kinds = dict(dtype=config.param_dtype, compute=config.compute_dtype, bias=True)
    return Linear(rngs, (config.d_model,), (outputs,), names, std=config.init_std, **kinds)


class MLMHead(nnx.Module):
    """``norm(act(dense(h)))``, which the product with the embeddings and a bias follow (BERT, 1810.04805)."""

    def __init__(self, config: Any, rngs: nnx.Rngs, *, width: int, activation: str, norm: NormSpec):
        self.dense = dense(config, rngs, width)
        self.norm = norm.build(width, config.param_dtype)
        self.bias = param(jnp.zeros((config.vocab_size,), config.param_dtype), "vocab")
        self.activation = activation

    def __call__(self, hidden: Array) -> Array:
        """``[..., D] -> [..., E]``."""
        return self.norm(ACTIVATIONS[self.activation](self.dense(hidden)))


class Pooler(nnx.Module):
    """``tanh(dense(h))`` at each position (BERT)."""

    def __init__(self, config: Any, rngs: nnx.Rngs):
        self.dense = dense(config, rngs, config.d_model)

    def __call__(self, hidden: Array) -> Array:
        return jnp.tanh(self.dense(hidden))


class Labels(nnx.Module):
    """``[..., D] -> float32 [..., count]``, with a bias, computed in float32."""

    def __init__(self, config: Any, count: int, rngs: nnx.Rngs):
        kinds = dict(dtype=config.param_dtype, compute=jnp.float32, bias=True)
        self.dense = Linear(rngs, (config.d_model,), (count,), ("embed", "labels"), std=config.init_std, **kinds)

    def __call__(self, hidden: Array) -> Array:
        return self.dense(hidden.astype(jnp.float32))


class Discriminator(nnx.Module):
    """``out(act(dense(h)))``, one logit a token (ELECTRA, 2003.10555): ``[..., D] -> float32 [...]``."""

    def __init__(self, config: Any, rngs: nnx.Rngs):
        self.dense = dense(config, rngs, config.d_model)
        self.out = Labels(config, 1, rngs)
        self.activation = config.activation

    def __call__(self, hidden: Array) -> Array:
        return self.out(ACTIVATIONS[self.activation](self.dense(hidden)))[..., 0]


@partial(jax.jit, static_argnames="count")
def sentence_embeddings(hidden_BTD: Array, segments: Array, *, count: int = 1) -> Array:
    """The mean of each segment's hidden states, scaled to length 1: float32 ``[B, count, D]``.

    Sentence-BERT's convention (1908.10084): mean pooling over all tokens but padding, [CLS] and [SEP] included.

    segments: int32 ``[B, T]``, as in ``Tokens``; ``count``: segments in a row.  A segment without tokens gives zeros.
    """
    member_BTC = (segments[..., None] == jnp.arange(1, count + 1)).astype(jnp.float32)
    total_BCD = jnp.einsum("btc,btd->bcd", member_BTC, hidden_BTD.astype(jnp.float32))
    # The length takes the place of the mean's division: both only scale.
    length_BC1 = jnp.linalg.norm(total_BCD, axis=-1, keepdims=True)
    return total_BCD / jnp.maximum(length_BC1, 1e-12)
