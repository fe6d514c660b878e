from __future__ import annotations

import numpy as np
import pytest

from jaxtrain.data.loader import Loader, sequential_batches


class Numbers:
    """A source whose record i is the number i + 1."""

    fingerprint = "numbers"

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return {"value": np.int64(index + 1)}


def to_batch(rows):
    return [int(row["value"]) for row in rows]


def loader(count=23, batch_size=4, seed=0):
    return Loader(source=Numbers(count), batch_size=batch_size, seed=seed, to_batch=to_batch)


def stream(made, steps):
    return [value for step in range(steps) for value in made.batch(step)]


def test_a_batch_does_not_depend_on_how_it_is_reached():
    steps = [7, 0, 31, 7, 30, 2]
    forward = loader()
    in_order = [forward.batch(step) for step in range(32)]
    jumping = loader()
    assert [jumping.batch(step) for step in steps] == [in_order[step] for step in steps]
    assert [loader().batch(step) for step in steps] == [in_order[step] for step in steps]


def test_each_epoch_is_another_permutation():
    found = stream(loader(count=20, batch_size=4), 15)
    epochs = [found[start : start + 20] for start in (0, 20, 40)]
    assert all(sorted(epoch) == list(range(1, 21)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert epochs[0] != sorted(epochs[0])


def test_batches_run_over_the_end_of_an_epoch_without_loss():
    found = stream(loader(count=23, batch_size=4), 23)  # four epochs
    for start in range(0, 92, 23):
        assert sorted(found[start : start + 23]) == list(range(1, 24))


def test_the_order_does_not_depend_on_the_batch_size():
    sizes = {2: 30, 5: 12, 60: 1}
    streams = [stream(loader(batch_size=size), steps) for size, steps in sizes.items()]
    assert streams[0] == streams[1] == streams[2]


def test_seeds_differ():
    orders = {tuple(stream(loader(count=30, seed=seed), 5)) for seed in range(4)}
    assert len(orders) == 4


def test_a_batch_larger_than_the_source_repeats_it():
    (batch,) = [loader(count=3, batch_size=7).batch(0)]
    assert sorted(batch[:3]) == sorted(batch[3:6]) == [1, 2, 3] and len(batch) == 7


def test_far_steps_are_as_good_as_near_ones():
    assert len(set(loader(count=1000, batch_size=8).batch(10**10))) == 8


def test_fingerprint_names_what_decides_the_order():
    base = loader().fingerprint()
    assert base == {"data": "numbers", "records": 23, "batch_size": 4, "seed": 0}
    assert loader(seed=1).fingerprint() != base != loader(batch_size=5).fingerprint()


def test_sequential_batches_show_each_record_once_and_pad_the_last():
    assert list(sequential_batches(Numbers(7), 3, to_batch)) == [[1, 2, 3], [4, 5, 6], [7, 0, 0]]
    assert list(sequential_batches(Numbers(4), 2, to_batch)) == [[1, 2], [3, 4]]


class Watched(Numbers):
    """Remembers which records were read."""

    def __init__(self, count):
        super().__init__(count)
        self.read = []

    def __getitem__(self, index):
        self.read.append(int(index) + 1)
        return super().__getitem__(index)


def test_a_host_reads_its_own_rows_and_no_others():
    whole = loader(batch_size=6)
    source = Watched(23)
    mine = Loader(source=source, batch_size=6, seed=0, to_batch=to_batch)
    for step in (0, 3, 9):
        source.read.clear()
        assert (
            mine.batch(step, rows=np.array([1, 2, 5])) == [whole.batch(step)[row] for row in (1, 2, 5)] == source.read
        )


def test_a_host_evaluates_on_its_own_rows():
    source = Watched(7)
    assert list(sequential_batches(source, 4, to_batch, rows=[2, 3])) == [[3, 4], [7, 0]]
    assert sorted(set(source.read)) == [1, 3, 4, 7]  # the first for the shape of what fills the last batch up
    assert list(sequential_batches(Numbers(5), 4, to_batch, rows=[2, 3])) == [[3, 4], [0, 0]]


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="has no records"):
        loader(count=0)
    with pytest.raises(ValueError, match="has no records"):
        sequential_batches(Numbers(0), 2, to_batch)
    with pytest.raises(ValueError, match="batch_size is 0"):
        loader(batch_size=0)
    with pytest.raises(ValueError, match="step is -1"):
        loader().batch(-1)
    with pytest.raises(ValueError, match="seed is -1"):
        loader(seed=-1)
