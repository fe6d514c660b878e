"""The run report: ``write_report`` for the browser, ``format_table`` for the terminal."""

from __future__ import annotations

from jaxtrain.report.html import render, write_report
from jaxtrain.report.table import format_table

__all__ = ["format_table", "render", "write_report"]
