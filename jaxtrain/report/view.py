"""What the page shows, computed from a run: charts, samples side by side, distributions, ancestry."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from typing import Any

from markupsafe import Markup

from jaxtrain.report.charts import Series, bar_chart, format_number, line_chart
from jaxtrain.report.rundir import UNTRAINED, Run, StageRun
from jaxtrain.report.table import format_seconds

# What a reader looks at first; everything else a stage logged is one click away.
MAIN = re.compile(r"(^|/)loss$|reward|score|accurac|margin|(^|[/_])kl($|_avg)|bits_per_byte|perplexity", re.IGNORECASE)
MINOR = re.compile(r"non_score|coef|^critic/|^weight$|min_|max_|/std")
HIDDEN = {"weight"}
PAIR = re.compile(r"^(.*?)([/_]?)(chosen|rejected)$")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageView:
    """A stage's section.  facts: (label, text).  charts, more: figures shown at once, and on demand."""

    name: str
    facts: list[tuple[str, str]]
    ancestry: list[tuple[str, str]]
    charts: list[Markup]
    more: list[Markup]


def visible(text: Any) -> str:
    """Text that can be shown: control characters as symbols, surrogates replaced, tabs and newlines kept."""
    out = []
    for character in str(text):
        code = ord(character)
        if code < 0x20 and character not in "\n\t":
            out.append(chr(0x2400 + code))
        elif code == 0x7F:
            out.append("\u2421")
        elif 0x80 <= code < 0xA0 or 0xD800 <= code < 0xE000 or code in (0xFFFE, 0xFFFF):
            out.append("\ufffd")
        else:
            out.append(character)
    return "".join(out)


def visible_token(piece: Any) -> str:
    """A token on one line, its white space made visible."""
    text = visible(piece).replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣")
    return text or "(empty)"


def _groups(curves: dict[str, list]) -> dict[str, list[Series]]:
    """Chart title -> series: training and held-out values of a metric together, and chosen with rejected."""
    groups: dict[str, list[Series]] = {}
    for name, points in curves.items():
        held_out = name.startswith("eval/")
        metric = name.removeprefix("eval/")
        pair = PAIR.match(metric)
        title = f"{pair[1] or 'completions'}: chosen and rejected" if pair else metric
        label = (pair[3] if pair else metric) if not held_out else f"{pair[3] if pair else metric}, held out"
        groups.setdefault(title, []).append(Series(name=label, points=points, held_out=held_out))
    # The training curve first, so that it has the first colour.
    return {title: sorted(group, key=lambda s: s.held_out) for title, group in groups.items()}


def _charts(stage: StageRun) -> tuple[list[Markup], list[Markup]]:
    main: list[tuple[tuple, Markup]] = []
    more: list[tuple[tuple, Markup]] = []
    for title, series in _groups(stage.curves()).items():
        values = [p[1] for s in series for p in s.points]
        # Counters of refused updates say something only when there were some.
        if title in HIDDEN or (title in ("skipped", "streak") and not any(values)):
            continue
        important = bool(MAIN.search(title)) and not MINOR.search(title)
        order = (title != "loss", "loss" not in title, title)
        (main if important else more).append((order, line_chart(title, series)))
    return [chart for _, chart in sorted(main)], [chart for _, chart in sorted(more)]


def _count(value: Any, digits: int = 4) -> str:
    if not isinstance(value, int | float):
        return "–"
    return f"{value:,}" if isinstance(value, int) and value < 1_000_000 else format_number(value, digits)


def _facts(stage: StageRun) -> list[tuple[str, str]]:
    result = stage.result
    facts = [(name, _count(result[name])) for name in ("steps", "parameters") if name in result]
    if not result:
        last = stage.rows[-1].get("step") if stage.rows else 0
        facts.append(("unfinished", f"at step {_count(last)}"))
    if isinstance(result.get("seconds"), int | float):
        facts.append(("time", format_seconds(result["seconds"])))
    if "tokens_per_second" in result:
        facts.append(("tokens per second", _count(result["tokens_per_second"])))
    if "hash" in result:
        facts.append(("hash", str(result["hash"])[:12]))
    return facts


def stage_view(stage: StageRun) -> StageView:
    charts, more = _charts(stage)
    chain = [(str(p.get("stage", "?")), str(p.get("hash", ""))[:12]) for p in stage.parents]
    if stage.result:
        chain.append((stage.name, str(stage.result.get("hash", ""))[:12]))
    return StageView(name=stage.name, facts=_facts(stage), ancestry=chain, charts=charts, more=more)


def _sampled(run: Run, key: str) -> list[StageRun]:
    return [stage for stage in (run.untrained, *run.stages) if stage.samples.get(key)]


def _entries(stage: StageRun, key: str) -> list[dict[str, Any]]:
    return [entry for entry in stage.samples.get(key) or [] if isinstance(entry, dict)]


def samples_table(run: Run) -> tuple[list[str], list[tuple[str, list[str | None]]]]:
    """Stage names, and for each prompt the completion after each of them (None: not sampled)."""
    stages = _sampled(run, "samples")
    columns = [
        {str(entry.get("prompt")): entry.get("completion") for entry in _entries(stage, "samples")} for stage in stages
    ]
    prompts = list(dict.fromkeys(prompt for column in columns for prompt in column))
    rows = [(visible(p), [visible(c[p]) if c.get(p) is not None else None for c in columns]) for p in prompts]
    return [stage.name for stage in stages], rows


def distributions(run: Run) -> list[tuple[str, list[tuple[str, Markup | None]]]]:
    """For each prompt, (stage, bar chart of the likeliest next tokens); one scale within a prompt."""
    stages = _sampled(run, "next_tokens")
    table: dict[str, dict[str, list[tuple[str, float]]]] = {}
    for stage in stages:
        for entry in _entries(stage, "next_tokens"):
            tokens = [
                (visible_token(piece), 100 * p if isinstance(p, int | float) else math.nan)
                for piece, p in entry.get("tokens") or []
            ]
            table.setdefault(str(entry.get("prompt")), {})[stage.name] = tokens
    out = []
    for prompt, by_stage in table.items():
        finite = [p for tokens in by_stage.values() for _, p in tokens if math.isfinite(p)]
        maximum = max(finite, default=1.0)
        charts = [
            (s.name, bar_chart(by_stage[s.name], maximum=maximum, unit="%") if by_stage.get(s.name) else None)
            for s in stages
        ]
        out.append((visible(prompt), charts))
    return out


def time_chart(run: Run) -> Markup | None:
    """Seconds each stage took; None if no stage says."""
    times = [(stage.name, stage.result.get("seconds")) for stage in run.stages]
    known = [(name, float(value)) for name, value in times if isinstance(value, int | float)]
    if not known:
        return None
    return bar_chart(known, maximum=max(v for _, v in known), unit=" s", width=460, label=120)


def environments(run: Run) -> list[tuple[str, list[tuple[str, str]]]]:
    """(stages, (name, value) pairs) of every different machine and set of versions."""
    found: dict[str, list[str]] = {}
    for stage in run.stages:
        environment = stage.result.get("environment")
        if isinstance(environment, dict) and environment:
            found.setdefault(json.dumps(environment, sort_keys=True), []).append(stage.name)
    return [
        (", ".join(names), [(key, str(value)) for key, value in json.loads(text).items()])
        for text, names in found.items()
    ]


__all__ = [
    "UNTRAINED",
    "StageView",
    "distributions",
    "environments",
    "samples_table",
    "stage_view",
    "time_chart",
]
