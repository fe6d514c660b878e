"""Rotary positions: the rotation itself, and the frequencies of every scaling."""

from __future__ import annotations

import dataclasses
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


@pytest.mark.parity
@pytest.mark.parametrize("fraction", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("name", ["linear", "llama3", "yarn"])
def test_frequencies_of_a_part_of_the_head_are_those_of_transformers(name, fraction):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope, parameters = SCALED[name]
    config = transformers.GlmConfig(
        head_dim=64,
        max_position_embeddings=int(rope.factor * (rope.original_max_positions or 256)),
        rope_parameters=parameters | {"rope_theta": rope.theta, "partial_rotary_factor": fraction},
    )
    inverse, factor = ROPE_INIT_FUNCTIONS[name](config, device="cpu")
    found, amplitude = inverse_wavelengths(dataclasses.replace(rope, fraction=fraction), 64)
    assert found.shape == (int(32 * fraction),)
    np.testing.assert_allclose(found, inverse.numpy(), rtol=2e-6)
    assert amplitude == pytest.approx(factor)


@pytest.mark.parity
@pytest.mark.parametrize("given", [{}, {"attention_factor": 1.7}, {"factor": 5.0}], ids=str)
def test_longrope_is_that_of_transformers(given):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    short, long = [1.0, 1.5, 2.0, 3.0, 4.5, 7.0], [1.0, 2.0, 5.0, 9.0, 20.0, 40.0]
    config = transformers.Phi3Config(
        hidden_size=32,
        num_attention_heads=2,
        original_max_position_embeddings=64,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "longrope", "short_factor": short, "long_factor": long, "rope_theta": 500.0}
        | {"partial_rotary_factor": 0.75}
        | given,
    )
    rope = Rope(theta=500.0, fraction=0.75, **LONGROPE | {"factor": 8.0} | given)
    for length, beyond in ((64, False), (65, True)):
        inverse, factor = ROPE_INIT_FUNCTIONS["longrope"](config, device="cpu", seq_len=length)
        found, amplitude = inverse_wavelengths(rope, 16, long=beyond)
        np.testing.assert_allclose(found, inverse.numpy(), rtol=2e-6)
        assert amplitude == pytest.approx(factor)


LONGROPE = {
    "scaling": "longrope",
    "original_max_positions": 64,
    "short_factor": (1.0, 1.5, 2.0, 3.0, 4.5, 7.0),
    "long_factor": (1.0, 2.0, 5.0, 9.0, 20.0, 40.0),
}


def test_longrope_asks_for_every_token_whether_its_text_is_long():
    rope, positions = Rope(fraction=0.75, factor=4.0, **LONGROPE), np.array([[3, 70], [3, 70]])
    long = np.array([[False, True], [True, False]])
    cos, sin = rope_tables(rope, positions, H, long_BT=long)
    amplitude = math.sqrt(1 + math.log(4) / math.log(64))
    for row, column in np.ndindex(2, 2):
        inverse, _ = inverse_wavelengths(rope, H, long=long[row, column])
        angles = positions[row, column] * inverse
        np.testing.assert_allclose(cos[row, column, 0], np.cos(angles) * amplitude, atol=1e-5)
        np.testing.assert_allclose(sin[row, column, 0], np.sin(angles) * amplitude, atol=1e-5)
    np.testing.assert_array_equal(rope_tables(rope, positions[:1], H, long_BT=long[1:, :1])[0][0, 1], cos[0, 1])
    with pytest.raises(ValueError, match="depends on the text's length, which Phi3Config alone looks at"):
        rope_tables(rope, positions, H)


def test_what_is_not_turned_stays():
    """The first quarter of a head is turned as a head of that size would be."""
    x = np.random.default_rng(0).normal(size=(1, 3, 2, H)).astype(np.float32)
    positions = np.array([[0, 5, 9]])
    out = np.asarray(apply_rope(x, *rope_tables(Rope(fraction=0.25), positions, H)))
    np.testing.assert_array_equal(out[..., 4:], x[..., 4:])
    np.testing.assert_array_equal(out[..., :4], apply_rope(x[..., :4], *rope_tables(Rope(), positions, 4)))
    assert np.abs(out[:, 1:, :, :4] - x[:, 1:, :, :4]).min() > 1e-3


def test_parts_of_heads_that_make_no_pairs_are_refused():
    with pytest.raises(ValueError, match=r"Rope.fraction=0.35 of head_dim=16 is 5 dimensions; it must be even"):
        Rope(fraction=0.35).rotary_dim(16)
    with pytest.raises(ValueError, match="have 6 divisors, but a head of 16 has 8 pairs to turn"):
        Rope(**LONGROPE).rotary_dim(16)


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
        ({"fraction": 0.0}, "Rope.fraction must be above 0 and at most 1, found 0.0"),
        ({"fraction": 1.5}, "Rope.fraction must be above 0 and at most 1, found 1.5"),
        (LONGROPE | {"original_max_positions": 0}, "'longrope' needs Rope.original_max_positions"),
        (LONGROPE | {"long_factor": ()}, "'longrope' needs Rope.long_factor: a positive divisor for every pair"),
        (LONGROPE | {"short_factor": (1.0, 0.0)}, "'longrope' needs Rope.short_factor: a positive divisor"),
        (LONGROPE | {"short_factor": (1.0, 2.0)}, "Rope.short_factor has 2 divisors, Rope.long_factor 6"),
        (
            LONGROPE | {"original_max_positions": 1, "factor": 2.0},
            "does not follow from Rope.original_max_positions = 1",
        ),
        ({"attention_factor": 1.1}, "belong to Rope.scaling 'longrope', found 'none'"),
        ({"short_factor": (1.0,)}, "belong to Rope.scaling 'longrope', found 'none'"),
    ],
)
def test_mistakes_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        Rope(**settings)
