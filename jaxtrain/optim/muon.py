"""Muon: momentum whose every matrix is orthogonalised (Keller Jordan 2024; scaling of arXiv 2502.16982).

For each matrix, with gradient G, momentum M and Nesterov look-ahead::

    M <- beta * M + G
    U = newton_schulz(beta * M + G)               # close to the nearest orthogonal matrix
    update = rms * sqrt(max(fan_in, fan_out)) * U  # root mean square about ``rms``, as AdamW's is

so one learning rate and weight decay serve the matrices and the parameters left to AdamW.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxtrain.optim.matrices import Matrix

# The quintic of https://kellerjordan.github.io/posts/muon/: steepest at 0 rather than convergent, singular
# values end in about [0.7, 1.2].
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


class MuonState(NamedTuple):
    """momentum: a tree like the parameters."""

    momentum: Any


def newton_schulz(x, steps: int = 5, eps: float = 1e-7):
    """Roughly orthogonalises each ``[rows, columns]`` matrix of x ``[..., rows, columns]``, in its dtype."""
    a, b, c = COEFFICIENTS
    tall = x.shape[-2] > x.shape[-1]
    if tall:  # the Gram matrix of the shorter side is the smaller one
        x = x.mT
    # The Frobenius norm bounds the spectral norm, so every singular value starts in [0, 1].
    x = x / (jnp.sqrt(jnp.sum(jnp.square(x), axis=(-2, -1), keepdims=True)) + eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def orthogonalise(x, matrix: Matrix, steps: int):
    """``newton_schulz`` of a parameter-shaped array, one matrix per index of its batch axes."""
    order = matrix.batch + matrix.inputs + matrix.outputs
    fan_in, fan_out = matrix.fans(x.shape)
    moved = x.transpose(order)
    flat = newton_schulz(moved.reshape(-1, fan_in, fan_out), steps)
    back = sorted(range(x.ndim), key=lambda i: order[i])
    return flat.reshape(moved.shape).transpose(back)


def scale_by_muon(
    matrices: Any, *, beta: float, steps: int, rms: float, momentum_dtype: Any
) -> optax.GradientTransformation:
    """The update above.  ``matrices``: a tree of Matrix, with optax.MaskedNode for masked parameters."""

    def init(params):
        return MuonState(jax.tree.map(lambda p: jnp.zeros_like(p, dtype=momentum_dtype), params))

    def update(updates, state, params=None):
        del params
        momentum = jax.tree.map(lambda m, g: beta * m.astype(g.dtype) + g, state.momentum, updates)

        def direction(g, m, matrix):
            scale = rms * math.sqrt(max(matrix.fans(g.shape)))
            return scale * orthogonalise(beta * m + g, matrix, steps)

        new = jax.tree.map(direction, updates, momentum, matrices)
        stored = jax.tree.map(lambda m: m.astype(momentum_dtype), momentum)
        return new, MuonState(stored)

    return optax.GradientTransformation(init, update)
