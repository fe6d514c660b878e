"""Inline SVG charts: pure functions from numbers to markup.  Colours come from the page's CSS classes.

Text is escaped here: every function returns ``Markup``, safe to put into an autoescaping template.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence

from markupsafe import Markup, escape

WIDTH, HEIGHT = 480, 250
LEFT, RIGHT, TOP, BOTTOM = 56, 14, 12, 38
MAX_POINTS = 600  # drawn per line; a longer run is thinned to the lowest and highest of each bucket
MAX_HOVER = 120  # points that answer the mouse
COLOURS = 5  # classes c0 … c4

Point = tuple[float, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Series:
    """A named line.

    points: (step, value), steps rising; a value may be NaN or infinite, which breaks the line.
    held_out: points measured now and then on held-out data: drawn as dots, never smoothed.
    """

    name: str
    points: Sequence[Point]
    held_out: bool = False


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About ``count`` round numbers (1, 2 or 5 times a power of ten) from ``low`` to ``high``."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next((m * power for m in (1, 2, 5) if m * power >= rough * 0.999), 10 * power)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def format_number(value: float, digits: int = 4) -> str:
    """A short reading: 1234567 -> '1.235M', 0.00001 -> '1e-05', NaN -> 'NaN'."""
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("∞" if value > 0 else "−∞")
    for size, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            unit = 1e3 if suffix == "k" else size
            return f"{value / unit:.{digits}g}{suffix}"
    return f"{value:.{digits}g}".replace("-", "−", 1) if value < 0 else f"{value:.{digits}g}"


def smooth(values: Sequence[float], radius: int) -> list[float]:
    """A moving median, which spikes do not move, and then a short moving mean, both over finite values.

    Windows are centred and shrink towards the ends, to a quarter, so that a steep start is hardly dragged.
    A value that is not finite stays NaN.
    """
    return _moving(_moving(values, radius, statistics.median), max(radius // 3, 1), statistics.fmean)


def _moving(values: Sequence[float], radius: int, average: Callable[[list[float]], float]) -> list[float]:
    out, last = [], len(values) - 1
    for i, value in enumerate(values):
        r = max(min(radius, i, last - i), radius // 4)
        window = [v for v in values[max(i - r, 0) : i + r + 1] if math.isfinite(v)]
        out.append(average(window) if math.isfinite(value) else math.nan)
    return out


def is_noisy(values: Sequence[float]) -> bool:
    """Whether a line needs smoothing: its bends are large against its middle range, on average."""
    finite = sorted(v for v in values if math.isfinite(v))
    spread = finite[int(len(finite) * 0.98)] - finite[int(len(finite) * 0.02)] if finite else 0.0
    bends = [abs(a - 2 * b + c) for a, b, c in zip(values, values[1:], values[2:])]
    bends = [bend for bend in bends if math.isfinite(bend)]
    return spread > 0 and bool(bends) and statistics.fmean(bends) > 0.01 * spread


def thin(points: Sequence[Point], limit: int = MAX_POINTS) -> list[Point]:
    """At most ``limit`` points: of each bucket its lowest and highest, so that spikes survive.

    The first point that is not finite is kept too, as it breaks the line.
    """
    if len(points) <= limit:
        return list(points)
    buckets = limit // 3
    out: list[Point] = []
    for b in range(buckets):
        chunk = points[b * len(points) // buckets : (b + 1) * len(points) // buckets]
        finite = [p for p in chunk if math.isfinite(p[1])]
        kept = {min(finite, key=lambda p: p[1]), max(finite, key=lambda p: p[1])} if finite else set()
        broken = [p for p in chunk if not math.isfinite(p[1])][:1]
        out += sorted([*kept, *broken], key=lambda p: p[0])
    return out


def coarse(points: Sequence[Point], limit: int = MAX_POINTS) -> list[Point]:
    """At most ``limit`` points: the median of each bucket's finite values (NaN if none) at its middle."""
    if len(points) <= limit:
        return list(points)
    out = []
    for b in range(limit):
        chunk = points[b * len(points) // limit : (b + 1) * len(points) // limit]
        finite = [y for _, y in chunk if math.isfinite(y)]
        out.append((chunk[len(chunk) // 2][0], statistics.median(finite) if finite else math.nan))
    return out


def trend(series: Series) -> list[Point]:
    """The smoothed line of a noisy series; empty for one that is shown as it is."""
    points = coarse(series.points)
    values = [y for _, y in points]
    radius = len(points) // 30
    if series.held_out or not radius or not is_noisy(values):
        return []
    return [(x, y) for (x, _), y in zip(points, smooth(values, radius), strict=True)]


def value_range(drawn: Sequence[float], essential: Sequence[float]) -> tuple[float, float]:
    """The y axis: all of ``essential``, and of ``drawn`` all but far outliers, with some room.

    Far: beyond twice the distance of the 5% and 95% quantiles from them, where that distance is not 0.
    """
    ordered = sorted(drawn)
    low, high = ordered[int(len(ordered) * 0.05)], ordered[int(len(ordered) * 0.95)]
    reach = 2 * (high - low) or math.inf
    kept = [*(v for v in ordered if low - reach <= v <= high + reach), *essential]
    low, high = min(kept), max(kept)
    pad = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return low - pad, high + pad


class _Frame:
    """Maps data to the drawing."""

    def __init__(self, x: tuple[float, float], y: tuple[float, float]):
        self.x0, self.x1 = x
        self.y0, self.y1 = y

    def x(self, value: float) -> float:
        return LEFT + (value - self.x0) / (self.x1 - self.x0) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.y0) / (self.y1 - self.y0) * (HEIGHT - TOP - BOTTOM)

    def path(self, points: Sequence[Point]) -> str:
        parts, pen = [], "M"
        for x, y in points:
            if math.isfinite(y):
                parts.append(f"{pen}{self.x(x):.1f} {self.y(y):.1f}")
                pen = "L"
            else:
                pen = "M"
        return "".join(parts)

    def inside(self, y: float) -> bool:
        return self.y0 <= y <= self.y1


def _axes(frame: _Frame, x_label: str) -> list[str]:
    out = []
    for tick in nice_ticks(frame.y0, frame.y1, 6):
        y = frame.y(tick)
        out.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        label = format_number(0.0 if abs(tick) < 1e-12 * (frame.y1 - frame.y0) else tick)
        out.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{label}</text>')
    base = HEIGHT - BOTTOM
    for tick in nice_ticks(frame.x0, frame.x1, 6):
        if tick != round(tick):
            continue
        x = frame.x(tick)
        out.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{base}" y2="{base + 4}"/>')
        out.append(f'<text class="tick" x="{x:.1f}" y="{base + 15}" text-anchor="middle">{format_number(tick)}</text>')
    out.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    out.append(f'<text class="label" x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>')
    return out


def _hover(frame: _Frame, series: Series, colour: str) -> list[str]:
    finite = [p for p in series.points if math.isfinite(p[1]) and frame.inside(p[1])]
    every = 1 if series.held_out else math.ceil(len(finite) / MAX_HOVER)
    kind = "dot" if series.held_out else "hover"
    return [
        f'<circle class="{kind} {colour}" cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="4">'
        f"<title>{escape(series.name)}\nstep {x:g}: {format_number(y, 5)}</title></circle>"
        for x, y in finite[:: max(every, 1)]
    ]


def _legend(series: Sequence[Series]) -> str:
    if len(series) < 2:
        return ""
    keys = (
        f'<span><i class="{"keydot" if s.held_out else "key"} c{i % COLOURS}"></i>{escape(s.name)}</span>'
        for i, s in enumerate(series)
    )
    return f'<span class="legend">{"".join(keys)}</span>'


def line_chart(title: str, series: Sequence[Series], x_label: str = "step") -> Markup:
    """A figure with one line a series: faint raw values and a strong trend where noisy, dots where held out.

    Returns a ``<figure>`` with title, legend if there is more than one series, and a note on what is not
    drawn: values that are not finite, and outliers beyond the frame.  Without any finite value it says so.
    """
    finite = [p for s in series for p in s.points if math.isfinite(p[1])]
    heading = f"<figcaption><b>{escape(title)}</b>{_legend(series)}</figcaption>"
    if not finite:
        return Markup(f'<figure>{heading}<p class="note">no finite values</p></figure>')
    lines = [trend(s) for s in series]
    essential = [p[1] for line in lines for p in line if math.isfinite(p[1])]
    essential += [p[1] for s in series if s.held_out for p in s.points if math.isfinite(p[1])]
    steps = [p[0] for s in series for p in s.points]
    x_range = (min(steps), max(steps)) if min(steps) < max(steps) else (min(steps) - 1, max(steps) + 1)
    frame = _Frame(x_range, value_range([p[1] for p in finite], essential))

    body = _axes(frame, x_label)
    marks: list[str] = []
    for i, (s, line) in enumerate(zip(series, lines, strict=True)):
        colour = f"c{i % COLOURS}"
        if line:
            body.append(f'<path class="raw {colour}" d="{frame.path(thin(s.points))}"/>')
        drawn = line or s.points
        style = "held" if s.held_out else "line"
        body.append(f'<path class="{style} {colour}" d="{frame.path(thin(drawn))}"/>')
        if len(s.points) == 1 and not s.held_out:  # a line of one point would not show
            marks += _hover(frame, dataclasses.replace(s, held_out=True), colour)
        marks += _hover(frame, s, colour)
        for x, y in thin(s.points):
            if not math.isfinite(y):
                at = frame.x(x)
                base = HEIGHT - BOTTOM
                marks.append(
                    f'<line class="bad" x1="{at:.1f}" x2="{at:.1f}" y1="{base - 8}" y2="{base}">'
                    f"<title>{escape(s.name)}\nstep {x:g}: not finite</title></line>"
                )
    notes = []
    bad = sum(not math.isfinite(p[1]) for s in series for p in s.points)
    outside = sum(not frame.inside(p[1]) for p in finite)
    if bad:
        notes.append(f"{bad} not finite")
    if outside:
        notes.append(f"{outside} outside the frame")
    note = f'<p class="note">{", ".join(notes)}</p>' if notes else ""
    return Markup(
        f'<figure>{heading}<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(title)}">{"".join(body)}<g>{"".join(marks)}</g></svg>{note}</figure>'
    )


def bar_chart(
    items: Sequence[tuple[str, float]], *, maximum: float, unit: str = "", width: int = 180, label: int = 74
) -> Markup:
    """Horizontal bars with a label before each and its value after it.

    maximum: the value of a full bar, so that charts side by side compare.
    width, label: pixels in all, and of the labels' column.
    """
    row, room = 20, width - label - 46
    out = []
    for i, (name, value) in enumerate(items):
        y = i * row
        good = math.isfinite(value) and maximum > 0
        length = max(1.0, min(1.0, value / maximum) * room) if good else 0.0
        text = f"{format_number(value, 3)}{unit}"
        short = name if len(name) <= label // 7 else name[: label // 7 - 1] + "…"
        out.append(
            f"<g><title>{escape(name)}: {escape(text)}</title>"
            f'<text class="name" x="{label - 6}" y="{y + 14}" text-anchor="end">{escape(short)}</text>'
            f'<rect class="bar" x="{label}" y="{y + 3}" width="{length:.1f}" height="{row - 6}" rx="2"/>'
            f'<text class="tick" x="{label + length + 5:.1f}" y="{y + 14}">{escape(text)}</text></g>'
        )
    return Markup(
        f'<svg class="bars" viewBox="0 0 {width} {len(items) * row}" width="{width}" '
        f'height="{len(items) * row}">{"".join(out)}</svg>'
    )
