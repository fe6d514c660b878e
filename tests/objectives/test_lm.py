from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.objectives import LM, SFT
from jaxtrain.objectives.sft import per_sequence
from jaxtrain.types import Outputs, Tokens


def logits_apply(params, tokens, *, cache=None, rng=None):
    return Outputs(hidden=None, logits=params)


def two_rows():
    """Lengths 2 and 6, with token losses 1 and .5, from logits over two tokens."""
    lengths, losses = np.array([2, 6]), np.array([1.0, 0.5])
    weights = (np.arange(6) < lengths[:, None]).astype(np.float64)
    p = np.exp(-losses)
    logits = np.log(np.stack([p, 1 - p], -1))[:, None].repeat(6, 1) + 3.0
    zeros = np.zeros((2, 6), np.int32)
    tokens = Tokens(ids=zeros, targets=zeros, weights=weights, positions=zeros, segments=weights.astype(np.int32))
    return logits, tokens


@pytest.mark.parametrize(("objective", "golden"), [(SFT(reduction="sequence"), 0.75), (SFT(), 0.625), (LM(), 0.625)])
def test_reduction_golden(objective, golden):
    with jax.enable_x64(True):
        loss = objective(logits_apply, *two_rows(), None)
        np.testing.assert_allclose(loss.total / loss.weight, golden, atol=1e-12)
        assert loss.weight == (2 if golden == 0.75 else 8)
        metric = loss.metrics["loss"]
        np.testing.assert_allclose(metric.total / metric.weight, 0.625, atol=1e-12)


def test_accuracy():
    logits, tokens = two_rows()
    loss = LM()(logits_apply, logits, tokens, None)
    # p = e^-1 < 1/2 in the row of 2, e^-.5 > 1/2 in the row of 6.
    assert loss.metrics["accuracy"] == (6.0, 8.0)


def test_z_loss():
    with jax.enable_x64(True):
        logits, tokens = two_rows()
        loss = LM(z_loss=0.01)(logits_apply, logits, tokens, None)
        # The logits are log-probabilities plus 3, so log Z is 3.
        np.testing.assert_allclose(loss.total, 8 * 0.625 + 8 * 0.01 * 9, atol=1e-12)
        np.testing.assert_allclose(loss.metrics["z_loss"], (8 * 9, 8), atol=1e-12)
        np.testing.assert_allclose(loss.metrics["loss"], (8 * 0.625, 8), atol=1e-12)
    assert "z_loss" not in LM()(logits_apply, logits, tokens, None).metrics


def test_weights_scale_tokens():
    with jax.enable_x64(True):
        logits, tokens = two_rows()
        tokens = dataclasses.replace(tokens, weights=tokens.weights * np.array([[3.0], [0.5]]))
        loss = SFT()(logits_apply, logits, tokens, None)
        np.testing.assert_allclose(loss.total, 3 * 2 * 1 + 0.5 * 6 * 0.5, atol=1e-12)
        assert loss.weight == 9


def test_per_sequence_counts_segments_of_packed_rows():
    weights = jnp.array([[0.0, 1, 1, 0, 1, 0], [0.0, 0, 0, 0, 2, 0]])
    segments = jnp.array([[1, 1, 1, 2, 2, 0], [1, 1, 2, 2, 3, 0]])
    scaled, count = per_sequence(weights, segments)
    # Row 0: segments of 2 and 1 trained tokens; row 1: only the third segment has one.
    np.testing.assert_allclose(scaled, [[0, 0.5, 0.5, 0, 1, 0], [0, 0, 0, 0, 1, 0]])
    assert count == 3


def test_dropout_only_with_a_key(dropout_model, tools):
    apply, params = dropout_model
    batch = tools.make_tokens(np.random.default_rng(0))
    for objective in (LM(), SFT()):

        def total(rng, objective=objective):
            return objective(apply, params, batch, rng).total

        compiled = jax.jit(total, compiler_options=tools.COMPILE_FAST)
        totals = [float(compiled(rng)) for rng in (None, None, jax.random.key(0), jax.random.key(1))]
        assert totals[0] == totals[1]
        assert len(set(totals)) == 3


def test_fields_are_checked():
    with pytest.raises(ValueError, match=r"LM.z_loss is -1; give it a number of at least 0"):
        LM(z_loss=-1)
    with pytest.raises(ValueError, match=r"SFT.reduction is 'mean'; choose one of 'token', 'sequence'"):
        SFT(reduction="mean")
