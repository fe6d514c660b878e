"""Held-out figures: sums divided once, and bits for every byte."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.evaluate.heldout import BitsPerByte, ByteLoss, Measure, evaluate, make_eval_step
from jaxtrain.types import Loss, Outputs, Sum, Tokens


def make_tokens(targets, weights):
    zeros = np.zeros_like(targets)
    return Tokens(ids=zeros, targets=targets, weights=weights, positions=zeros, segments=zeros + 1)


@pytest.mark.smoke
def test_bits_per_byte_by_hand():
    """Ids stand for 0 (control), 1, 2 and 5 bytes; the model gives every id its own fixed probability."""
    probabilities = np.array([0.1, 0.2, 0.3, 0.4])

    def apply(params, tokens, **_):
        return Outputs(hidden=None, logits=jnp.log(params) * jnp.ones((*tokens.ids.shape, 1)) + 3.0)

    batch = make_tokens(
        np.array([[1, 2, 3, 0], [3, 1, 2, 2]], np.int32), np.array([[1, 1, 1, 1], [1, 0, 0, 0.5]], np.float32)
    )
    step = make_eval_step(apply, ByteLoss(np.array([0, 1, 2, 5], np.int32)))
    values = evaluate(step, jnp.asarray(probabilities, jnp.float32), [batch])
    bits = -sum(math.log2(probabilities[i]) for i in (1, 2, 3, 3, 2))
    assert values["bits_per_byte"] == pytest.approx(bits / (1 + 2 + 5 + 5 + 2), rel=1e-6)


def test_batches_are_weighed_and_not_averaged():
    def objective(apply, params, batch, rng):
        assert rng is None  # deterministic: no dropout
        total, weight = jnp.sum(batch * params), jnp.float32(batch.size)
        return Loss(total=total, weight=weight, metrics={"none": Sum(jnp.float32(0), jnp.float32(0))})

    step = make_eval_step(None, objective)
    batches = [np.full(1, 10.0, np.float32), np.full(3, 2.0, np.float32)]
    values = evaluate(step, jnp.float32(2), batches)
    assert values == {"loss": pytest.approx(2 * 16 / 4), "none": 0.0}
    assert evaluate(step, jnp.float32(2), batches, max_batches=1)["loss"] == pytest.approx(20)
    with pytest.raises(ValueError, match="no held-out batches"):
        evaluate(step, jnp.float32(2), [])


def test_many_small_terms_are_added_in_double_precision():
    def objective(apply, params, batch, rng):
        return Loss(total=batch, weight=jnp.float32(1), metrics={})

    step = make_eval_step(None, objective)
    batches = [np.float32(2**24), *[np.float32(1)] * 8]
    assert evaluate(step, jax.numpy.zeros(()), batches)["loss"] == (2**24 + 8) / 9


def test_directions_are_checked():
    with pytest.raises(ValueError, match=r"Measure\.better is 'up'"):
        Measure(metric="loss", label="x", better="up")
    with pytest.raises(ValueError, match=r"BitsPerByte\.better is 'down'"):
        BitsPerByte(label="x", better="down")
