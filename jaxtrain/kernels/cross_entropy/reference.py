"""Scores of tokens from whole logits: the definition that every backend must match in value and gradient.

Letters: D model width, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Scores(NamedTuple):
    """What objectives read of each token's distribution ``p = softmax(logits / temperature)``, each ``[...]``.

    logps: ``log p[target]``.
    log_z: ``log Σ_v exp(logit_v / temperature)``.
    correct: 1.0 where no token is likelier than the target, else 0.0.
    entropy: ``-Σ_v p_v log p_v`` in nats, where it was asked for.
    mean_logps: ``Σ_v log p_v / V``, where it was asked for.
    """

    logps: jax.Array
    log_z: jax.Array
    correct: jax.Array
    entropy: jax.Array | None = None
    mean_logps: jax.Array | None = None


def at_least_float32(x: jax.Array) -> jax.Array:
    """bfloat16 and integers become float32 (a score of 0.7 must not meet an integer array); float64 stays."""
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def project(
    hidden: jax.Array, matrix: jax.Array, bias: jax.Array | None = None, *, softcap: float = 0.0, table: bool = False
) -> jax.Array:
    """``[..., D] -> float32 [..., V]``: logits, summed in float32 whatever the type of ``hidden``.

    matrix: ``[D, V]``, or a ``table`` ``[V, D]``.  bias: ``[V]``.
    softcap: logits become ``softcap * tanh(logits / softcap)``; 0: unchanged.
    """
    kernel = matrix.astype(hidden.dtype)
    kind = jnp.promote_types(hidden.dtype, jnp.float32)
    logits = jnp.matmul(hidden, kernel.T if table else kernel, preferred_element_type=kind)
    if bias is not None:
        logits = logits + bias.astype(kind)
    return softcap * jnp.tanh(logits / softcap) if softcap else logits


def scores(
    logits: jax.Array, targets: jax.Array, *, temperature: float = 1.0, entropy: bool = False, mean: bool = False
) -> Scores:
    """Logits: ``[..., V]`` of any float type; the softmax is taken in float32 (float64 for float64)."""
    logits = at_least_float32(logits) / temperature
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    log_z = jax.nn.logsumexp(logits, axis=-1)
    # Not by argmax: the softmax has found the maximum already, and XLA's CPU backend finds its place 50 times slower.
    correct = (chosen >= jnp.max(logits, axis=-1)).astype(log_z.dtype)
    return Scores(
        logps=chosen - log_z,
        log_z=log_z,
        correct=jax.lax.stop_gradient(correct),
        entropy=entropy_of(logits) if entropy else None,
        mean_logps=jnp.mean(logits, axis=-1) - log_z if mean else None,
    )


def entropy_of(logits: jax.Array) -> jax.Array:
    """Entropy in nats of ``softmax(logits)``, differentiable.  ``[..., V] -> [...]``."""
    logps = jax.nn.log_softmax(logits, axis=-1)
    # A logit of -inf is a token that cannot occur: 0 · -inf counts as 0, and so does its gradient.
    possible = ~jnp.isneginf(logps)
    finite = jnp.where(possible, logps, 0.0)
    return -jnp.sum(jnp.where(possible, jnp.exp(finite) * finite, 0.0), axis=-1)
