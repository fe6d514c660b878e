from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.generate import sampling as module
from jaxtrain.generate.sampling import Sampling, draw, greedy, likeliest

P = np.array([0.1, 0.4, 0.05, 0.25, 0.2])  # ids by probability: 1, 3, 4, 0, 2


sample = jax.jit(module.sample, static_argnames="sampling")


def keys(count: int, seed: int = 0):
    return jax.random.split(jax.random.key(seed), count)


def kept(probabilities, count: int = 400, **settings) -> list[int]:
    """The ids that are ever sampled; no allowed one of P has less than 0.05 of the mass."""
    logits = jnp.log(jnp.asarray(probabilities, jnp.float32))
    ids, _ = sample(keys(count), jnp.tile(logits, (count, 1)), Sampling(**settings))
    return sorted(set(np.asarray(ids).tolist()))


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
        # 0.5 of the likeliest is 0.2; of squares, 0.3 of 0.16 is 0.048.
        ({"min_p": 0.49}, [1, 3, 4]),
        ({"min_p": 0.51}, [1, 3]),
        ({"min_p": 1.0}, [1]),
        ({"temperature": 0.5, "min_p": 0.3}, [1, 3]),
        ({"top_k": 4, "min_p": 0.49}, [1, 3, 4]),
        ({"top_p": 0.41, "min_p": 0.3}, [1, 3]),
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
        {"temperature": 2.0, "min_p": 0.6},
    ],
)
def test_frequencies_and_logps_are_those_of_the_filtered_distribution(settings):
    sampling = Sampling(**settings)
    count = 20_000
    logits = jnp.tile(jnp.log(jnp.asarray(P, jnp.float32)) + 5.0, (count, 1))
    ids, logps = sample(keys(count, 1), logits, sampling)
    assert ids.dtype == jnp.int32 and logps.dtype == jnp.float32

    # The distribution, computed anew in float64.
    expected = P ** (1 / sampling.temperature)
    expected /= expected.sum()
    order = np.argsort(-expected)
    keep = order[: sampling.top_k or None]
    within = expected[keep] / expected[keep].sum()
    keep = keep[: np.searchsorted(np.cumsum(within), sampling.top_p) + 1]
    keep = keep[expected[keep] >= sampling.min_p * expected.max()]
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
    ids, logps = sample(keys(2), logits, Sampling(temperature=0.0, top_k=2))
    assert ids.tolist() == [1, 3]
    np.testing.assert_allclose(logps, np.log([0.4, 0.4]), atol=1e-6)


def test_a_rows_draw_depends_on_no_other_row():
    logits = jax.random.normal(jax.random.key(3), (8, 50))
    other = logits.at[4:].set(jax.random.normal(jax.random.key(4), (4, 50)))
    ids, logps = sample(keys(8), logits, Sampling())
    ids_other, _ = sample(keys(8), other, Sampling())
    ids_few, logps_few = sample(keys(8)[:3], logits[:3], Sampling())
    assert (ids[:4] == ids_other[:4]).all() and (ids[4:] != ids_other[4:]).any()
    assert (ids[:3] == ids_few).all() and (logps[:3] == logps_few).all()


def test_bfloat16_logits_are_scored_in_float32():
    logits = jnp.asarray([[0.0, 1.0, 2.0]], jnp.bfloat16)
    ids, logps = sample(keys(1), logits, Sampling(temperature=0.7))
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
        ({"min_p": -0.1}, "min_p"),
        ({"min_p": 1.1}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty"),
        ({"stop_ids": (3, -1)}, "stop_ids"),
        ({"stop_ids": ("<eos>",)}, "stop_ids"),
    ],
)
def test_bad_settings_are_named(settings, named):
    with pytest.raises(ValueError, match=f"Sampling.{named}"):
        Sampling(**settings)


