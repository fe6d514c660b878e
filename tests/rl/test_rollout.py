from __future__ import annotations

import jax
import numpy as np
import pytest

from jaxtrain.generate.sampling import Sampling
from jaxtrain.models import DecoderConfig, build_model
from jaxtrain.rl.rollout import (
    Generated,
    PromptBatch,
    check_gate,
    completion_tokens,
    gate_difference,
    make_sampler,
    sampler_logps,
    score,
    take_rows,
)
from jaxtrain.types import Rollout

PROMPTS = PromptBatch(ids=np.array([[0, 5, 6], [7, 8, 9], [0, 0, 3]], np.int32), lengths=np.array([2, 3, 1], np.int32))
GENERATED = Generated(
    ids=np.array([[4, 0, 0, 0], [1, 2, 3, 0], [0, 0, 2, 1]], np.int32),  # id 0 may be sampled
    logps=np.array([[-1.0, 0, 0, 0], [-2, -3, -4, 0], [-5, -6, -7, -8]], np.float32),
    lengths=np.array([1, 3, 4], np.int32),
    stopped=np.array([True, True, False]),
)


def test_rows_are_the_sampled_ids_by_hand():
    tokens = completion_tokens(PROMPTS, GENERATED)
    assert tokens.ids.tolist() == [[0, 5, 6, 4, 0, 0, 0], [7, 8, 9, 1, 2, 3, 0], [0, 0, 3, 0, 0, 2, 1]]
    assert tokens.targets.tolist() == [[5, 6, 4, 0, 0, 0, 0], [8, 9, 1, 2, 3, 0, 0], [0, 3, 0, 0, 2, 1, 0]]
    assert tokens.weights.tolist() == [[0, 0, 1, 0, 0, 0, 0], [0, 0, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1, 0]]
    assert tokens.positions.tolist() == [[0, 0, 1, 2, 0, 0, 0], [0, 1, 2, 3, 4, 5, 0], [0, 0, 0, 1, 2, 3, 4]]
    assert tokens.segments.tolist() == [[0, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1, 1]]
    assert {x.dtype for x in (tokens.ids, tokens.targets, tokens.positions, tokens.segments)} == {np.dtype(np.int32)}
    assert tokens.weights.dtype == np.float32
    assert sampler_logps(GENERATED, tokens).tolist() == [
        [0, 0, -1, 0, 0, 0, 0], [0, 0, -2, -3, -4, 0, 0], [0, 0, -5, -6, -7, -8, 0],
    ]  # fmt: skip


def test_filled_rows_have_no_weight():
    tokens = completion_tokens(PROMPTS, GENERATED)
    numbers = np.arange(21, dtype=np.float32).reshape(3, 7)
    rollout = Rollout(
        tokens=tokens,
        old_logps=numbers,
        reference_logps=numbers,
        advantages=numbers,
        returns=numbers,
        old_values=numbers,
    )
    taken = take_rows(rollout, np.array([2, 1]), 4)
    assert taken.tokens.weights.sum(axis=1).tolist() == [4, 3, 0, 0]
    assert taken.old_logps[:, 0].tolist() == [14, 7, 14, 14]
    assert taken.tokens.ids[0].tolist() == tokens.ids[2].tolist()


@pytest.fixture(scope="module")
def model():
    return build_model(
        DecoderConfig(
            vocab_size=12, num_layers=1, d_model=16, num_heads=2, num_kv_heads=1, d_ff=16, max_positions=12,
            init_std=0.3, heads=("lm", "value"),
        )
    )  # fmt: skip


def sampled(model, temperature):
    prompts = PromptBatch(ids=np.repeat(PROMPTS.ids, 3, axis=0), lengths=np.repeat(PROMPTS.lengths, 3))
    params = model.init(jax.random.key(0))
    sampler = make_sampler(model, Sampling(temperature=temperature, stop_ids=(2,)), 6)
    generated = sampler(params, prompts.ids, prompts.lengths, jax.random.key(1))
    return params, completion_tokens(prompts, generated), generated


def test_the_trainer_scores_as_the_sampler_does_only_at_its_temperature(model):
    params, tokens, generated = sampled(model, 0.7)
    ours = sampler_logps(generated, tokens)
    logps, values = score(model, params, tokens, temperature=0.7, rows=4)
    assert logps.shape == values.shape == tokens.ids.shape and logps.dtype == np.float32
    mean, maximum = gate_difference(ours, logps, tokens.weights)
    assert mean <= maximum < 1e-5
    check_gate(mean, maximum, 1e-3)

    wrong, _ = score(model, params, tokens, temperature=1.0, rows=4)
    mean, maximum = gate_difference(ours, wrong, tokens.weights)
    with pytest.raises(ValueError, match=rf"{mean:.3g} nats.*{maximum:.3g}.*gate_threshold=0.001.*temperature"):
        check_gate(mean, maximum, 1e-3)


def test_fewer_slots_sample_the_same(model):
    params, _, together = sampled(model, 1.0)
    sampler = make_sampler(model, Sampling(stop_ids=(2,)), 6, slots=2)
    ids, lengths = np.repeat(PROMPTS.ids, 3, axis=0), np.repeat(PROMPTS.lengths, 3)
    few = sampler(params, ids, lengths, jax.random.key(1))
    np.testing.assert_array_equal(few.ids, together.ids)
    np.testing.assert_array_equal(few.lengths, together.lengths)
    np.testing.assert_array_equal(few.stopped, together.stopped)
    np.testing.assert_allclose(few.logps, together.logps, atol=1e-5)
    assert len(np.unique(few.ids[:3], axis=0)) > 1, "equal prompts are sampled apart"


def test_scores_do_not_depend_on_the_chunks(model):
    params, tokens, _ = sampled(model, 1.0)
    whole = score(model, params, tokens, temperature=1.0, rows=9)
    parts = score(model, params, tokens, temperature=1.0, rows=2)
    np.testing.assert_allclose(whole[0], parts[0], atol=1e-5)
    valid = tokens.segments > 0
    np.testing.assert_allclose(whole[1][valid], parts[1][valid], atol=1e-5)


def test_the_gate_looks_at_sampled_tokens_only_and_refuses_nan():
    weights = np.array([[0.0, 1, 1]])
    assert gate_difference(np.array([[9.0, 1, 2]]), np.array([[0.0, 1.5, 2]]), weights) == (0.25, 0.5)
    with pytest.raises(ValueError, match="disagree"):
        check_gate(*gate_difference(np.array([[0.0, np.nan, 2]]), np.zeros((1, 3)), weights), 1e9)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"top_k": 50}, "top_k=50"),
        ({"top_p": 0.9}, "top_p=0.9"),
        ({"min_p": 0.1}, "min_p=0.1"),
        ({"repetition_penalty": 1.1}, "repetition_penalty=1.1"),
        ({"temperature": 0.0}, "temperature 0"),
    ],
)
def test_samples_the_trainer_cannot_score_are_refused(model, settings, named):
    with pytest.raises(ValueError, match=f"cannot train.*{named}"):
        make_sampler(model, Sampling(**settings), 4)
