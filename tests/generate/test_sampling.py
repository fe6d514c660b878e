from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.generate.sampling import Sampling, filter_logits, sample

P = np.array([0.1, 0.4, 0.05, 0.25, 0.2])  # ids by probability: 1, 3, 4, 0, 2


def kept(probabilities, **settings) -> list[int]:
    logits = jnp.log(jnp.asarray(probabilities, jnp.float32))[None]
    return np.flatnonzero(np.isfinite(filter_logits(logits, Sampling(**settings))[0])).tolist()


@pytest.mark.parametrize(
    ("settings", "ids"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"top_k": 1}, [1]),
        ({"top_k": 3}, [1, 3, 4]),
        ({"top_k": 9}, [0, 1, 2, 3, 4]),
        ({"top_p": 0.39}, [1]),
        ({"top_p": 0.41}, [1, 3]),
        ({"top_p": 0.66}, [1, 3, 4]),
        ({"top_p": 1e-9}, [1]),
        # Of the top 3, renormalised: 0.4/0.85 = 0.47, 0.25/0.85 = 0.29, 0.2/0.85 = 0.24.
        ({"top_k": 3, "top_p": 0.7}, [1, 3]),
        ({"top_k": 3, "top_p": 0.78}, [1, 3, 4]),
        # At temperature 0.5 probabilities are squared: 0.16/0.275 = 0.58, 0.0625/0.275 = 0.23, ...
        ({"temperature": 0.5, "top_p": 0.57}, [1]),
        ({"temperature": 0.5, "top_p": 0.8}, [1, 3]),
    ],
)
def test_filters_by_hand(settings, ids):
    assert kept(P, **settings) == ids


def test_ties_go_to_the_lower_id():
    tied = [0.2, 0.3, 0.2, 0.1, 0.2]
    assert kept(tied, top_k=2) == [0, 1]
    assert kept(tied, top_k=3) == [0, 1, 2]
    assert kept(tied, top_p=0.45) == [0, 1]
    assert kept(tied, top_p=0.65) == [0, 1, 2]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.7},
        {"top_k": 3},
        {"top_p": 0.6},
        {"temperature": 2.0, "top_k": 4, "top_p": 0.8},
    ],
)
def test_frequencies_and_logps_are_those_of_the_filtered_distribution(settings):
    sampling = Sampling(**settings)
    count = 20_000
    logits = jnp.tile(jnp.log(jnp.asarray(P, jnp.float32)) + 5.0, (count, 1))
    ids, logps = jax.jit(lambda key: sample(key, logits, sampling))(jax.random.key(1))
    assert ids.dtype == jnp.int32 and logps.dtype == jnp.float32

    # The distribution, computed anew in float64.
    expected = P ** (1 / sampling.temperature)
    expected /= expected.sum()
    order = np.argsort(-expected)
    keep = order[: sampling.top_k or None]
    within = expected[keep] / expected[keep].sum()
    keep = keep[: np.searchsorted(np.cumsum(within), sampling.top_p) + 1]
    expected = np.where(np.isin(np.arange(len(P)), keep), expected, 0)
    expected /= expected.sum()

    observed = np.bincount(np.asarray(ids), minlength=len(P))
    assert observed[expected == 0].sum() == 0
    possible = expected > 0
    chi_square = ((observed - count * expected)[possible] ** 2 / (count * expected[possible])).sum()
    assert chi_square < 20  # 4 degrees of freedom exceed it once in 2,000 times
    np.testing.assert_allclose(logps, np.log(expected[np.asarray(ids)]), atol=1e-5)


def test_greedy_takes_the_likeliest_with_its_plain_logp():
    logits = jnp.log(jnp.asarray([P, P[::-1]], jnp.float32))
    ids, logps = sample(jax.random.key(0), logits, Sampling(temperature=0.0, top_k=2))
    assert ids.tolist() == [1, 3]
    np.testing.assert_allclose(logps, np.log([0.4, 0.4]), atol=1e-6)


def test_a_rows_draw_depends_on_no_other_row():
    logits = jax.random.normal(jax.random.key(3), (8, 50))
    other = logits.at[4:].set(jax.random.normal(jax.random.key(4), (4, 50)))
    key = jax.random.key(5)
    ids, logps = sample(key, logits, Sampling())
    ids_other, _ = sample(key, other, Sampling())
    ids_few, logps_few = sample(key, logits[:3], Sampling())
    assert (ids[:4] == ids_other[:4]).all() and (ids[4:] != ids_other[4:]).any()
    assert (ids[:3] == ids_few).all() and (logps[:3] == logps_few).all()


def test_bfloat16_logits_are_scored_in_float32():
    logits = jnp.asarray([[0.0, 1.0, 2.0]], jnp.bfloat16)
    ids, logps = sample(jax.random.key(0), logits, Sampling(temperature=0.7))
    exact = np.array([0.0, 1.0, 2.0]) / 0.7
    exact -= np.log(np.exp(exact).sum())
    assert logps.dtype == jnp.float32
    np.testing.assert_allclose(logps, exact[np.asarray(ids)], atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"stop_ids": (3, -1)}, "stop_ids"),
        ({"stop_ids": ("<eos>",)}, "stop_ids"),
    ],
)
def test_bad_settings_are_named(settings, named):
    with pytest.raises(ValueError, match=f"Sampling.{named}"):
        Sampling(**settings)
