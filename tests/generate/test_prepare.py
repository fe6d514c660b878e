"""Parameters as decoding reads them, in the compute type and in 8 bits."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.generate.engine import Engine, sequence_keys
from jaxtrain.generate.sampling import Sampling
from jaxtrain.models import build_model
from jaxtrain.models.int8 import Int8, quantize
from jaxtrain.models.layers import contract
from jaxtrain.types import Tokens

PROMPTS = [[5, 3, 9], [7], [1, 2, 3, 4, 5, 6]]


def test_quantize_by_hand():
    kernel = np.array([[[1.0, 0.0]], [[-2.54, 0.0]], [[0.013, 0.0]]])  # [3, 1, 2]: one input, two outputs
    held = quantize(kernel, 1)
    assert held.values.dtype == jnp.int8 and held.shape == (3, 1, 2) and held.scales.shape == (1, 2)
    np.testing.assert_allclose(held.scales, [[0.02, 1.0]], rtol=1e-6)
    assert held.values[..., 0].tolist() == [[50], [-127], [1]] and not held.values[..., 1].any()


@pytest.mark.parametrize("inputs", [1, 2])
def test_a_product_is_that_of_the_matrix_held(inputs):
    kernel = jax.random.normal(jax.random.key(0), (6, 4, 5))
    x = jax.random.normal(jax.random.key(1), (3, *kernel.shape[:inputs]))
    held = quantize(kernel, inputs)
    whole = held.values * held.scales
    assert float(jnp.abs(whole - kernel).max()) <= float(held.scales.max()) / 2 + 1e-6
    np.testing.assert_allclose(contract(x, held, inputs), contract(x, whole, inputs), rtol=1e-5, atol=1e-5)


def test_matrices_are_in_the_compute_type_and_norms_as_they_were(model, params):
    half = build_model(dataclasses.replace(model.config, compute_dtype="bfloat16"))
    prepared = Engine(half, Sampling()).prepare(params)
    assert len(prepared["layers"]) == model.config.num_layers
    layer = prepared["layers"][1]
    assert layer["mlp"]["up"]["kernel"].dtype == jnp.bfloat16 == prepared["embed"]["embedding"].dtype
    assert layer["mlp_norm"]["scale"].dtype == jnp.float32 == prepared["final_norm"]["scale"].dtype
    np.testing.assert_array_equal(
        layer["mlp"]["up"]["kernel"], params["layers"]["mlp"]["up"]["kernel"][1].astype("bfloat16")
    )


@pytest.mark.parametrize("tied", [True, False])
def test_int8_is_the_model_of_the_held_matrices(model, tied, teacher_forced):
    """Log-probabilities are exactly those of a model whose matrices are the quantised ones, and near the original's."""
    model = build_model(dataclasses.replace(model.config, tie_embeddings=tied))
    params = model.init(jax.random.key(0))
    engine = Engine(model, Sampling(), int8=True)
    prepared = engine.prepare(params)
    held = [x for x in jax.tree.leaves(prepared, is_leaf=lambda x: isinstance(x, Int8)) if isinstance(x, Int8)]
    assert len(held) == 7 * model.config.num_layers + 1
    written = engine.generate(prepared, PROMPTS, max_new_tokens=12, keys=sequence_keys(range(3)))
    ids = [one.ids.tolist() for one in written]

    def whole(path, leaf):
        keys = [key.key for key in path]
        if keys[-1] != "kernel":
            return leaf
        stacked = keys[0] == "layers"
        inputs = 2 if "out" in keys else 1
        one = lambda kernel: (lambda q: q.values * q.scales)(quantize(kernel, inputs))  # noqa: E731
        return jax.vmap(one)(leaf) if stacked else one(leaf)

    dequantised = jax.tree_util.tree_map_with_path(whole, params)
    if tied:
        untied = build_model(dataclasses.replace(model.config, tie_embeddings=False))
        head = quantize(params["embed"]["embedding"].T, 1)
        same = teacher_forced(untied, dequantised | {"lm_head": {"kernel": head.values * head.scales}}, PROMPTS, ids)
    else:
        same = teacher_forced(model, dequantised, PROMPTS, ids)
    original = teacher_forced(model, params, PROMPTS, ids)
    far = 0.0
    for one, (logps, _), (exact, _) in zip(written, same, original, strict=True):
        np.testing.assert_allclose(one.logps, logps, atol=2e-5)
        far = max(far, float(np.abs(one.logps - exact).max()))
    assert 1e-4 < far < 0.3


def test_the_models_own_logits_of_some_positions(model, params):
    ids = np.array([[1, 2, 3, 4]], np.int32)
    tokens = Tokens(ids=ids, targets=ids, weights=ids * 0.0, positions=np.arange(4)[None], segments=np.ones_like(ids))
    outputs = model.apply(params, tokens)
    np.testing.assert_allclose(model.logits(params, outputs.hidden[:, 2]), outputs.logits[:, 2], atol=1e-5)
