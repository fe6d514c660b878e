from __future__ import annotations

import jax
import numpy as np
import pytest

from jaxtrain.generate.decode import make_generator
from jaxtrain.generate.sampling import Sampling
from jaxtrain.generate.text import completion_ids, left_pad
from jaxtrain.models import DecoderConfig, build_model
from jaxtrain.objectives.common import token_logps
from jaxtrain.types import Tokens

V, N = 24, 9
CONFIG = DecoderConfig(
    vocab_size=V,
    num_layers=2,
    d_model=32,
    num_heads=4,
    num_kv_heads=2,
    d_ff=48,
    max_positions=24,
    init_std=0.3,
)
PROMPTS = [[5, 3, 9], [7], [1, 2, 3, 4, 5, 6], [9, 9], [8, 1, 4, 2], [3], [11, 12, 13, 14, 15], [2, 20]]


@pytest.fixture(scope="module")
def model():
    return build_model(CONFIG)


@pytest.fixture(scope="module")
def params(model):
    return model.init(jax.random.key(0))


@pytest.fixture(scope="module")
def teacher_forced(model):
    """Log-probabilities and logits of every completion from one forward pass without a cache, padded on the
    right.
    """

    @jax.jit
    def forward(params, tokens, temperature):
        logits = model.apply(params, tokens).logits
        return logits, token_logps(logits, tokens.targets, temperature)

    def score(params, completions, temperature=1.0):
        rows = [[*prompt, *completion] for prompt, completion in zip(PROMPTS, completions, strict=True)]
        ids = np.array([row + [0] * (CONFIG.max_positions - len(row)) for row in rows], np.int32)
        lengths = np.array([len(row) for row in rows])
        steps = np.arange(CONFIG.max_positions, dtype=np.int32)
        tokens = Tokens(
            ids=ids,
            targets=np.roll(ids, -1, axis=1),
            weights=np.zeros(ids.shape, np.float32),
            positions=np.tile(steps, (len(rows), 1)),
            segments=(steps < lengths[:, None]).astype(np.int32),
        )
        logits, logps = map(np.asarray, forward(params, tokens, temperature))
        actions = [slice(len(p) - 1, len(row) - 1) for p, row in zip(PROMPTS, rows, strict=True)]
        return [(logps[i, where], logits[i, where]) for i, where in enumerate(actions)]

    return score


@pytest.mark.smoke
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_decoding_equals_teacher_forcing_also_after_a_weight_update(model, params, teacher_forced, temperature):
    generate = make_generator(model, Sampling(temperature=temperature, stop_ids=(4, 17)), N)
    ids, lengths = left_pad(PROMPTS)
    perturbed = jax.tree.map(lambda x: x + 0.01 * jax.random.normal(jax.random.key(7), x.shape), params)
    logps = []
    for weights in (params, perturbed):
        generated = generate(weights, ids, lengths, jax.random.key(1))
        rows = completion_ids(generated)
        assert len({len(row) for row in rows}) > 1, "the rows must end at different steps"
        for row, (expected, _) in enumerate(teacher_forced(weights, rows, temperature)):
            np.testing.assert_allclose(generated.logps[row, : len(expected)], expected, atol=1e-5)
        logps.append(np.asarray(generated.logps))
    assert abs(logps[0] - logps[1]).max() > 1e-3, "the update must matter"


def test_a_row_is_the_same_alone_and_among_others(model, params):
    generate = make_generator(model, Sampling(stop_ids=(4,)), N)
    ids, lengths = left_pad(PROMPTS)
    together = generate(params, ids, lengths, jax.random.key(2))
    alone = generate(params, *left_pad(PROMPTS[:1]), jax.random.key(2))
    np.testing.assert_array_equal(together.ids[0], alone.ids[0])
    np.testing.assert_allclose(together.logps[0], alone.logps[0], atol=1e-5)
    # Other neighbours, more padding.
    changed, changed_lengths = left_pad([*PROMPTS[:4], *PROMPTS[:3:-1]], width=10)
    again = generate(params, changed, changed_lengths, jax.random.key(2))
    np.testing.assert_array_equal(together.ids[:4], again.ids[:4])
    np.testing.assert_allclose(together.logps[:4], again.logps[:4], atol=1e-5)
    assert (together.ids[4:] != again.ids[4:]).any()


