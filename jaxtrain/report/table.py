"""The summary: which metrics got better, as records for the page and as text for the terminal."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class SummaryRow:
    """One line of the summary.  verdict: 'better', 'worse', 'same', 'unknown', or 'shown' (not judged)."""

    stage: str
    metric: str
    before: float
    after: float
    goal: str
    verdict: str
    seconds: float

    @property
    def change(self) -> float:
        return self.after - self.before


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def judge(before: float, after: float, goal: str) -> str:
    """The verdict on a change: ``goal`` is 'lower', 'higher' or 'none'."""
    if goal not in ("lower", "higher"):
        return "shown"
    if not (math.isfinite(before) and math.isfinite(after)):
        return "unknown"
    if before == after:
        return "same"
    return "better" if (after < before) == (goal == "lower") else "worse"


def summary_rows(summary: Sequence[Mapping[str, Any]]) -> list[SummaryRow]:
    """Records of summary.json's rows; a missing or null number is NaN."""
    rows = []
    for row in summary:
        before, after = _number(row.get("before")), _number(row.get("after"))
        goal = str(row.get("better", "none"))
        rows.append(
            SummaryRow(
                stage=str(row.get("stage", "?")),
                metric=str(row.get("metric", "?")),
                before=before,
                after=after,
                goal=goal,
                verdict=judge(before, after, goal),
                seconds=_number(row.get("seconds")),
            )
        )
    return rows


def format_value(value: float) -> str:
    """Four significant digits, '-' for NaN."""
    return "-" if math.isnan(value) else f"{value:.4g}"


def format_seconds(seconds: float) -> str:
    """'850 ms', '12.3 s', '4 min 05 s', '2 h 03 min'; '-' for NaN."""
    if not math.isfinite(seconds):
        return "-"
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def format_table(summary: Sequence[Mapping[str, Any]]) -> str:
    """The rows of summary.json as a plain ASCII table, each stage named (and timed) once."""
    header = ("stage", "metric", "before", "after", "change", "verdict", "time")
    lines = [header]
    last = None
    for row in summary_rows(summary):
        first = row.stage != last
        last = row.stage
        change = "-" if math.isnan(row.change) else f"{row.change:+.4g}"
        verdict = "" if row.verdict == "shown" else row.verdict
        lines.append(
            (
                row.stage if first else "",
                row.metric,
                format_value(row.before),
                format_value(row.after),
                change,
                verdict,
                format_seconds(row.seconds) if first else "",
            )
        )
    if len(lines) == 1:
        return "no results"
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    right = {2, 3, 4, 6}

    def show(line):
        cells = (
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        return "  ".join(cells).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([show(lines[0]), rule, *map(show, lines[1:])])
