"""Rotary positions: the rotation itself, and the frequencies of every scaling."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.models.rope import Rope, apply_rope, inverse_wavelengths, rope_tables

H = 16
SCALED = {
    "none": (Rope(), {"rope_type": "default"}),
    "linear": (Rope(scaling="linear", factor=4.0), {"rope_type": "linear", "factor": 4.0}),
    "llama3": (
        Rope(theta=500_000.0, scaling="llama3", factor=8.0, original_max_positions=512),
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "original_max_position_embeddings": 512,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        },
    ),
    "yarn": (
        Rope(scaling="yarn", factor=4.0, original_max_positions=256),
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 256,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
        },
    ),
}


@pytest.mark.parity
@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize("name", ["linear", "llama3", "yarn"])
def test_frequencies_are_those_of_transformers(name, head_dim):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope, parameters = SCALED[name]
    config = transformers.LlamaConfig(
        hidden_size=head_dim * 2,
        num_attention_heads=2,
        head_dim=head_dim,
        max_position_embeddings=int(rope.factor * (rope.original_max_positions or 256)),
        rope_parameters=parameters | {"rope_theta": rope.theta},
    )
    inverse, factor = ROPE_INIT_FUNCTIONS[name](config, device="cpu")
    found, amplitude = inverse_wavelengths(rope, head_dim)
    np.testing.assert_allclose(found, inverse.numpy(), rtol=2e-6)
    assert amplitude == pytest.approx(factor)


@pytest.mark.smoke
def test_frequencies_by_hand():
    plain = 10000.0 ** -(np.arange(0, H, 2) / H)
    np.testing.assert_allclose(inverse_wavelengths(Rope(), H)[0], plain)
    np.testing.assert_allclose(inverse_wavelengths(SCALED["linear"][0], H)[0], plain / 4)
    ntk = Rope(scaling="ntk", factor=3.0)
    found, amplitude = inverse_wavelengths(ntk, H)
    np.testing.assert_allclose(found, (10000 * 3 ** (H / (H - 2))) ** -(np.arange(0, H, 2) / H))
    # The fastest pair keeps its frequency, and the slowest is stretched by the factor exactly.
    assert found[0] == 1 and found[-1] == pytest.approx(plain[-1] / 3) and amplitude == 1
    llama3, _ = inverse_wavelengths(SCALED["llama3"][0], H)
    original = 500_000.0 ** -(np.arange(0, H, 2) / H)
    assert llama3[0] == original[0] and llama3[-1] == pytest.approx(original[-1] / 8)
    assert inverse_wavelengths(SCALED["yarn"][0], H)[1] == pytest.approx(0.1 * math.log(4) + 1)


@pytest.mark.parametrize("rope", [rope for rope, _ in SCALED.values()], ids=SCALED)
def test_pairs_are_turned_by_their_angle(rope):
    """Against complex multiplication: pair i is dimensions i and i + H/2."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 5, 3, H)).astype(np.float32)
    positions = rng.integers(0, 300, (2, 5)).astype(np.int32)
    out = np.asarray(apply_rope(x, *rope_tables(rope, positions, H)))
    inverse, amplitude = inverse_wavelengths(rope, H)
    numbers = x[..., : H // 2] + 1j * x[..., H // 2 :]
    numbers = numbers * amplitude * np.exp(1j * positions[..., None, None] * inverse)
    np.testing.assert_allclose(out, np.concatenate([numbers.real, numbers.imag], -1), atol=3e-4)
    if rope.scaling == "none":
        np.testing.assert_allclose(np.linalg.norm(out, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-5)


def test_scores_depend_on_distance_alone():
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(2, 1, 1, 1, H)).astype(np.float32)

    def score(i, j):
        at = [rope_tables(Rope(), jnp.full((1, 1), n), H) for n in (i, j)]
        return float(jnp.sum(apply_rope(q, *at[0]) * apply_rope(k, *at[1])))

    assert score(7, 3) == pytest.approx(score(107, 103), abs=1e-4)
    assert abs(score(7, 3) - score(8, 3)) > 1e-2


def test_angles_are_float32_whatever_the_input():
    x = jnp.ones((1, 1, 1, H), jnp.bfloat16)
    cos, sin = rope_tables(Rope(), jnp.full((1, 1), 4001), H)
    assert cos.dtype == sin.dtype == jnp.float32
    assert float(cos[0, 0, 0, 0]) == pytest.approx(math.cos(4001), abs=1e-3)
    assert apply_rope(x, cos, sin).dtype == jnp.bfloat16
    assert cos.shape == (1, 1, 1, H // 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scaling": "dynamic"}, "Rope.scaling is 'dynamic'; one of"),
        ({"theta": 0.0}, "theta > 0 and factor >= 1, found 0.0 and 1.0"),
        ({"scaling": "linear", "factor": 0.5}, "found 10000.0 and 0.5"),
        ({"factor": 2.0}, "Rope.factor is 2.0, but Rope.scaling is 'none'"),
        ({"scaling": "yarn", "factor": 2.0}, "'yarn' needs Rope.original_max_positions"),
    ],
)
def test_mistakes_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        Rope(**settings)
