"""``jaxtrain plan``: a recipe's stages on a slice, as tables or as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import jax

from jaxtrain.config import Recipe
from jaxtrain.plan.chips import GIB, Slice, parse_topology
from jaxtrain.plan.compile import missing
from jaxtrain.plan.estimate import Part, StagePlan, plan_stage, remedies
from jaxtrain.plan.roofline import KERNEL_SHARE

SHOWN = 8  # rows of collectives


def run(
    recipe: Recipe,
    topology: str,
    *,
    stage: str | None,
    compiler: bool,
    price: float | None,
    as_json: bool,
    show: Callable[[str], None],
    say: Callable[[str], None],
) -> int:
    """Plans every stage, or one; 0 if all fit, else 1.  show: takes the result, say: what else there is to tell."""
    jax.config.update("jax_platforms", "cpu")
    # Programs for chips that are not here cannot be read back from the cache.
    jax.config.update("jax_enable_compilation_cache", False)
    where = parse_topology(topology)
    chosen = [one for one in recipe.stages if stage in (None, one.name)]
    if not chosen:
        raise ValueError(f"--stage {stage!r}: the stages are {', '.join(one.name for one in recipe.stages)}")
    reason = missing(where) if compiler else "it was not asked (--no_compile)"
    if reason and compiler:
        say(f"jaxtrain: without the compiler: {reason}")
    plans = []
    for one in chosen:
        if reason is None:
            quick = plan_stage(one, recipe, where, compiler=False)
            say(f"{one.name}: by hand {_gib(quick.hbm_bytes_per_chip)} a chip; compiling ...")
        found = plan_stage(one, recipe, where, compiler=reason is None)
        plans.append(found)
        if not as_json:
            show("\n".join(describe(found, price)))
        if not found.fits:
            say(f"jaxtrain: {one.name} does not fit on {where.name}; counted by hand, it would with any of these:")
            for remedy in remedies(one, recipe, found):
                say(f"  {remedy}")
    if as_json:
        show(json.dumps(to_json(plans, where, reason, price)))
    return 0 if all(found.fits for found in plans) else 1


def to_json(plans: list[StagePlan], where: Slice, without_compiler: str | None, price: float | None) -> dict[str, Any]:
    """One object: of the stage that takes longest, and under "stages" of each.

    Bytes are a chip's; flops_per_step are all chips', as they run; mfu counts causal attention and no recomputation.
    """
    rows = [_stage_json(found, price) for found in plans]
    longest = max(rows, key=lambda row: row["days"])
    return {
        "topology": where.name,
        "slices": where.slices,
        "chips": where.chips,
        "without_compiler": without_compiler,
        **longest,
        "fits": all(found.fits for found in plans),
        "stages": rows,
    }


def _stage_json(found: StagePlan, price: float | None) -> dict[str, Any]:
    return {
        "stage": found.name,
        "fits": found.fits,
        "hbm_bytes_per_chip": found.hbm_bytes_per_chip,
        "compiler_bytes_per_chip": found.compiler_bytes_per_chip,
        "usable_bytes_per_chip": found.where.chip.usable_bytes,
        "hbm_bytes_of_a_chip": found.where.chip.hbm_bytes,
        "flops_per_step": found.flops_per_step,
        "seconds_per_step": found.seconds_per_step,
        "mfu": found.mfu(),
        "mfu_non_causal": found.mfu(causal=False),
        "tokens_per_step": found.tokens_per_step,
        "tokens_per_second_per_chip": found.tokens_per_second_per_chip,
        "steps": found.steps,
        "days": found.days,
        "price": None if price is None else found.price(price),
        "collectives": [
            {"program": part.program.name, "calls": part.program.calls, **row}
            for part in found.parts
            for row in part.collectives
        ],
        "programs": [_part_json(part, found.where) for part in found.parts],
    }


def _part_json(part: Part, where: Slice) -> dict[str, Any]:
    each, times = where.chip.devices, part.times
    walked = part.compiled.program if part.compiled else None
    return {
        "name": part.program.name,
        "calls_per_step": part.program.calls,
        "seconds": part.program.calls * times.seconds,
        "seconds_by": {
            name: part.program.calls * getattr(times, name)
            for name in ("matmul", "memory", "kernels", "exposed", "collectives")
        },
        "memory_by_hand": {name: each * size for name, size in part.memory.parts.items()},
        "compiler_bytes_per_chip": None if part.compiled is None else each * part.bytes_by_compiler,
        "compile_seconds": None if part.compiled is None else part.compiled.seconds,
        "flops_per_chip": each * part.flops,
        "unpriced_kernels": list(walked.unpriced) if walked else [],
        "loops_of_unknown_length": list(walked.unknown) if walked else [],
    }


def describe(found: StagePlan, price: float | None) -> list[str]:
    """The lines for people."""
    where = found.where
    usable = where.chip.usable_bytes
    total = found.compiler_bytes_per_chip or found.hbm_bytes_per_chip
    by = "by the compiler" if found.compiler_bytes_per_chip else "by hand"
    verdict = f"fits, {_gib(usable - total)} left" if found.fits else f"DOES NOT FIT, {_gib(total - usable)} too much"
    chips = f"{where.chips} chips of {_gib(usable)} usable"
    lines = [f"{found.name} on {where.slices} x {where.name} ({chips}): {verdict} ({by})"]
    for part in found.parts:
        lines += _memory_lines(part, where)
    lines.append(f"  a step: {found.seconds_per_step:.4g} s for {found.tokens_per_step:,} tokens at best")
    for part in found.parts:
        times, calls = part.times, part.program.calls
        seconds = {
            "matrix units": times.matmul,
            f"attention at {KERNEL_SHARE:.0%} of peak": times.kernels,
            "memory": times.memory,
            f"collectives (of {calls * times.collectives:.3g} in all)": times.exposed,
        }
        shown = " + ".join(f"{calls * value:.3g} {name}" for name, value in seconds.items())
        lines.append(f"    {part.program.name:<20} {calls * times.seconds:9.4g} s = {shown}")
    lines.append(
        f"  {found.flops_per_step:.4g} FLOPs a step as they run; MFU {found.mfu():.1%} (non-causal count "
        f"{found.mfu(causal=False):.1%}); {found.tokens_per_second_per_chip:,.0f} tokens/s/chip"
    )
    cost = "" if price is None else f", ${found.price(price):,.0f} at ${price:g} a chip-hour"
    budget = found.steps * found.tokens_per_step
    lines.append(f"  {found.steps:,} steps, {budget:.4g} tokens: {found.days:.3g} days{cost}")
    for part in found.parts:
        lines += _collective_lines(part)
    return lines


def _memory_lines(part: Part, where: Slice) -> list[str]:
    each = where.chip.devices
    parts = ", ".join(f"{name} {_gib(each * size)}" for name, size in part.memory.parts.items())
    own = f"    {part.program.name:<20} {_gib(each * part.memory.total)} by hand: {parts}"
    if part.compiled is None:
        return [own]
    said = "" if part.compiled.fits else " (refused)"
    return [own, f"    {'':<20} {_gib(each * part.bytes_by_compiler)} by the compiler{said}"]


def _collective_lines(part: Part) -> list[str]:
    if not part.collectives:
        return []
    lines = [f"  collectives of {part.program.name}, a call:"]
    for row in part.collectives[:SHOWN]:
        how = (
            "overlaps" if row["overlaps"] else "asynchronous, nothing between" if row["asynchronous"] else "waited for"
        )
        lines.append(
            f"    {row['kind']:<20} over {'+'.join(row['axes']) or '?':<12} ({row['devices']:>4}) {row['count']:>5} x "
            f"{row['bytes'] / 1e6:9.3f} MB {1e3 * row['seconds']:9.3f} ms  {how}"
        )
    rest = part.collectives[SHOWN:]
    if rest:
        lines.append(f"    and {len(rest)} kinds more, {1e3 * sum(row['seconds'] for row in rest):.3f} ms")
    return lines


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if abs(size) >= GIB / 10 else f"{size / 2**20:.1f} MiB"
