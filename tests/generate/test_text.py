from __future__ import annotations

import jax
import numpy as np
import pytest

from jaxtrain.generate.sampling import Sampling
from jaxtrain.generate.text import generate_text, left_pad
from jaxtrain.models import DecoderConfig, build_model


class Letters:
    """One id a letter, from 1."""

    vocab_size = 27

    def encode(self, text: str) -> list[int]:
        return [ord(c) - ord("a") + 1 for c in text]

    def decode(self, ids) -> str:
        return "".join(chr(ord("a") + i - 1) if i else "_" for i in ids)


@pytest.fixture(scope="module")
def model():
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


def test_left_pad():
    ids, lengths = left_pad([[1, 2], [3]], width=3)
    assert ids.tolist() == [[0, 1, 2], [0, 0, 3]] and lengths.tolist() == [2, 1]
    assert ids.dtype == lengths.dtype == np.int32
    with pytest.raises(ValueError, match="prompt 1 has no tokens"):
        left_pad([[1], []])


def test_text_in_and_out(model):
    params = model.init(jax.random.key(0))
    sampling = Sampling(stop_ids=(1, 2, 3, 4, 5))
    completions, stats = generate_text(
        model, params, Letters(), ["abc", "z"] * 4, sampling=sampling, max_new_tokens=8, seed=3
    )
    assert {completion.stopped for completion in completions} == {True, False}
    for completion in completions:
        assert completion.text == Letters().decode(completion.ids[:-1] if completion.stopped else completion.ids)
        assert completion.stopped == (completion.ids[-1] in sampling.stop_ids)
        assert completion.stopped or len(completion.ids) == 8
    assert stats.tokens == sum(len(completion.ids) for completion in completions)
    assert stats.seconds > 0 and stats.tokens_per_second == stats.tokens / stats.seconds

    again, _ = generate_text(
        model,
        params,
        Letters(),
        ["bc", ""] * 4,
        sampling=sampling,
        max_new_tokens=8,
        seed=3,
        encode=lambda text: [1, *Letters().encode(text)] if text else [26],
    )
    assert again == completions
    other, _ = generate_text(model, params, Letters(), ["abc", "z"] * 4, sampling=sampling, max_new_tokens=8, seed=4)
    assert other != completions


def test_mistakes_are_named(model):
    params = model.init(jax.random.key(0))

    def run(prompt, **settings):
        settings = {"sampling": Sampling(), "max_new_tokens": 4} | settings
        return generate_text(model, params, Letters(), [prompt], **settings)

    with pytest.raises(ValueError, match="prompt 0 has no tokens"):
        run("")
    with pytest.raises(ValueError, match=r"'a\}' has the id 29.*vocabulary of 27"):
        run("a}")
    with pytest.raises(ValueError, match="max_positions=16"):
        run("abcdefghijklm")
