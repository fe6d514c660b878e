"""From lists of ids to fixed rows: pure functions on NumPy arrays.

Rows are dictionaries of the fields of ``types.Tokens``, each ``[N, T]`` for N rows: ids, targets, positions,
segments int32; weights float32.  Weights, positions and segments come from lengths and spans; no function
looks for the padding id, so padding with an id that also occurs in text is safe.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import numpy as np

Rows = dict[str, np.ndarray]
Example = tuple[np.ndarray, np.ndarray]  # ids [n], mask [n]: True where an id is trained

TOKEN_FIELDS = {
    "ids": np.int32,
    "targets": np.int32,
    "weights": np.float32,
    "positions": np.int32,
    "segments": np.int32,
}


def check_ids(ids: np.ndarray, vocab_size: int, where: str) -> None:
    """Raises ValueError, naming ``where``, if an id lies outside ``[0, vocab_size)``."""
    ids = np.asarray(ids)
    if ids.size and (ids.min() < 0 or ids.max() >= vocab_size):
        at = int(np.flatnonzero((ids < 0) | (ids >= vocab_size))[0])
        raise ValueError(
            f"{where}: id {int(ids.flat[at])} at position {at} is outside the vocabulary of {vocab_size} "
            f"ids; was the data prepared with another tokenizer?"
        )


def _check_seq_len(seq_len: int) -> None:
    if seq_len < 1:
        raise ValueError(f"seq_len is {seq_len}; it must be at least 1")


def empty_rows(count: int, seq_len: int, pad_id: int) -> Rows:
    """``count`` rows of padding: weights and segments 0."""
    rows = {name: np.zeros((count, seq_len), dtype) for name, dtype in TOKEN_FIELDS.items()}
    rows["ids"][:] = pad_id
    rows["targets"][:] = pad_id
    return rows


def pack_documents(documents: Sequence[np.ndarray], seq_len: int, *, bos_id: int, eos_id: int, pad_id: int) -> Rows:
    """Concatenates ``bos document eos`` and splits that into rows of ``seq_len``; only the last is padded.

    Every id of every document and its eos is a target exactly once, also where a document runs over the end
    of a row.  Its rest is then a new segment: positions restart, and what came before is out of sight.
    """
    _check_seq_len(seq_len)
    lengths = np.array([len(document) + 1 for document in documents], np.int64)
    total = int(lengths.sum())
    count = -(-total // seq_len)
    rows = empty_rows(count, seq_len, pad_id)
    if not count:
        return rows
    ids, targets, number = (np.zeros(count * seq_len, np.int32) for _ in range(3))
    ids[:], targets[:] = pad_id, pad_id
    end = 0
    for index, document in enumerate(documents):
        start, end = end, end + len(document) + 1
        ids[start], ids[start + 1 : end] = bos_id, document
        targets[start : end - 1], targets[end - 1] = document, eos_id
        number[start:end] = index
    number = number[:total]
    place = np.arange(total)
    first = np.ones(total, np.bool_)  # does a segment start here?
    first[1:] = (number[1:] != number[:-1]) | (place[1:] % seq_len == 0)
    begun = np.maximum.accumulate(np.where(first, place, 0))
    flat = {name: rows[name].reshape(-1) for name in rows}
    flat["ids"][:], flat["targets"][:] = ids, targets
    flat["weights"][:total] = 1.0
    flat["positions"][:total] = place - begun
    flat["segments"][:total] = number - number[place // seq_len * seq_len] + 1
    return rows


def _shift(example: Example, seq_len: int) -> Rows:
    """One example as unpadded Tokens fields ``[n]``, n <= seq_len; keeps the start."""
    ids, mask = example
    assert len(ids) == len(mask), "ids and mask differ in length"
    size = min(len(ids) - 1, seq_len)
    return {
        "ids": ids[:size],
        "targets": ids[1 : size + 1],
        "weights": mask[1 : size + 1].astype(np.float32),
        "positions": np.arange(size),
        "segments": np.ones(size),
    }


def _check_mask(example: Example, index: int) -> None:
    if not example[1].any():
        raise ValueError(f"example {index} has no trained token: its mask is zero everywhere")


def _place(rows: Rows, row: int, start: int, tokens: Rows, segment: int) -> None:
    stop = start + len(tokens["ids"])
    for name, values in tokens.items():
        rows[name][row, start:stop] = segment if name == "segments" else values


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Bins of indices whose lengths fit ``capacity``: longest first, each into the fullest bin that has room.

    Ties keep the order of ``lengths``.  No length may exceed ``capacity``.
    """
    bins: list[list[int]] = []
    waiting: dict[int, list[int]] = {}  # room left -> bins with that room
    rooms: list[int] = []  # the keys of `waiting`, sorted
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        assert 0 < length <= capacity, f"length {length} does not fit {capacity}"
        at = bisect.bisect_left(rooms, length)
        if at == len(rooms):
            bin_, room = len(bins), capacity
            bins.append([])
        else:
            room = rooms[at]
            bin_ = waiting[room].pop()
            if not waiting[room]:
                del waiting[room], rooms[at]
        bins[bin_].append(index)
        if room := room - length:
            if room not in waiting:
                waiting[room] = []
                bisect.insort(rooms, room)
            waiting[room].append(bin_)
    return bins