def test_greedy_is_the_argmax_of_the_full_forward_pass(model, params, teacher_forced):
    generate = make_generator(model, Sampling(temperature=0.0), N)
    generated = generate(params, *left_pad(PROMPTS), jax.random.key(0))
    rows = completion_ids(generated)
    for row, (expected, logits) in enumerate(teacher_forced(params, rows)):
        assert logits.argmax(axis=-1).tolist() == rows[row]
        np.testing.assert_allclose(generated.logps[row], expected, atol=1e-5)


def test_stopping(model, params):
    free = make_generator(model, Sampling(), N)(params, *left_pad(PROMPTS), jax.random.key(3))
    assert free.lengths.tolist() == [N] * len(PROMPTS) and not free.stopped.any()
    stop = tuple(np.argsort(-np.bincount(np.asarray(free.ids).ravel()), stable=True)[:2].tolist())
    generated = make_generator(model, Sampling(stop_ids=stop), N)(params, *left_pad(PROMPTS), jax.random.key(3))
    seen = set()
    for row in range(len(PROMPTS)):
        whole = np.asarray(free.ids[row]).tolist()
        ends = [i for i, token in enumerate(whole) if token in stop]
        length = ends[0] + 1 if ends else N
        assert generated.lengths[row] == length and generated.stopped[row] == bool(ends)
        assert generated.ids[row].tolist() == whole[:length] + [0] * (N - length)
        assert (generated.logps[row, length:] == 0).all()
        seen.add(whole[length - 1] if ends else None)
    assert seen == {*stop, None}, "the seed must exercise both stop ids and a row cut off"


def test_decoding_ends_when_every_row_has_stopped(model, params):
    calls = []

    class Counting:
        config = model.config

        @staticmethod
        def apply(params, tokens, **kwargs):
            if tokens.ids.shape[1] == 1:
                jax.debug.callback(lambda: calls.append(1))
            return model.apply(params, tokens, **kwargs)

    ids, lengths = left_pad(PROMPTS[:2])
    stop = make_generator(Counting, Sampling(stop_ids=tuple(range(V))), N)
    generated = stop(params, ids, lengths, jax.random.key(0))
    jax.effects_barrier()
    assert generated.lengths.tolist() == [1, 1] and generated.stopped.all() and calls == []
    make_generator(Counting, Sampling(), N)(params, ids, lengths, jax.random.key(0))
    jax.effects_barrier()
    assert len(calls) == N - 1


def test_compiles_once_a_shape(model, params):
    generate = make_generator(model, Sampling(), 2)
    ids, lengths = left_pad(PROMPTS)
    for seed in range(3):
        generate(params, ids, lengths - (seed > 0) * (lengths > 1), jax.random.key(seed))
    assert generate._cache_size() == 1


def test_too_long_is_refused_before_anything_is_computed(model, params):
    traced = []

    class Watched:
        config = model.config

        @staticmethod
        def apply(params, tokens, **kwargs):
            traced.append(tokens.ids.shape)
            return model.apply(params, tokens, **kwargs)

    with pytest.raises(ValueError, match=r"6 tokens and 19 new ones make 25.*max_positions=24"):
        make_generator(Watched, Sampling(), 19)(params, *left_pad(PROMPTS), jax.random.key(0))
    assert traced == []
    fits = make_generator(Watched, Sampling(), 18)
    assert fits.eval_shape(params, *left_pad(PROMPTS), jax.random.key(0)).ids.shape == (len(PROMPTS), 18)
    assert traced


def test_bad_arguments_are_named(model):
    with pytest.raises(ValueError, match="max_new_tokens"):
        make_generator(model, Sampling(), 0)
    with pytest.raises(ValueError, match=r"stop_ids \[24\].*vocabulary of 24"):
        make_generator(model, Sampling(stop_ids=(3, 24)), 2)
