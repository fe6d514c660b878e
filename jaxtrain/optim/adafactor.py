"""Adafactor (arXiv 1804.04235) for stacked layers.

optax's version factors over the two largest axes of an array and takes its clipping RMS over all of it.
For kernels stacked as ``[layers, embed, heads, head_dim]`` that may average over layers, leaves ``heads`` or
``head_dim`` outside the matrix, and lets one layer's spike clip every layer.  Here the true matrix comes
from the logical axes, and each layer (and expert) is on its own.  For a plain matrix the two agree.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxtrain.optim.matrices import Matrix

EPSILON = 1e-30  # added to squared gradients, section 3 of the paper
PARAMETER_FLOOR = 1e-3  # the least a parameter's RMS counts for, section 8 of the paper


class FactoredState(NamedTuple):
    """Second moments.  Factored: ``rows`` and ``columns`` have the parameter's rank, with size 1 on the
    matrix's output (input) axes, and ``full`` is a scalar 0; otherwise the other way around.

    count: int32 scalar, updates made.
    """

    count: Any
    rows: Any
    columns: Any
    full: Any


class Factoring(NamedTuple):
    """How a parameter is treated.

    matrix: its factored matrix, None if its second moment is kept whole.  batch: the axes of its copies.
    """

    matrix: Matrix | None
    batch: tuple[int, ...]


def _is_result(x) -> bool:
    return isinstance(x, tuple) and len(x) == 4


def scale_by_factored_rms(factorings: Any, *, decay_exponent: float) -> optax.GradientTransformation:
    """Divides gradients by a factored running RMS with decay ``1 - t^-decay_exponent``, t from 1.

    factorings: a tree of Factoring like the parameters.
    """

    def moments(squares, factoring: Factoring):
        if factoring.matrix is None:
            return jnp.zeros(()), jnp.zeros(()), squares
        rows = jnp.mean(squares, axis=factoring.matrix.outputs, keepdims=True)
        columns = jnp.mean(squares, axis=factoring.matrix.inputs, keepdims=True)
        return rows, columns, jnp.zeros(())

    def init(params):
        def zeros(p, factoring):
            empty = moments(jnp.zeros_like(p, dtype=jnp.float32), factoring)
            return (*map(jnp.zeros_like, empty), None)

        trees = jax.tree.map(zeros, params, factorings)
        return FactoredState(jnp.zeros((), jnp.int32), *(_part(trees, i) for i in range(3)))

    def update(updates, state, params=None):
        del params
        decay = 1.0 - (state.count + 1).astype(jnp.float32) ** -decay_exponent

        def one(g, rows, columns, full, factoring):
            squares = jnp.square(g.astype(jnp.float32)) + EPSILON
            new = moments(squares, factoring)
            rows, columns, full = (
                decay * old + (1 - decay) * now for old, now in zip((rows, columns, full), new, strict=True)
            )
            if factoring.matrix is None:
                scaled = g * jax.lax.rsqrt(full)
            else:
                mean = jnp.mean(rows, axis=factoring.matrix.inputs, keepdims=True)
                scaled = g * jax.lax.rsqrt(rows / mean) * jax.lax.rsqrt(columns)
            return rows, columns, full, scaled

        results = jax.tree.map(one, updates, state.rows, state.columns, state.full, factorings)
        new_state = FactoredState(optax.safe_increment(state.count), *(_part(results, i) for i in range(3)))
        return _part(results, 3), new_state

    return optax.GradientTransformation(init, update)


def _part(results, i: int):
    return jax.tree.map(lambda result: result[i], results, is_leaf=_is_result)


def _rms(x, batch: tuple[int, ...]):
    axes = tuple(i for i in range(x.ndim) if i not in batch)
    return jnp.sqrt(jnp.mean(jnp.square(x), axis=axes, keepdims=True))


def clip_by_rms(factorings: Any, threshold: float) -> optax.GradientTransformation:
    """Scales each layer's update down to an RMS of at most ``threshold`` (section 6 of the paper)."""

    def clip(u, factoring):
        return u / jnp.maximum(1.0, _rms(u, factoring.batch) / threshold)

    return optax.stateless(lambda updates, _: jax.tree.map(clip, updates, factorings))


def scale_by_parameter_rms(factorings: Any) -> optax.GradientTransformation:
    """Multiplies each layer's update by the RMS of its parameter, at least PARAMETER_FLOOR (section 8)."""

    def scale(u, p, factoring):
        return u * jnp.maximum(_rms(p, factoring.batch), PARAMETER_FLOOR)

    return optax.stateless(lambda updates, params: jax.tree.map(scale, updates, params, factorings))
