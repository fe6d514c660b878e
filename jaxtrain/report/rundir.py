"""Reads a run directory, whole or partial, and keeps a list of what is missing or unreadable."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

UNTRAINED = "untrained"
SUPERSEDED = "superseded"  # what stages made of other inputs
STAGE_FILES = ("metrics.jsonl", "result.json", "samples.json")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageRun:
    """What one stage left behind; empty where a file is missing.

    rows: of metrics.jsonl.  result: of result.json.  samples: of samples.json.
    """

    name: str
    rows: list[dict[str, Any]]
    result: dict[str, Any]
    samples: dict[str, Any]

    @property
    def parents(self) -> list[dict[str, Any]]:
        return self.result.get("parents") or []

    def curves(self) -> dict[str, list[tuple[float, float]]]:
        """Metric -> (step, value) points.  A null, which stands for NaN and Inf, comes back as NaN."""
        curves: dict[str, list[tuple[float, float]]] = {}
        for row in self.rows:
            step = row.get("step")
            if not isinstance(step, int | float):
                continue
            for name, value in row.items():
                if name in ("step", "seconds") or isinstance(value, bool):
                    continue
                if value is None or isinstance(value, int | float):
                    curves.setdefault(name, []).append((step, math.nan if value is None else float(value)))
        return {name: sorted(points, key=lambda p: p[0]) for name, points in curves.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A run directory.  stages: in order of dependence, without the untrained model.  missing: sentences."""

    directory: Path
    summary: list[dict[str, Any]]
    stages: list[StageRun]
    untrained: StageRun
    config: str
    missing: list[str]


class _Reader:
    def __init__(self, root: Path):
        self.root = root
        self.missing: list[str] = []

    def text(self, path: Path) -> str | None:
        name = path.relative_to(self.root)
        if not path.is_file():
            self.missing.append(f"{name} is missing")
            return None
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            self.missing.append(f"{name} is not valid UTF-8: {error}")
            return None

    def json(self, path: Path, kind: type) -> Any:
        text = self.text(path)
        if text is None:
            return kind()
        name = path.relative_to(self.root)
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            self.missing.append(f"{name} is not valid JSON: {error}")
            return kind()
        if not isinstance(value, kind):
            self.missing.append(f"{name} holds a {type(value).__name__}, not a {kind.__name__}")
            return kind()
        return value

    def rows(self, path: Path) -> list[dict[str, Any]]:
        rows = []
        for number, line in enumerate((self.text(path) or "").splitlines(), 1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                self.missing.append(f"{path.relative_to(self.root)} line {number} is not valid JSON (cut short?)")
                continue
            if isinstance(row, Mapping):
                rows.append(dict(row))
        return rows

    def stage(self, directory: Path) -> StageRun:
        untrained = directory.name == UNTRAINED
        return StageRun(
            name=directory.name,
            rows=[] if untrained else self.rows(directory / "metrics.jsonl"),
            result={} if untrained else self.json(directory / "result.json", dict),
            samples=self.json(directory / "samples.json", dict),
        )


def _ordered(stages: list[StageRun], summary: list[dict[str, Any]]) -> list[StageRun]:
    """By the summary, which is in the recipe's order; without it, ancestors before descendants."""
    listed = list(dict.fromkeys(row.get("stage") for row in summary))
    if all(stage.name in listed for stage in stages):
        return sorted(stages, key=lambda s: listed.index(s.name))

    def key(stage):
        # A stage without a result is still running, or failed: the latest.
        return (not stage.result, len(stage.parents), stage.name)

    return sorted(stages, key=key)


def read_run(directory: Path | str) -> Run:
    """Reads what there is.  Raises ValueError if ``directory`` is not a directory."""
    root = Path(directory)
    if not root.is_dir():
        raise ValueError(f"{root} is not a directory; a report needs the folder that a run wrote.")
    reader = _Reader(root)
    summary = [row for row in reader.json(root / "summary.json", list) if isinstance(row, dict)]
    config = reader.text(root / "config.gin") or ""
    folders = (
        sorted(p for p in (root / "stages").iterdir() if p.is_dir() and p.name != SUPERSEDED)
        if (root / "stages").is_dir()
        else []
    )
    found = {folder.name: reader.stage(folder) for folder in folders}
    untrained = found.pop(UNTRAINED, None)
    if untrained is None:
        untrained = reader.stage(root / "stages" / UNTRAINED)
    stages = _ordered(list(found.values()), summary)
    named = [row.get("stage") for row in summary]  # an ancestor may lie in another run's folder
    for name in dict.fromkeys(n for n in named if isinstance(n, str)):
        if name not in found:
            reader.missing.append(f"stages/{name} is named by the summary, but is missing")
    if not stages:
        reader.missing.append("no stage has left anything under stages/")
    return Run(
        directory=root,
        summary=summary or [row for stage in stages for row in evaluation_rows(stage)],
        stages=stages,
        untrained=untrained,
        config=config,
        missing=reader.missing,
    )


def evaluation_rows(stage: StageRun) -> list[dict[str, Any]]:
    """A stage's own evaluation, as rows of a summary."""
    rows = stage.result.get("evaluation") or []
    return [{"stage": stage.name, "seconds": stage.result.get("seconds"), **row} for row in rows]
