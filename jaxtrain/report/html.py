"""Renders a run directory as one self-contained HTML file: no scripts, no fonts, nothing from the network."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from jaxtrain.report import view
from jaxtrain.report.rundir import read_run
from jaxtrain.report.table import format_seconds, format_value, summary_rows

# Completions and prompts are text from a model: everything that is not Markup is escaped.
_TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("jaxtrain.report", package_path="."),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_TEMPLATES.filters |= {"value": format_value, "duration": format_seconds, "visible": view.visible}


def write_report(run_dir: Path | str) -> Path:
    """Writes ``run_dir/report.html`` and returns its path.

    A partial run gives a partial report that lists what is missing.  Raises ValueError if ``run_dir``
    is not a directory.
    """
    path = Path(run_dir) / "report.html"
    html = render(run_dir)
    scratch = path.with_suffix(".html.tmp")
    scratch.write_text(html, encoding="utf-8")
    os.replace(scratch, path)
    return path


def render(run_dir: Path | str) -> str:
    """The report of a run directory as HTML."""
    run = read_run(run_dir)
    names, samples = view.samples_table(run)
    return _TEMPLATES.get_template("template.html.j2").render(
        title=run.directory.resolve().name,
        summary=_summary(run.summary),
        stages=[view.stage_view(stage) for stage in run.stages],
        sample_stages=names,
        samples=samples,
        distributions=view.distributions(run),
        times=view.time_chart(run),
        total=sum(s.result["seconds"] for s in run.stages if isinstance(s.result.get("seconds"), int | float)),
        environments=view.environments(run),
        config=run.config,
        missing=run.missing,
    )


def _summary(summary: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows with their arrows; ``span``: how many rows the stage has, on its first one, else 0."""
    arrows = {True: "▲", False: "▼"}
    rows = []
    for row in summary_rows(summary):
        first = not rows or rows[-1]["row"].stage != row.stage
        arrow = "" if not row.change or row.change != row.change else arrows[row.change > 0]
        rows.append({"row": row, "arrow": arrow, "span": int(first)})
        if not first:
            start = max(i for i, r in enumerate(rows) if r["span"])
            rows[start]["span"] += 1
    return rows
