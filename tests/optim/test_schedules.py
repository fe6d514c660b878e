"""Schedules against values computed by hand."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.optim import SCHEDULES, Constant, InverseSqrt, Linear, WarmupCosine, WarmupStableDecay


def values(schedule, total, steps):
    rate = schedule.build(total)
    return [float(rate(step)) for step in steps]


def test_warmup_starts_above_zero_and_ends_at_the_peak():
    got = values(Constant(peak=0.4, warmup_steps=4), 10, range(6))
    np.testing.assert_allclose(got, [0.1, 0.2, 0.3, 0.4, 0.4, 0.4], rtol=1e-6)


def test_no_warmup_starts_at_the_peak():
    for cls in SCHEDULES.values():
        assert values(cls(peak=0.3), 10, [0]) == pytest.approx([0.3])


def test_warmup_fraction_is_of_the_run():
    got = values(Constant(peak=1.0, warmup_fraction=0.25), 8, range(3))
    np.testing.assert_allclose(got, [0.5, 1.0, 1.0], rtol=1e-6)


def test_linear():
    # Decay from step 2 to step 6: (step - 2) / 4 of the way from 1 to 0.2.
    schedule = Linear(peak=1.0, warmup_steps=2, final_fraction=0.2)
    np.testing.assert_allclose(values(schedule, 6, range(8)), [0.5, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2, 0.2], rtol=1e-6)


def test_cosine():
    schedule = WarmupCosine(peak=2.0, warmup_steps=2, final_fraction=0.1)
    # Half way (step 6 of 2..10) the wave is 1/2; a quarter of the way it is (1 + cos 45 degrees) / 2.
    quarter = 2.0 * (0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2)
    got = values(schedule, 10, [0, 1, 2, 4, 6, 10, 11])
    np.testing.assert_allclose(got, [1.0, 2.0, 2.0, quarter, 1.1, 0.2, 0.2], rtol=1e-6)


@pytest.mark.parametrize(
    ("shape", "expected"),
    # Decay over steps 6..10, progress 0, 1/4, 1/2, 3/4 and then 1.
    [
        ("linear", [1.0, 0.75, 0.5, 0.25, 0.0]),
        ("sqrt", [1.0, 0.5, 1 - math.sqrt(0.5), 1 - math.sqrt(0.75), 0.0]),
    ],
)
def test_warmup_stable_decay(shape, expected):
    schedule = WarmupStableDecay(peak=1.0, warmup_steps=2, decay_fraction=0.4, decay_shape=shape)
    np.testing.assert_allclose(values(schedule, 10, range(6)), [0.5, 1, 1, 1, 1, 1], rtol=1e-6)
    np.testing.assert_allclose(values(schedule, 10, range(6, 11)), expected, rtol=1e-6, atol=1e-7)


def test_warmup_stable_decay_ends_at_the_final_fraction():
    schedule = WarmupStableDecay(peak=2.0, decay_fraction=1.0, decay_shape="linear", final_fraction=0.25)
    np.testing.assert_allclose(values(schedule, 4, range(5)), [2.0, 1.625, 1.25, 0.875, 0.5], rtol=1e-6)


def test_inverse_sqrt():
    got = values(InverseSqrt(peak=1.0, warmup_steps=4), 100, [0, 3, 4, 15, 63])
    np.testing.assert_allclose(got, [0.25, 1.0, math.sqrt(4 / 5), 0.5, 0.25], rtol=1e-6)
    np.testing.assert_allclose(values(InverseSqrt(peak=1.0), 100, [0, 3]), [1.0, 0.5], rtol=1e-6)


@pytest.mark.parametrize("name", SCHEDULES)
def test_traced_schedules_are_float32_scalars_equal_to_eager_ones(name):
    rate = SCHEDULES[name](peak=0.1, warmup_steps=3).build(20)
    got = jax.jit(jax.vmap(rate))(jnp.arange(20))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, [rate(step) for step in range(20)], rtol=1e-6)
    assert np.all(np.asarray(got) > 0), "every update of the run is of use"
    assert rate(jnp.int32(5)).shape == () and rate(5).dtype == jnp.float32


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Constant(peak=0.0), "Constant.peak is 0.0"),
        (lambda: Constant(peak=float("nan")), "Constant.peak is nan"),
        (lambda: Linear(peak=1.0, final_fraction=1.5), "Linear.final_fraction is 1.5"),
        (lambda: WarmupCosine(peak=1.0, warmup_steps=-1), "WarmupCosine.warmup_steps is -1"),
        (lambda: WarmupCosine(peak=1.0, warmup_steps=2, warmup_fraction=0.1), "give one of them"),
        (lambda: WarmupStableDecay(peak=1.0, decay_shape="cosine"), "decay_shape is 'cosine'"),
        (lambda: Constant(peak=1.0, warmup_steps=11).build(10), "more than the run's 10 steps"),
        (
            lambda: WarmupStableDecay(peak=1.0, warmup_steps=6, decay_fraction=0.5).build(10),
            "6 warm-up and 5 decay steps",
        ),
        (lambda: Constant(peak=1.0).build(0), "at least one step"),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