def pack_examples(examples: Sequence[Example], seq_len: int, *, pad_id: int) -> tuple[Rows, dict[str, int]]:
    """Packs examples into rows by best-fit decreasing, whole: an example is one segment of one row.

    One longer than the row loses its end; one that then has no trained token left is dropped.  Returns the
    rows and the counts ``truncated`` and ``dropped_untrained``.  Raises ValueError for a mask that is zero
    from the start: that is a mistake in the data, not in ``seq_len``.
    """
    _check_seq_len(seq_len)
    kept, counts = [], {"truncated": 0, "dropped_untrained": 0}
    for index, example in enumerate(examples):
        _check_mask(example, index)
        tokens = _shift(example, seq_len)
        if not tokens["weights"].any():
            counts["dropped_untrained"] += 1
            continue
        counts["truncated"] += len(example[0]) - 1 > seq_len
        kept.append(tokens)
    bins = best_fit_decreasing([len(tokens["ids"]) for tokens in kept], seq_len)
    rows = empty_rows(len(bins), seq_len, pad_id)
    for row, members in enumerate(bins):
        start = 0
        for segment, index in enumerate(members, start=1):
            _place(rows, row, start, kept[index], segment)
            start += len(kept[index]["ids"])
    return rows, counts


def pack_pairs(
    pairs: Sequence[tuple[Example, Example]], seq_len: int, *, pad_id: int
) -> tuple[Rows, Rows, np.ndarray, dict[str, int]]:
    """Chosen rows, rejected rows, int64 ``[N]`` index of the pair that each row shows, and counts.

    One example a row, padded on the right; longer ones lose their end.  Dropped are pairs whose sides read
    the same (``dropped_identical``; also when truncation made them so) and pairs with a side that has no
    trained token left (``dropped_untrained``).
    """
    _check_seq_len(seq_len)
    counts = {"truncated": 0, "dropped_untrained": 0, "dropped_identical": 0}
    kept, index = [], []
    for number, pair in enumerate(pairs):
        for example in pair:
            _check_mask(example, number)
        sides = [_shift(example, seq_len) for example in pair]
        if not all(side["weights"].any() for side in sides):
            counts["dropped_untrained"] += 1
        elif all(np.array_equal(sides[0][name], sides[1][name]) for name in ("ids", "targets", "weights")):
            counts["dropped_identical"] += 1
        else:
            counts["truncated"] += any(len(example[0]) - 1 > seq_len for example in pair)
            kept.append(sides)
            index.append(number)
    chosen, rejected = (empty_rows(len(kept), seq_len, pad_id) for _ in range(2))
    for row, sides in enumerate(kept):
        for rows, tokens in zip((chosen, rejected), sides, strict=True):
            _place(rows, row, 0, tokens, 1)
    return chosen, rejected, np.array(index, np.int64), counts


def pad_prompts(prompts: Sequence[np.ndarray], width: int, *, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Left-padded ids ``[N, width]`` and lengths ``[N]``, both int32; a prompt is the end of its row."""
    ids = np.full((len(prompts), width), pad_id, np.int32)
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    for row, prompt in enumerate(prompts):
        assert 0 < len(prompt) <= width, f"a prompt of {len(prompt)} ids does not fit {width}"
        ids[row, width - len(prompt) :] = prompt
    return ids, lengths