def test_large_vocabularies_are_drawn_from_as_they_should_be():
    """Several pieces, the last one incomplete: the frequency of every tenth of the mass, and of each piece."""
    V, count = 3 * module.PIECE + 17, 20_000
    logits = 2.0 * jax.random.normal(jax.random.key(1), (V,))
    ids = np.asarray(jax.jit(draw)(keys(count, 2), jnp.tile(logits, (count, 1))))
    p = np.exp(np.asarray(logits, np.float64))
    p /= p.sum()
    for groups in (np.arange(V) // module.PIECE, np.unique((np.cumsum(p) * 9.99).astype(int), return_inverse=True)[1]):
        expected = count * np.bincount(groups, weights=p)
        observed = np.bincount(groups[ids], minlength=len(expected))
        chi_square = ((observed - expected) ** 2 / expected).sum()
        assert chi_square < 35  # 9 degrees of freedom exceed it once in 10,000 times


def test_what_cannot_occur_is_never_drawn():
    logits = jnp.full((64, 2 * module.PIECE), -jnp.inf).at[:, 300].set(-5.0).at[:, 511].set(-90.0)
    assert set(np.asarray(draw(keys(64), logits)).tolist()) == {300}
    for uniform in (0.0, 0.5, np.nextafter(np.float32(1), np.float32(0))):
        weights = jnp.asarray([[0.0, 0.0, 0.3, 0.1, 0.0, 0.2, 0.0]])
        assert int(module._invert(weights, jnp.asarray([uniform]))[0]) == {0.0: 2, 0.5: 3}.get(float(uniform), 5)


def test_greedy_takes_the_first_of_equals_across_pieces():
    logits = jnp.zeros((3, 2 * module.PIECE + 5)).at[0, 300].set(1.0).at[0, 400].set(1.0).at[1, 516].set(2.0)
    assert greedy(logits).tolist() == [300, 516, 0]


@pytest.mark.parametrize("settings", [{"top_p": 0.9}, {"top_p": 0.97, "min_p": 0.001, "temperature": 1.5}])
def test_top_p_of_a_wide_window_is_top_p_of_all(settings, monkeypatch):
    """A row whose mass lies in few ids, beside one that needs them all: alone or together, windows or not."""
    V = 2000
    logits = jax.random.normal(jax.random.key(1), (2, V)) * jnp.asarray([[8.0], [0.1]])
    logits = jnp.repeat(logits, 50, axis=0)
    sampling = Sampling(**settings)
    together, logps = sample(keys(100), logits, sampling)
    narrow, narrow_logps = sample(keys(100)[:50], logits[:50], sampling)
    monkeypatch.setattr(module, "WINDOWS", ())
    everything, all_logps = jax.jit(lambda keys: module.sample(keys, logits, sampling))(keys(100))
    np.testing.assert_array_equal(together, everything)
    np.testing.assert_array_equal(together[:50], narrow)
    np.testing.assert_allclose(logps, all_logps, atol=1e-5)
    np.testing.assert_allclose(logps[:50], narrow_logps, atol=1e-5)
    assert len(set(np.asarray(together[50:]).tolist())) > 40 > len(set(np.asarray(narrow).tolist()))


def test_repetition_penalty_by_hand():
    """Positive logits are divided, negative ones multiplied, of ids that were seen."""
    logits = jnp.asarray([[2.0, 1.5, -1.0, -1.2]])
    seen = jnp.asarray([[True, False, True, False]])
    ids, logps = sample(keys(1), logits, Sampling(temperature=0.0, repetition_penalty=2.0), seen)
    penalised = np.array([1.0, 1.5, -2.0, -1.2])
    assert ids.tolist() == [1]
    np.testing.assert_allclose(logps, [1.5 - np.log(np.exp(penalised).sum())], atol=1e-6)


@pytest.mark.parity
def test_rules_agree_with_transformers():
    """The same ids are kept, with the same probabilities, where every rule is used at once."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    V, count = 60, 3000
    rng = np.random.default_rng(0)
    logits, prompt = 3 * rng.standard_normal(V).astype(np.float32), rng.integers(0, V, 12)
    processors = transformers.LogitsProcessorList(
        [
            transformers.RepetitionPenaltyLogitsProcessor(1.4),
            transformers.TemperatureLogitsWarper(0.8),
            transformers.TopKLogitsWarper(25),
            transformers.TopPLogitsWarper(0.95),
            transformers.MinPLogitsWarper(0.02),
        ]
    )
    theirs = torch.log_softmax(processors(torch.tensor(prompt[None]), torch.tensor(logits[None])), -1)[0].numpy()
    seen = np.zeros((count, V), bool)
    seen[:, prompt] = True
    sampling = Sampling(temperature=0.8, top_k=25, top_p=0.95, min_p=0.02, repetition_penalty=1.4)
    ids, logps = sample(keys(count), jnp.tile(logits, (count, 1)), sampling, seen)
    np.testing.assert_allclose(logps, theirs[np.asarray(ids)], atol=1e-5)
    likely = set(np.flatnonzero(theirs > np.log(0.005)).tolist())
    assert likely <= set(np.asarray(ids).tolist()) <= set(np.flatnonzero(np.isfinite(theirs)).tolist())


def test_likeliest_by_hand():
    logits = jnp.log(jnp.asarray([P, P[::-1]], jnp.float32)) + 3.0
    probs, ids, top = likeliest(logits, jnp.asarray([2, 0]), 3)
    np.testing.assert_allclose(probs, [0.05, 0.2], rtol=1e-5)
    assert ids.tolist() == [[1, 3, 4], [3, 1, 0]]
    np.testing.assert_allclose(top, [[0.4, 0.25, 0.2]] * 2, rtol=1e-5)
    assert likeliest(logits, jnp.asarray([2, 0]), 99)[1].shape == (2, 5)
