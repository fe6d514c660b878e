"""``jaxtrain plan``: a recipe's stages on a slice, as tables or as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import jax

from jaxtrain.config import Recipe
from jaxtrain.plan.chips import Slice, parse_topology
from jaxtrain.plan.compile import missing
from jaxtrain.plan.estimate import Part, StagePlan, plan_stage
from jaxtrain.plan.remedies import remedies
from jaxtrain.plan.roofline import KERNEL_SHARE
from jaxtrain.plan.search import compile_best, search
from jaxtrain.plan.search_text import search_json, search_lines
from jaxtrain.plan.text import count, duration, gib, seconds
from jaxtrain.plan.variants import Load, bindings, gin_lines

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
    load: Load | None = None,
    candidates: int = 0,
) -> int:
    """Plans every stage, or one; 0 if all fit, else 1.  show: takes the result, say: what else there is to tell.

    load: builds the recipe again with more bindings, to try those that are printed.  candidates: above 0, search, and
        compile so many.
    """
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
    plans, searches = [], []
    for one in chosen:
        if candidates:
            found = search(one, recipe, where)
            ranked = found.ranked if reason else compile_best(found, recipe, where, candidates, say)
            lines = gin_lines(bindings(one, ranked[0].stage), one, ranked[0].stage, recipe, load)
            searches.append(search_json(one, found, ranked, lines))
            plans.append(ranked[0].plan)
            shown = [*search_lines(one, found, ranked, lines), "", *describe(ranked[0].plan, price)]
        else:
            plan = plan_stage(one, recipe, where, compiler=False)
            if reason is None:
                say(f"{one.name}: by hand {gib(plan.hbm_bytes_per_chip)} a chip; compiling ...")
                plan = plan_stage(one, recipe, where, compiler=True, by_hand=plan)
            plans.append(plan)
            shown = describe(plan, price)
        if not as_json:
            show("\n".join(shown))
        if not plans[-1].fits:
            _say_remedies(one, recipe, plans[-1], load, say)
    if as_json:
        more = {"search": searches} if candidates else {}
        show(json.dumps(to_json(plans, where, reason, price) | more))
    return 0 if all(plan.fits for plan in plans) else 1


def _say_remedies(stage: Any, recipe: Recipe, plan: StagePlan, load: Load | None, say: Callable[[str], None]) -> None:
    found = remedies(stage, recipe, plan)
    name = f"jaxtrain: {stage.name} does not fit on {plan.where.name}"
    if not found:
        say(f"{name}, nor with any change that was tried: remat, microbatches, ZeRO, bfloat16 moments, the state in")
        say("  the host's memory, other meshes, slices up to eight times as large")
        return
    say(f"{name}; counted by hand, it would with any of these, the cheapest first:")
    for one in found:
        changed = one.bindings(stage)
        lines = [] if one.where != plan.where else gin_lines(changed, stage, one.stage, recipe, load)
        if one.where != plan.where:
            lines = [f"--topology {one.where.name}", *(binding.gin() for binding in changed)]
        say(f"  {gib(one.bytes)} a chip, {one.seconds:.4g} s a step:")
        for line in lines:
            say(f"    {line}")


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
    verdict = f"fits, {gib(usable - total)} left" if found.fits else f"DOES NOT FIT, {gib(total - usable)} too much"
    chips = f"{where.chips} chips of {gib(usable)} usable"
    lines = [f"{found.name} on {where.slices} x {where.name} ({chips}): {verdict} ({by})"]
    for part in found.parts:
        lines += _memory_lines(part, where)
    lines.append(f"  a step: {seconds(found.seconds_per_step)} for {found.tokens_per_step:,} tokens at best")
    for part in found.parts:
        times, calls = part.times, part.program.calls
        spent = {
            "in matrix units": times.matmul,
            f"in attention at {KERNEL_SHARE:.0%} of peak": times.kernels,
            "at the memory's speed": times.memory,
            f"waiting for collectives (of {seconds(calls * times.collectives)} in all)": times.exposed,
        }
        shown = " + ".join(f"{seconds(calls * value)} {name}" for name, value in spent.items() if value)
        many = f", {calls:,} calls" if calls > 1 else ""
        lines.append(f"    {part.program.name:<20} {seconds(calls * times.seconds):>9} = {shown or 'nothing'}{many}")
    lines.append(
        f"  {found.flops_per_step:.4g} FLOPs a step as they run; MFU {found.mfu():.1%} (non-causal count "
        f"{found.mfu(causal=False):.1%}); {found.tokens_per_second_per_chip:,.0f} tokens/s/chip"
    )
    cost = "" if price is None else f", ${found.price(price):,.0f} at ${price:g} a chip-hour"
    budget = found.steps * found.tokens_per_step
    lines.append(f"  {found.steps:,} steps, {count(budget)} tokens: {duration(86_400 * found.days)}{cost}")
    for part in found.parts:
        lines += _collective_lines(part)
    return lines


def _memory_lines(part: Part, where: Slice) -> list[str]:
    each = where.chip.devices
    parts = ", ".join(f"{name} {gib(each * size)}" for name, size in part.memory.parts.items())
    moment = f" in {part.memory.moment}" if part.memory.moment else ""
    own = f"    {part.program.name:<20} {gib(each * part.memory.total):>9} by hand{moment}: {parts}"
    if part.compiled is None:
        return [own]
    said = "" if part.compiled.fits else " (refused)"
    return [own, f"    {'':<20} {gib(each * part.bytes_by_compiler):>9} by the compiler{said}"]


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
            f"{row['bytes'] / 1e6:9.3f} MB {seconds(row['seconds']):>9}  {how}"
        )
    rest = part.collectives[SHOWN:]
    if rest:
        kinds = "kind" if len(rest) == 1 else "kinds"
        lines.append(f"    and {len(rest)} {kinds} more, {seconds(sum(row['seconds'] for row in rest))}")
    return lines
