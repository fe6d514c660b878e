"""Numbers of a plan, for people."""

from __future__ import annotations

from jaxtrain.plan.chips import GIB


def gib(size: float) -> str:
    """Bytes, in GiB from a tenth of one on, else in MiB."""
    return f"{size / GIB:.2f} GiB" if abs(size) >= GIB / 10 else f"{size / 2**20:.1f} MiB"


def seconds(value: float) -> str:
    """``1.40 s``, ``27.4 ms``, ``310 us``: three figures."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if value >= size:
            shown = value / size
            return f"{shown:.{max(0, 2 - (len(str(int(shown))) - 1))}f} {unit}"
    return "0 s" if value == 0 else f"{value * 1e9:.0f} ns"


def count(number: float) -> str:
    """A large number by its name: ``15.0 trillion``, ``8.19 million``; below a million with commas."""
    for name, size in (("trillion", 1e12), ("billion", 1e9), ("million", 1e6)):
        if number >= size:
            return f"{number / size:,.3g} {name}" if number < 1e3 * size else f"{number / size:,.0f} {name}"
    return f"{number:,.0f}"


def duration(value: float) -> str:
    """Of a run, in seconds: ``1,001 days``, ``2.5 days``, ``3.1 hours``, ``12 minutes``, ``8.2 s``."""
    for unit, size in (("days", 86_400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if value >= size:
            return f"{value / size:,.0f} {unit}" if value >= 10 * size else f"{value / size:.1f} {unit}"
    return seconds(value)
