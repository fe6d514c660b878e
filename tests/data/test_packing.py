from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtrain.data import packing

BOS, EOS, PAD = 1, 2, 0
DOCUMENTS = st.lists(st.lists(st.integers(3, 50), max_size=30), max_size=12)


def arrays(lists):
    return [np.array(ids, np.int32) for ids in lists]


def pack(documents, seq_len, pad_id=PAD):
    return packing.pack_documents(arrays(documents), seq_len, bos_id=BOS, eos_id=EOS, pad_id=pad_id)


def check_layout(rows):
    """What every row must satisfy, whatever made it."""
    for name, dtype in packing.TOKEN_FIELDS.items():
        assert rows[name].dtype == dtype
    for segments, positions, weights in zip(rows["segments"], rows["positions"], rows["weights"]):
        assert not weights[segments == 0].any()
        assert set(weights.tolist()) <= {0.0, 1.0}
        real = segments[segments > 0]
        assert segments[: len(real)].tolist() == real.tolist()  # padding comes last
        if len(real):
            assert real[0] == 1 and set(np.diff(real).tolist()) <= {0, 1}
        for segment in set(real.tolist()):
            there = positions[segments == segment]
            assert there.tolist() == list(range(len(there)))


def test_golden_documents():
    rows = pack([[5, 6], [7, 8, 9], [4]], 4)
    assert rows["ids"].tolist() == [[1, 5, 6, 1], [7, 8, 9, 1], [4, 0, 0, 0]]
    assert rows["targets"].tolist() == [[5, 6, 2, 7], [8, 9, 2, 4], [2, 0, 0, 0]]
    assert rows["weights"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 1], [1, 0, 0, 0]]
    assert rows["segments"].tolist() == [[1, 1, 1, 2], [1, 1, 1, 2], [1, 0, 0, 0]]
    assert rows["positions"].tolist() == [[0, 1, 2, 0], [0, 1, 2, 0], [0, 0, 0, 0]]


@settings(max_examples=200, deadline=None)
@given(documents=DOCUMENTS, seq_len=st.integers(1, 17), pad_id=st.sampled_from([0, EOS, 7]))
def test_every_target_is_predicted_exactly_once(documents, seq_len, pad_id):
    rows = pack(documents, seq_len, pad_id)
    check_layout(rows)
    flat = {name: values.reshape(-1) for name, values in rows.items()}
    trained = flat["weights"] > 0
    assert flat["targets"][trained].tolist() == [i for ids in documents for i in [*ids, EOS]]
    assert flat["ids"][trained].tolist() == [i for ids in documents for i in [BOS, *ids]]
    assert (~trained).sum() < seq_len  # only the last row is padded
    assert (flat["ids"][~trained] == pad_id).all()


@settings(max_examples=100, deadline=None)
@given(documents=DOCUMENTS, seq_len=st.integers(2, 17))
def test_targets_never_cross_a_segment(documents, seq_len):
    rows = pack(documents, seq_len)
    same = rows["segments"][:, 1:] == rows["segments"][:, :-1]
    inside = same & (rows["weights"][:, :-1] > 0)
    assert (rows["targets"][:, :-1] == rows["ids"][:, 1:])[inside].all()
    # Where the next id is of another document, the target is the end of this one.
    crossing = ~same & (rows["weights"][:, :-1] > 0)
    assert (rows["targets"][:, :-1] == EOS)[crossing].all()


SIDE = st.lists(st.integers(0, 9), min_size=1, max_size=9)
EXAMPLES = st.lists(st.tuples(SIDE, SIDE), max_size=15)


def example(prompt, completion):
    mask = np.zeros(len(prompt) + len(completion), np.bool_)
    mask[len(prompt) :] = True
    return np.array([*prompt, *completion], np.int32), mask


def test_golden_examples():
    rows, counts = packing.pack_examples(
        [example([5, 6], [7]), example([1, 2], [3, 4, 9]), example([8], [8])], 5, pad_id=8
    )
    # Lengths 2, 4, 1: best fit puts the shortest beside the longest.
    assert rows["ids"].tolist() == [[1, 2, 3, 4, 8], [5, 6, 8, 8, 8]]
    assert rows["targets"].tolist() == [[2, 3, 4, 9, 8], [6, 7, 8, 8, 8]]
    assert rows["weights"].tolist() == [[0, 1, 1, 1, 1], [0, 1, 0, 0, 0]]
    assert rows["segments"].tolist() == [[1, 1, 1, 1, 2], [1, 1, 0, 0, 0]]
    assert rows["positions"].tolist() == [[0, 1, 2, 3, 0], [0, 1, 0, 0, 0]]
    assert counts == {"truncated": 0, "dropped_untrained": 0}


@settings(max_examples=200, deadline=None)
@given(examples=EXAMPLES, seq_len=st.integers(1, 20), pad_id=st.integers(0, 9))
def test_examples_are_whole_and_only_completions_are_trained(examples, seq_len, pad_id):
    rows, counts = packing.pack_examples([example(*texts) for texts in examples], seq_len, pad_id=pad_id)
    check_layout(rows)
    expected = []
    for prompt, completion in examples:
        ids = [*prompt, *completion]
        size = min(len(ids) - 1, seq_len)
        weights = [0.0] * (len(prompt) - 1) + [1.0] * len(completion)
        if any(weights[:size]):
            expected.append((ids[:size], ids[1 : size + 1], weights[:size]))
    found = []
    for row in range(len(rows["ids"])):
        for segment in range(1, rows["segments"][row].max() + 1):
            there = rows["segments"][row] == segment
            found.append(tuple(rows[name][row][there].tolist() for name in ("ids", "targets", "weights")))
    assert sorted(found) == sorted(expected)
    assert counts["dropped_untrained"] == len(examples) - len(expected)
    cut = [len(p) - 1 < seq_len < len(p) + len(c) - 1 for p, c in examples]
    assert counts["truncated"] == sum(cut)


