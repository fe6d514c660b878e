"""The summary table: verdicts and the terminal's text."""

from __future__ import annotations

import math

import pytest

from jaxtrain.report import format_table
from jaxtrain.report.table import format_seconds, judge


@pytest.mark.parametrize(
    ("before", "after", "goal", "verdict"),
    [
        (2.0, 1.0, "lower", "better"),
        (1.0, 2.0, "lower", "worse"),
        (1.0, 2.0, "higher", "better"),
        (2.0, 1.0, "higher", "worse"),
        (2.0, 2.0, "lower", "same"),
        (2.0, 1.0, "none", "shown"),
        (math.nan, 1.0, "higher", "unknown"),
        (1.0, math.inf, "lower", "unknown"),
    ],
)
def test_verdicts(before, after, goal, verdict):
    assert judge(before, after, goal) == verdict


def test_the_table_in_the_terminal():
    rows = [
        {"stage": "sft", "metric": "loss", "before": 4.0, "after": 2.5, "better": "lower", "seconds": 61.0},
        {"stage": "sft", "metric": "bits", "before": 2.0, "after": 2.25, "better": "none", "seconds": 61.0},
        {
            "stage": "ppo",
            "metric": "reward",
            "before": 0.5,
            "after": None,
            "better": "higher",
            "seconds": 3700,
        },
    ]
    assert format_table(rows).splitlines() == [
        "stage  metric  before  after  change  verdict        time",
        "-----  ------  ------  -----  ------  -------  ----------",
        "sft    loss         4    2.5    -1.5  better   1 min 01 s",
        "       bits         2   2.25   +0.25",
        "ppo    reward     0.5      -       -  unknown  1 h 01 min",
    ]
    assert format_table(rows).isascii()


def test_an_empty_table():
    assert format_table([]) == "no results"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.85, "850 ms"), (12.34, "12.3 s"), (245, "4 min 05 s"), (7380, "2 h 03 min"), (math.nan, "-")],
)
def test_durations(seconds, text):
    assert format_seconds(seconds) == text
