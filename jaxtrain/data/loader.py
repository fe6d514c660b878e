"""The order of examples.  Training: a pure function of seed and step.  Evaluation: each record once."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from jaxtrain.data.store import RecordSource

ToBatch = Callable[[Sequence[dict[str, np.ndarray]]], Any]


def _check(source: RecordSource, batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    if not len(source):
        raise ValueError(f"{source} has no records")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loader:
    """Endless shuffled batches; each epoch is another permutation, and a batch may span two epochs.

    Row r of step s is number ``s * batch_size + r`` of the shuffled, repeated source, so the
    state of the data is the step number, for any number of hosts.

    source: anything with ``len``, ``[i]`` and a ``fingerprint``.
    seed: of the shuffle; the epoch is mixed in.
    to_batch: makes a batch of a list of records, as ``TextDataset.batch``.

    Raises ValueError for a source without records.
    """

    source: RecordSource
    batch_size: int
    seed: int
    to_batch: ToBatch

    def __post_init__(self):
        _check(self.source, self.batch_size)
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed is {self.seed}; Grain shuffles with a seed in [0, 2**32)")

    @functools.cached_property
    def _order(self):
        import grain  # takes a second to import, so not before the first batch

        # Indices rather than records: Grain's per-element bookkeeping of a source costs as much as reading
        # it.
        return grain.MapDataset.range(len(self.source)).seed(self.seed).shuffle().repeat()

    def batch(self, step: int, rows: Sequence[int] | None = None) -> Any:
        """The batch of ``step``, from 0: the same whenever and in whatever order it is asked for.

        rows: those wanted of its ``batch_size`` rows (None: all); no others are read.
        """
        if step < 0:
            raise ValueError(f"step is {step}; steps count from 0")
        start = int(step) * self.batch_size
        wanted = range(self.batch_size) if rows is None else rows
        return self.to_batch([self.source[self._order[start + int(row)]] for row in wanted])

    def fingerprint(self) -> dict[str, Any]:
        """What must be equal for ``batch`` to be the same function; kept with checkpoints."""
        return {
            "data": self.source.fingerprint,
            "records": len(self.source),
            "batch_size": self.batch_size,
            "seed": self.seed,
        }


def sequential_batches(
    source: RecordSource, batch_size: int, to_batch: ToBatch, rows: Sequence[int] | None = None
) -> Iterator[Any]:
    """Every record once, in order.  The last batch is filled up with records of zeros: weight 0, segment 0.

    rows: those wanted of every batch's ``batch_size`` rows (None: all); no others are read.
    Raises ValueError, at the call, for a source without records.
    """
    _check(source, batch_size)
    wanted = range(batch_size) if rows is None else [int(row) for row in rows]

    def batches():
        blank = None
        for start in range(0, len(source), batch_size):
            records = [source[start + row] if start + row < len(source) else None for row in wanted]
            if None in records and blank is None:
                blank = {name: np.zeros_like(values) for name, values in source[0].items()}
            yield to_batch([blank if record is None else record for record in records])

    return batches()
