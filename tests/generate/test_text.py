from __future__ import annotations

import dataclasses
import json

import jax
import pytest

from jaxtrain.generate.sampling import Sampling
from jaxtrain.generate.text import Step, draw_steps, generate_text
from jaxtrain.models import DecoderConfig, build_model


@pytest.fixture(scope="module")
def letter_model():
    return build_model(
        DecoderConfig(
            vocab_size=27,
            num_layers=1,
            d_model=16,
            num_heads=2,
            num_kv_heads=1,
            d_ff=16,
            max_positions=16,
            init_std=0.3,
        )
    )


def test_text_in_and_out(letter_model, letters):
    params = letter_model.init(jax.random.key(0))
    sampling = Sampling(stop_ids=(1, 2, 3, 4, 5))

    def run(prompts, seed, **settings):
        return generate_text(
            letter_model, params, letters, prompts, sampling=sampling, max_new_tokens=8, seed=seed, **settings
        )

    completions, stats = run(["abc", "z"] * 4, 3)
    assert {completion.stopped for completion in completions} == {True, False}
    for completion in completions:
        assert completion.text == letters.decode(completion.ids[:-1] if completion.stopped else completion.ids)
        assert completion.stopped == (completion.ids[-1] in sampling.stop_ids)
        assert completion.stopped or len(completion.ids) == 8
        assert len(completion.logps) == len(completion.ids) and completion.steps == ()
    assert stats.tokens == sum(len(completion.ids) for completion in completions)
    assert stats.prompt_tokens == 16
    assert stats.seconds > 0 and stats.tokens_per_second == stats.tokens / stats.seconds

    again, _ = run(["bc", ""] * 4, 3, encode=lambda text: [1, *letters.encode(text)] if text else [26])
    assert [one.ids for one in again] == [one.ids for one in completions]
    # Number i has the seed of the first plus i: any of them can be had alone.
    assert run(["z"], 3 + 5)[0][0].ids == completions[5].ids
    assert [one.ids for one in run(["abc", "z"] * 4, 40)[0]] != [one.ids for one in completions]


def test_steps_are_what_was_likely(letter_model, letters):
    params = letter_model.init(jax.random.key(0))
    (completion,), _ = generate_text(
        letter_model, params, letters, ["abc"], sampling=Sampling(temperature=0.0), max_new_tokens=3, top=4
    )
    assert [step.id for step in completion.steps] == list(completion.ids)
    for step in completion.steps:
        assert len(step.top) == 4 and step.top[0] == (step.piece, step.id, step.probability)
        probabilities = [p for _, _, p in step.top]
        assert probabilities == sorted(probabilities, reverse=True) and 0 < sum(probabilities) <= 1
    assert json.loads(json.dumps(dataclasses.asdict(completion)))["steps"][0]["top"][0][0] == completion.steps[0].piece


def test_steps_drawn_by_hand():
    step = Step(id=7, piece=" a", probability=0.25, top=(("b", 3, 0.5), (" a", 7, 0.25), ("\n", 1, 0.0026)))
    assert draw_steps([step]) == (
        "   1  ' a' 25.00%\n      'b'   50.00% ████████████\n    > ' a'  25.00% ██████\n      '\\n'   0.26%"
    )
    half = Step(id=0, piece="x", probability=1.0, top=(("x", 0, 1.0), ("y", 1, 1.5 / 24)))
    assert draw_steps([half]).splitlines()[1:] == ["    > 'x' 100.00% " + "█" * 24, "      'y'   6.25% █▌"]


def test_mistakes_are_named(letter_model, letters):
    params = letter_model.init(jax.random.key(0))

    def run(prompt):
        return generate_text(letter_model, params, letters, [prompt], sampling=Sampling(), max_new_tokens=4)

    with pytest.raises(ValueError, match=r"prompt 0 \(''\) has no tokens"):
        run("")
    with pytest.raises(ValueError, match=r"'a\}'\) has the id 29.*vocabulary of 27"):
        run("a}")
    with pytest.raises(ValueError, match="max_positions=16"):
        run("abcdefghijklm")
