"""Charts: ticks, smoothing, thinning, and what the SVG says."""

from __future__ import annotations

import math
import random
import xml.etree.ElementTree as ET

import pytest

from jaxtrain.report.charts import (
    MAX_POINTS,
    Series,
    bar_chart,
    coarse,
    format_number,
    is_noisy,
    line_chart,
    nice_ticks,
    smooth,
    thin,
)

NAN = math.nan


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 10, [0, 2, 4, 6, 8, 10]),
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (2.31, 7.9, [4, 6]),
        (-0.3, 0.25, [-0.2, 0, 0.2]),
        (0, 3e-4, [0, 1e-4, 2e-4, 3e-4]),
        (5, 5, [5]),
    ],
)
def test_ticks_are_round_numbers_inside_the_range(low, high, expected):
    assert nice_ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (2.5, "2.5"),
        (-3, "−3"),
        (12_000, "12k"),
        (3_214_592, "3.215M"),
        (1e-5, "1e-05"),
        (NAN, "NaN"),
        (math.inf, "∞"),
    ],
)
def test_numbers_are_short(value, text):
    assert format_number(value) == text


def test_smoothing_is_centred_and_skips_spikes_and_nan():
    # Radius 1: medians 1, 2, 3, NaN, 5, 6 (of 5 and 7), 7; means of three neighbours that are finite.
    got = smooth([1.0, 2.0, 99.0, NAN, 5.0, 5.0, 7.0, 7.0, 7.0], 1)
    assert math.isnan(got[3])
    assert max(v for v in got if math.isfinite(v)) < 60, "a spike beside a gap is halved"
    steady = smooth([2.0] * 20 + [1e6] + [2.0] * 20, 3)
    assert steady == [2.0] * 41, "a lone spike leaves no trace"
    straight = [float(i) for i in range(40)]
    assert smooth(straight, 4)[5:-5] == pytest.approx(straight[5:-5]), "no lag"


def test_only_noisy_lines_are_smoothed():
    rng = random.Random(0)
    curve = [math.exp(-i / 50) for i in range(300)]
    assert not is_noisy(curve)
    assert not is_noisy([min(i / 20, 1.0) for i in range(300)]), "a kink is not noise"
    assert is_noisy([v + 0.02 * rng.gauss(0, 1) for v in curve])
    assert not is_noisy([3.0] * 50) and not is_noisy([NAN] * 5) and not is_noisy([])


def test_long_runs_are_reduced_before_smoothing():
    points = [(float(i), NAN if 5000 <= i < 6000 else float(i)) for i in range(20_000)]
    got = coarse(points, 100)
    assert len(got) == 100 and got[10][1] == pytest.approx(got[10][0], abs=1)
    assert [i for i, (_, y) in enumerate(got) if math.isnan(y)] == list(range(25, 30))


def test_thinning_keeps_spikes_and_gaps():
    points = [(float(i), math.sin(i)) for i in range(50_000)]
    points[20_001] = (20_001.0, 99.0)
    points[30_001] = (30_001.0, NAN)
    got = thin(points)
    assert len(got) <= MAX_POINTS
    assert (20_001.0, 99.0) in got
    assert any(x == 30_001.0 and math.isnan(y) for x, y in got)
    assert [x for x, _ in got] == sorted(x for x, _ in got)
    assert thin(points[:10]) == points[:10]


def parse(markup):
    """The figure as XML: the drawing must also be well formed as that."""
    return ET.fromstring(str(markup))


def test_line_chart_draws_raw_and_smoothed_lines_and_held_out_dots():
    series = [
        Series(name="loss", points=[(i, 1 / i + 0.1 * (i % 2)) for i in range(1, 101)]),
        Series(name="held out", points=[(50, 0.1), (100, 0.05)], held_out=True),
    ]
    figure = parse(line_chart("loss", series))
    classes = [element.get("class") for element in figure.iter("path")]
    assert classes == ["raw c0", "line c0", "held c1"]
    dots = [e for e in figure.iter("circle") if e.get("class") == "dot c1"]
    assert [dot.find("title").text for dot in dots] == ["held out\nstep 50: 0.1", "held out\nstep 100: 0.05"]
    # The y axis points up: the later, lower value is further down.
    assert float(dots[1].get("cy")) > float(dots[0].get("cy"))
    assert float(dots[1].get("cx")) > float(dots[0].get("cx"))
    ticks = [e.text for e in figure.iter("text")]
    assert {"20", "100", "0.5", "1", "step"} <= set(ticks)
    keys = [e.get("class") for e in figure.iter("i")]
    assert keys == ["key c0", "keydot c1"], "a legend of two"


def test_line_chart_breaks_at_nan_and_says_so():
    points = [(0, 1.0), (1, 2.0), (2, NAN), (3, math.inf), (4, 3.0), (5, 4.0)]
    figure = parse(line_chart("x", [Series(name="x", points=points)]))
    (path,) = figure.iter("path")
    assert path.get("d").count("M") == 2
    assert "nan" not in path.get("d")
    assert sum(e.get("class") == "bad" for e in figure.iter("line")) == 2
    assert figure.find("p").text == "2 not finite"


def test_a_spike_does_not_flatten_the_curve():
    points = [(i, 2.0 + (i % 7) / 10) for i in range(50)]
    assert parse(line_chart("x", [Series(name="x", points=points)])).find("p") is None
    points[25] = (25, 1e9)
    spiked = parse(line_chart("x", [Series(name="x", points=points)]))
    assert spiked.find("p").text == "1 outside the frame"
    assert "2.2" in [e.text for e in spiked.iter("text")]


@pytest.mark.parametrize("points", [[], [(1, NAN)], [(1, NAN), (2, math.inf)]])
def test_line_chart_without_values(points):
    assert parse(line_chart("x", [Series(name="x", points=points)])).find("p").text == "no finite values"


@pytest.mark.parametrize("points", [[(3, 1.5)], [(1, 2.0), (2, 2.0)], [(1, 0.0), (2, 0.0)]])
def test_constant_and_single_values_have_an_axis(points):
    figure = parse(line_chart("x", [Series(name="x", points=points)]))
    assert len(list(figure.iter("circle"))) >= 1
    assert "nan" not in str(line_chart("x", [Series(name="x", points=points)])).lower()


def test_titles_are_escaped():
    text = str(line_chart("<b>&", [Series(name="</svg><script>", points=[(1, 1.0), (2, 2.0)])]))
    assert "<script" not in text and "&lt;b&gt;&amp;" in text
    assert "<i>" not in str(bar_chart([("<i>", 1.0)], maximum=1.0))


def test_bars_are_proportional():
    svg = ET.fromstring(str(bar_chart([("a", 50.0), ("a very long token", 25.0), ("c", NAN)], maximum=50.0, unit="%")))
    widths = [float(e.get("width")) for e in svg.iter("rect")]
    assert widths[1] == pytest.approx(widths[0] / 2) and widths[2] == 0
    names = [e.text for e in svg.iter("text")]
    assert names[0:2] == ["a", "50%"] and names[2].endswith("…")
    assert [e.text for e in svg.iter("title")][1] == "a very long token: 25%"
