"""Where a run's numbers go: metrics.jsonl, TensorBoard events, and the progress bar."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter
from tqdm import tqdm

from jaxtrain.distributed import is_writer


def read_rows(path: Path | str) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl.  A last line cut short by a kill is dropped."""
    path = Path(path)
    if not path.exists():
        return []
    rows = []
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ValueError(f"{path}:{number} is not JSON: {error}") from error
    return rows


class MetricLog:
    """Appends one row per logged step.  A resumed run first drops the rows that its checkpoint does not know.

    Of several processes only the first writes.
    """

    def __init__(self, directory: Path | str, *, start: int, steps: int, title: str, unit: str = "tok"):
        """``start``: updates already made (0 for a fresh run).  ``steps``: updates in all."""
        self._began, self.earlier_seconds, self._writing = time.perf_counter(), 0.0, is_writer()
        if not self._writing:
            return
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / "metrics.jsonl"
        rows = [row for row in read_rows(self.path) if row["step"] <= start and start > 0]
        scratch = self.path.with_suffix(".tmp")
        scratch.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        os.replace(scratch, self.path)
        self.earlier_seconds = rows[-1]["seconds"] if rows else 0.0
        self._file = self.path.open("a", encoding="utf-8")
        self._events = SummaryWriter(str(directory / "events"), purge_step=start + 1 if start else None)
        self._unit = unit
        self._bar = tqdm(
            total=steps,
            initial=start,
            desc=title,
            unit="step",
            file=sys.stderr,
            dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 20.0,
        )

    def seconds(self) -> float:
        """Seconds that this run has trained, interruptions left out."""
        return self.earlier_seconds + time.perf_counter() - self._began

    def write(self, step: int, values: Mapping[str, float], *, advance: bool = True) -> None:
        """One row.  NaN and Inf become null: JSON has no word for them."""
        if not self._writing:
            return
        row = {"step": step, **values, "seconds": round(self.seconds(), 3)}
        row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._events.add_scalar(name, value, step)
        if advance:
            shown = {name: f"{values[name]:.4g}" for name in ("loss", "objective/scores") if name in values}
            if "tokens_per_second" in values:
                shown[f"{self._unit}/s"] = f"{values['tokens_per_second']:,.0f}"
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update(step - self._bar.n)

    def sync(self) -> None:
        """Makes the rows durable: a checkpoint must never know steps that the log lost."""
        if not self._writing:
            return
        self._file.flush()
        os.fsync(self._file.fileno())
        self._events.flush()

    def close(self) -> None:
        if not self._writing:
            return
        self.sync()
        self._file.close()
        self._events.close()
        self._bar.close()

    def __enter__(self) -> MetricLog:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()
