from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxtrain.objectives import DPO
from jaxtrain.objectives.dpo import LOSSES, add_reference, preference_loss
from jaxtrain.types import Outputs, Pairs, Tokens

# a_c = -10 + 11, a_r = -12 + 11.5; completions of 5 and 4 tokens.
A = (1.0, -0.5, 5.0, 4.0)

GOLDEN = [
    (DPO(), 0.620956930),
    (DPO(label_smoothing=0.1), 0.635956930),
    (DPO(loss="robust", label_smoothing=0.1), 0.602206930),
    (DPO(loss="hinge"), 0.85),
    (DPO(loss="ipo"), 21.855625),
    (DPO(loss="ipo_sum"), 12.25),
    (DPO(loss="sigmoid_norm"), 0.677029),  # log(1 + e^(-0.1 (1/5 + 0.5/4)))
]


@pytest.mark.parametrize(("objective", "golden"), GOLDEN)
def test_golden(objective, golden):
    options = {"loss": objective.loss, "beta": objective.beta, "label_smoothing": objective.label_smoothing}
    with jax.enable_x64(True):
        numbers = [jnp.float64(x) for x in A]
        np.testing.assert_allclose(preference_loss(*numbers, **options), golden, atol=1e-6, rtol=0)
        check_grads(lambda a, b: preference_loss(a, b, *A[2:], **options), A[:2], 1, ["rev"], rtol=1e-4)


def golden_batch():
    """Log-probabilities -10 and -12 through a model of two tokens, and references -11 and -11.5."""
    T = 7
    n = np.array([5, 4])  # tokens 1..n of each row are its completion
    weights = ((np.arange(T) >= 1) & (np.arange(T) <= n[:, None])).astype(np.float64)
    sides = []
    for i in (0, 1):
        zeros = np.zeros((1, T), np.int32)
        segments = (np.arange(T) <= n[i]).astype(np.int32)[None]
        sides.append(Tokens(ids=zeros + i, targets=zeros, weights=weights[i][None], positions=zeros, segments=segments))
    p = np.exp([-10 / 5, -12 / 4])
    logits = np.log(np.stack([p, 1 - p], -1))  # by the id read
    numbers = {"reference_chosen": [-11.0], "reference_rejected": [-11.5], "margin": [0.0], "weight": [1.0]}
    batch = Pairs(chosen=sides[0], rejected=sides[1], **{k: np.array(v) for k, v in numbers.items()})
    return logits, batch


def table_apply(params, tokens, *, cache=None, rng=None):
    assert rng is None
    return Outputs(hidden=None, logits=params[tokens.ids])


@pytest.mark.parametrize(("objective", "golden"), GOLDEN)
def test_golden_through_the_model(objective, golden):
    with jax.enable_x64(True):
        logits, batch = golden_batch()
        loss = objective(table_apply, jnp.asarray(logits), batch, jax.random.key(0))
        np.testing.assert_allclose(loss.total / loss.weight, golden, atol=1e-6, rtol=0)
        means = {name: metric.total / metric.weight for name, metric in loss.metrics.items()}
        expected = {
            "loss": golden,
            "rewards/chosen": 0.1,
            "rewards/rejected": -0.05,
            "rewards/margins": 0.15,
            "rewards/accuracies": 1.0,
            "logps/chosen": -10.0,
            "logps/rejected": -12.0,
        }
        assert means.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(means[name], value, atol=1e-6, rtol=0, err_msg=name)


def test_starts_at_the_reference(dropout_model, tools):
    """T10: log 2, no reward, and a gradient; with dropout configured, which test_lm.py sees at work."""
    apply, params = dropout_model
    batch = tools.make_pairs(np.random.default_rng(0))

    batch = jax.jit(partial(add_reference, apply), compiler_options=tools.COMPILE_FAST)(params, batch)

    def total(params):
        loss = DPO()(apply, params, batch, jax.random.key(0))
        return loss.total, loss

    compiled = jax.jit(jax.value_and_grad(total, has_aux=True), compiler_options=tools.COMPILE_FAST)
    (_, loss), grads = compiled(params)
    np.testing.assert_allclose(loss.total / loss.weight, np.log(2), atol=1e-6, rtol=0)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        np.testing.assert_allclose(loss.metrics[name].total, 0, atol=1e-5)
    assert np.sqrt(sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(grads))) > 0.1


def test_reference_has_no_gradient(tools, lookup):
    apply, params = lookup
    batch = tools.make_pairs(np.random.default_rng(0))

    def total(reference):
        return DPO()(apply, params, dataclasses.replace(batch, reference_chosen=reference), None).total

    assert not np.any(jax.grad(total)(jnp.asarray(batch.reference_chosen)))


def test_every_loss_decreases_in_h():
    for name in LOSSES:
        slope = jax.grad(lambda a, name=name: preference_loss(a, 0.0, 1.0, 1.0, loss=name))(1.0)
        assert slope < 0, name


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"beta": 0.0}, "DPO.beta is 0.0; give it a number above 0"),
        ({"beta": float("nan")}, "DPO.beta is nan"),
        (
            {"label_smoothing": 0.5},
            "DPO.label_smoothing is 0.5; give it a number of at least 0 and below 0.5",
        ),
        ({"loss": "sigmoidal"}, "DPO.loss is 'sigmoidal'; choose one of 'sigmoid'"),
        ({"loss": "ipo", "label_smoothing": 0.1}, "which loss='ipo' does not use"),
    ],
)
def test_fields_are_checked(fields, message):
    with pytest.raises(ValueError, match=message):
        DPO(**fields)
