"""LongRoPE in Phi-3: which texts are turned by which factors, whole, packed and through a cache."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.models import Phi3Config, Rope, build_model, init_cache
from jaxtrain.models.cache import insert
from jaxtrain.models.phi3 import text_lengths
from jaxtrain.types import Tokens

V, ORIGINAL = 23, 6
SHORT, LONG = (1.0, 1.5, 2.0), (3.0, 1.0, 0.5)
ROPE = Rope(
    theta=50.0,
    fraction=0.75,
    scaling="longrope",
    factor=4.0,
    original_max_positions=ORIGINAL,
    short_factor=SHORT,
    long_factor=LONG,
)
BASE = Phi3Config(
    vocab_size=V, num_layers=2, d_model=16, num_heads=2, num_kv_heads=1, d_ff=24, max_positions=24, rope=ROPE
)


def borderless(config, factors):
    """The same model, with the same factors for texts of every length."""
    return dataclasses.replace(config, rope=dataclasses.replace(ROPE, short_factor=factors, long_factor=factors))


def random_params(config):
    rng = np.random.default_rng(1)
    shapes = build_model(config).shapes()
    return jax.tree.map(lambda x: jnp.asarray(0.5 * rng.normal(size=x.shape), x.dtype), shapes)


def tokens_of(ids, positions, segments):
    ids, positions, segments = (np.asarray(x, np.int32) for x in (ids, positions, segments))
    return Tokens(ids=ids, targets=ids, weights=segments * 1.0, positions=positions, segments=segments)


def whole(config, params, texts):
    """Logits ``[T, V]`` of each text, all in one call."""
    ids = np.zeros((len(texts), 16), np.int32)
    for row, text in zip(ids, texts, strict=True):
        row[: len(text)] = text
    segments = (np.arange(16) < np.array([[len(text)] for text in texts])).astype(np.int32)
    out = apply_of(config)(params, tokens_of(ids, np.arange(16) * segments, segments))
    return [np.asarray(logits[: len(text)]) for logits, text in zip(out.logits, texts, strict=True)]


@functools.cache
def apply_of(config):
    model = build_model(config)
    return jax.jit(lambda params, tokens, cache=None: model.apply(params, tokens, cache=cache))


def ids_of(rows, length):
    return np.random.default_rng(0).integers(1, V, (rows, length)).astype(np.int32)


@pytest.mark.smoke
def test_the_length_of_a_text_chooses_its_factors():
    """Three texts packed into a row: the middle one alone is longer than the original context."""
    lengths = (ORIGINAL, ORIGINAL + 1, 3)
    ids = ids_of(1, sum(lengths) + 2)
    segments = np.concatenate([np.full(n, i + 1) for i, n in enumerate(lengths)] + [[0, 0]])[None]
    positions = np.concatenate([np.arange(n) for n in lengths] + [[0, 0]])[None]
    assert text_lengths(positions, segments).tolist() == [[6] * 6 + [7] * 7 + [3] * 3 + [0] * 2]
    params = random_params(BASE)
    packed = np.split(apply_of(BASE)(params, tokens_of(ids, positions, segments)).logits[0], np.cumsum(lengths))
    texts = np.split(ids[0], np.cumsum(lengths))[:-1]
    short, long = (whole(borderless(BASE, factors), params, texts) for factors in (SHORT, LONG))
    wanted, others = (short[0], long[1], short[2]), (long[0], short[1], long[2])
    for found, want, other in zip(packed[:3], wanted, others, strict=True):
        np.testing.assert_allclose(found, want, atol=1e-5)
        assert np.abs(found - other).max() > 1e-2


def decode(config, params, ids, lengths, steps, capacity):
    """Right-padded prompts read at once into rows of a cache, then token by token: logits ``[B, 1 + steps, V]``."""
    apply = functools.partial(apply_of(config), params)
    B, prompt = ids.shape[0], max(lengths)
    lengths = np.asarray(lengths)
    segments = (np.arange(prompt) < lengths[:, None]).astype(np.int32)
    positions = np.arange(prompt) * segments
    out = apply(tokens_of(ids[:, :prompt] * segments, positions, segments), init_cache(config, B, 0))
    cache = insert(init_cache(config, B, capacity), jnp.arange(B), out.cache)
    found = [np.asarray(out.logits)[np.arange(B), lengths - 1]]
    for step in range(steps):
        at = (lengths + step)[:, None]
        out = apply(tokens_of(np.take_along_axis(ids, at, axis=1), at, np.ones_like(at)), cache)
        cache = out.cache
        found.append(np.asarray(out.logits[:, 0]))
    return np.stack(found, axis=1)


@pytest.mark.parametrize("window", [0, 4])
@pytest.mark.parametrize(("lengths", "steps"), [((1, 3, 2), 3), ((7, 12, 9), 4)], ids=["within", "beyond"])
def test_decoding_gives_what_the_whole_text_gives_on_either_side(lengths, steps, window):
    """In a cache with room for far longer texts."""
    config = dataclasses.replace(BASE, window=window)
    params = random_params(config)
    ids = ids_of(len(lengths), max(lengths) + steps)
    found = decode(config, params, ids, lengths, steps, capacity=24)
    texts = whole(config, params, [row[: length + steps] for row, length in zip(ids, lengths, strict=True)])
    for row, length, text in zip(found, lengths, texts, strict=True):
        np.testing.assert_allclose(row, text[length - 1 :], atol=1e-5)


@pytest.mark.parametrize("window", [0, 4])
def test_a_text_that_crosses_the_border_is_turned_anew(window):
    """With one layer, where nothing but keys remembers earlier tokens: every step is that of the text so far."""
    config = dataclasses.replace(BASE, num_layers=1, window=window)
    params = random_params(config)
    ids = ids_of(2, 11)
    found = decode(config, params, ids, (3, 5), 6, capacity=11)
    for row, length in ((0, 3), (1, 5)):
        so_far = whole(config, params, [ids[row, : length + step] for step in range(7)])
        np.testing.assert_allclose(found[row], [text[-1] for text in so_far], atol=1e-5)


def test_a_prompt_read_in_parts():
    """The second part has old keys to turn, under the factors of the text with it."""
    config = dataclasses.replace(BASE, num_layers=1)
    params = random_params(config)
    ids, cache = ids_of(1, 10), init_cache(config, 1, 12)
    for start, end in ((0, 4), (4, 10)):
        positions = np.arange(start, end)[None]
        out = apply_of(config)(params, tokens_of(ids[:, start:end], positions, np.ones_like(positions)), cache)
        cache = out.cache
        np.testing.assert_allclose(out.logits[0], whole(config, params, ids[:, :end])[0][start:], atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "count"),
    [
        ({"vocab_size": 32064, "num_heads": 32, "num_kv_heads": 32}, 3_821_079_552),
        ({"vocab_size": 200064, "num_heads": 24, "num_kv_heads": 8, "tie_embeddings": True}, 3_836_021_760),
    ],
    ids=["Phi-3-mini", "Phi-4-mini"],
)
def test_published_sizes_give_published_counts(changes, count):
    config = Phi3Config(num_layers=32, d_model=3072, d_ff=8192, max_positions=4096, **changes)
    assert build_model(config).num_params() == count


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": -1}, "window must be 0"),
        ({"head_dim": 16}, "have 3 divisors, but a head of 16 has 6 pairs"),
        ({"rope": Rope(fraction=0.4)}, r"Rope.fraction=0.4 of head_dim=8 is 3 dimensions; it must be even"),
    ],
)
def test_mistakes_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(BASE, **changes)
