"""What a search found, for people and as JSON."""

from __future__ import annotations

from typing import Any

from jaxtrain.plan.search import Candidate, Found, mesh_text, remat_text
from jaxtrain.plan.text import gib, seconds
from jaxtrain.sharding import AXES

SHOWN = 10  # rows, and the recipe's own
# By hand memory is within this of the compiler's: what is nearer to the limit may turn out either way.
NEAR = 0.05


def search_lines(stage: Any, found: Found, ranked: tuple[Candidate, ...], gin: list[str]) -> list[str]:
    """The ranking as a table, and the winner's bindings."""
    where = ranked[0].plan.where
    lines = [
        f"{stage.name} on {where.slices} x {where.name}: {found.counted:,} ways counted by hand in "
        f"{found.seconds:.1f} s, {found.refused} meshes cannot be had; the best of each mesh, remat and accumulate:"
    ]
    table = [("", "mesh", "remat", "accumulate", "a chip", "a step", "MFU", "fits", "by")]
    for place, one in enumerate(ranked, 1):
        if place <= SHOWN or one.own:
            table.append(
                (
                    f"{place}{'*' if one.own else ''}",
                    mesh_text(one.stage),
                    remat_text(one.stage.model),
                    str(one.stage.accumulate),
                    gib(one.bytes),
                    seconds(one.seconds),
                    f"{one.plan.mfu():.1%}",
                    _fits(one),
                    "compiler" if one.compiled else "hand",
                )
            )
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    lines += [
        "  " + "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in table
    ]
    if any(one.own for one in ranked):
        lines.append("  * the recipe as it is")
    if gin:
        return [*lines, "", "the best one's bindings:", *gin]
    return [*lines, "", "the recipe as it is comes first"]


def _fits(one: Candidate) -> str:
    if one.compiled or not one.plan.fits:
        return "yes" if one.plan.fits else "no"
    return "barely" if one.bytes > (1 - NEAR) * one.plan.where.chip.usable_bytes else "yes"


def search_json(stage: Any, found: Found, ranked: tuple[Candidate, ...], gin: list[str]) -> dict[str, Any]:
    """The whole ranking's first rows, and what there was to rank."""
    rows = [_row(place, one) for place, one in enumerate(ranked, 1) if place <= SHOWN or one.own]
    return {
        "stage": stage.name,
        "bindings": gin,
        "counted": found.counted,
        "refused_meshes": found.refused,
        "seconds_by_hand": found.seconds,
        "ranked": rows,
    }


def _row(place: int, one: Candidate) -> dict[str, Any]:
    stage, mesh = one.stage, one.stage.mesh
    return {
        "place": place,
        "mesh": {axis: getattr(mesh, axis) for axis in AXES},
        "zero": mesh.zero,
        "zero_data": mesh.zero_data,
        "remat": getattr(stage.model, "remat", None),
        "remat_save": list(getattr(stage.model, "remat_save", ())),
        "pipeline_rounds": getattr(stage.model, "pipeline_rounds", 1),
        "accumulate": stage.accumulate,
        "bytes_per_chip": one.bytes,
        "seconds_per_step": one.seconds,
        "mfu": one.plan.mfu(),
        "fits": one.plan.fits,
        "by": "compiler" if one.compiled else "hand",
        "own": one.own,
    }