@settings(max_examples=200, deadline=None)
@given(lengths=st.lists(st.integers(1, 20), max_size=40))
def test_best_fit_decreasing(lengths):
    bins = packing.best_fit_decreasing(lengths, 20)
    assert sorted(i for members in bins for i in members) == list(range(len(lengths)))
    filled = [sum(lengths[i] for i in members) for members in bins]
    assert all(total <= 20 for total in filled)
    # Any-fit: no two bins could have been one, so at most one is half empty or more.
    assert sum(total <= 10 for total in filled) <= 1
    # Decreasing: each bin was filled from the longest down.
    assert all(lengths[a] >= lengths[b] for members in bins for a, b in itertools.pairwise(members))


def test_best_fit_prefers_the_fullest_bin():
    assert packing.best_fit_decreasing([6, 7, 3], 10) == [[1, 2], [0]]


def test_a_mask_of_zeros_is_refused_but_truncation_only_drops():
    ids = np.arange(5, dtype=np.int32)
    with pytest.raises(ValueError, match="example 1 has no trained token"):
        packing.pack_examples([example([1], [2]), (ids, np.zeros(5, np.bool_))], 8, pad_id=PAD)
    rows, counts = packing.pack_examples([example([1, 2, 3, 4], [5])], 3, pad_id=PAD)
    assert rows["ids"].shape == (0, 3) and counts == {"truncated": 0, "dropped_untrained": 1}


def test_golden_pairs():
    pairs = [
        (example([5, 6], [7, 8]), example([5, 6], [9])),
        (example([5], [7]), example([5], [7])),  # identical
        (example([1, 1, 1, 1], [7, 8]), example([1, 1, 1, 1], [7])),  # the prompt fills the row
        (example([5, 6], [7, 7, 3]), example([5, 6], [7, 7, 4])),  # identical once truncated
        (example([5, 6], [7, 4, 3]), example([5, 6], [8])),
    ]
    chosen, rejected, index, counts = packing.pack_pairs(pairs, 3, pad_id=7)
    assert index.tolist() == [0, 4]
    assert counts == {"truncated": 1, "dropped_untrained": 1, "dropped_identical": 2}
    check_layout(chosen)
    check_layout(rejected)
    assert chosen["ids"].tolist() == [[5, 6, 7], [5, 6, 7]]
    assert chosen["targets"].tolist() == [[6, 7, 8], [6, 7, 4]]
    assert rejected["ids"].tolist() == [[5, 6, 7], [5, 6, 7]]  # padded with 7, which is also a real id
    assert rejected["targets"].tolist() == [[6, 9, 7], [6, 8, 7]]
    assert chosen["weights"].tolist() == [[0, 1, 1], [0, 1, 1]]
    assert rejected["weights"].tolist() == [[0, 1, 0], [0, 1, 0]]
    assert rejected["segments"].tolist() == [[1, 1, 0], [1, 1, 0]]


def test_pad_that_equals_the_end_of_turn_changes_no_mask():
    examples = [example([1, 4, 5], [6, 2]), example([1, 4], [2]), example([1, 2, 2, 4], [2, 6, 2])]
    for seq_len in (6, 13):
        plain, _ = packing.pack_examples(examples, seq_len, pad_id=0)
        same, _ = packing.pack_examples(examples, seq_len, pad_id=2)
        for name in ("weights", "positions", "segments"):
            assert plain[name].tolist() == same[name].tolist()
        real = plain["segments"] > 0
        assert plain["ids"][real].tolist() == same["ids"][real].tolist()
        # The end of every turn is trained.
        assert same["weights"][(plain["targets"] == 2) & real].sum() >= len(examples)


def test_prompts_are_padded_on_the_left():
    ids, lengths = packing.pad_prompts(arrays([[4, 5], [6, 7, 8]]), 4, pad_id=9)
    assert ids.tolist() == [[9, 9, 4, 5], [9, 6, 7, 8]] and lengths.tolist() == [2, 3]
    assert ids.dtype == lengths.dtype == np.int32
    with pytest.raises(AssertionError):
        packing.pad_prompts(arrays([[1, 2, 3]]), 2, pad_id=0)


@pytest.mark.parametrize(("ids", "message"), [([3, 10], "id 10 at position 1"), ([-1], "id -1 at position 0")])
def test_ids_outside_the_vocabulary_are_named(ids, message):
    packing.check_ids(np.array([0, 9]), 10, "fine")
    packing.check_ids(np.array([], np.int32), 10, "fine")
    with pytest.raises(ValueError, match=f"wiki: {message} is outside the vocabulary of 10 ids"):
        packing.check_ids(np.array(ids), 10, "wiki")


def test_seq_len_must_be_positive():
    with pytest.raises(ValueError, match="seq_len is 0"):
        pack([[3]], 0)
