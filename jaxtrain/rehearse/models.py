"""A decoder in miniature: as few and as small layers as leave every choice of its configuration in place.

By field names, so that a family which shares them needs nothing here: heads stay grouped as they are, layers keep one
period of every pattern, experts stay more than a token takes.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

from jaxtrain.models import Rope

LONGEST = 128  # tokens of the longest row: seconds for what takes hours at 8,192
SHORTEST = 32  # tokens of a row: the markers of a turn, and text on both sides
MOST_POSITIONS = 256  # of tables and caches, however many the model has
WIDTH = 64  # of the residual stream, at least
ON_CPU = ("auto", "xla", "blocked")  # attention that needs no accelerator, and no interpreter of its kernels
VOCABULARY = 512  # ids: 263 that the tokenizer takes, and some pieces


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """What all models of a recipe must divide by, and how much shorter all texts become.

    unit: devices of every mesh, as a common multiple.  tensor, expert, stage: the same of those axes.
    longest: tokens of the recipe's longest row.
    """

    unit: int
    tensor: int
    expert: int
    stage: int
    longest: int

    @property
    def scale(self) -> float:
        return max(1.0, self.longest / LONGEST)

    def length(self, tokens: int) -> int:
        """Of a row.  Longer rows stay at least as long as shorter ones, and divide like the mesh."""
        if self.scale == 1:
            return tokens
        return min(tokens, max(SHORTEST, up(math.ceil(tokens / self.scale), math.lcm(16, 2 * self.unit))))

    def span(self, tokens: int) -> int:
        """Of a window, or of the context before it was stretched."""
        return min(tokens, max(8, math.ceil(tokens / self.scale)))

    def positions(self, tokens: int) -> int:
        """Of a model: at least a row and what is sampled after it."""
        return min(tokens, min(self.length(tokens), max(MOST_POSITIONS, self.length(self.longest))) + SHORTEST)

    def width(self, wanted: int) -> int:
        return up(wanted, self.unit)


def up(number: int, unit: int) -> int:
    """The first multiple of ``unit`` that is at least ``number``."""
    return -(-number // unit) * unit


def shrink_model(config: Any, sizes: Sizes, *, padded: bool) -> Any:
    """padded: the model has more rows than the tokenizer has ids."""
    have = {field.name for field in dataclasses.fields(config)}
    new: dict[str, Any] = {
        "vocab_size": sizes.width(VOCABULARY) + padded * sizes.unit,
        "max_positions": sizes.positions(config.max_positions),
    }
    new |= _heads(config, sizes) | _layers(config, sizes)
    d_model = new["d_model"]
    for name in {"d_ff", "expert_d_ff"} & have:
        new[name] = sizes.width(min(max(d_model * getattr(config, name) // config.d_model, 16), 4 * d_model))
    new["rope"] = _rope(config, sizes, new.get("rope_dim") or new["head_dim"])
    if "num_experts" in have:
        new |= _experts(config, sizes)
    if "mtp_layers" in have:
        new["mtp_layers"] = min(config.mtp_layers, 1)
    if "window" in have and config.window:
        new["window"] = sizes.span(config.window) if config.window < sizes.longest else sizes.length(config.window)
    if config.attention not in ON_CPU:
        new["attention"] = "auto"
    return dataclasses.replace(config, **new)


def _heads(config: Any, sizes: Sizes) -> dict[str, int]:
    """Heads by their ratio, and the widths that follow."""
    ratio = config.num_heads // config.num_kv_heads
    # The heads of a layer are split over tensor, unless there is but one for all queries.
    groups = 1 if config.num_kv_heads == 1 else up(min(config.num_kv_heads, 2), sizes.tensor)
    heads = up(ratio * groups, sizes.tensor)
    new = {"num_heads": heads, "num_kv_heads": groups}
    if hasattr(config, "latent_size"):
        size = sizes.width(16)
        new |= {"plain_dim": 8, "rope_dim": 8, "value_dim": 8, "latent_size": size, "d_model": sizes.width(WIDTH)}
        new |= {"query_rank": size if config.query_rank else 0, "head_dim": 16}
        return new
    filled = config.head_dim * config.num_heads == config.d_model

    def fits(size: int) -> bool:
        turned = int(size * config.rope.fraction)
        divides = heads * size % sizes.unit == 0 or not filled
        return divides and turned >= 4 and turned % 2 == 0

    size = next(filter(fits, itertools.count(up(max(8, WIDTH // heads), 2), 2)))
    return new | {"head_dim": size, "d_model": heads * size if filled else sizes.width(WIDTH)}


def _layers(config: Any, sizes: Sizes) -> dict[str, Any]:
    """Two layers, or one period of a pattern; times what the pipeline shares out."""
    have, count = {field.name for field in dataclasses.fields(config)}, config.num_layers
    new: dict[str, Any] = {}
    rounds = min(getattr(config, "pipeline_rounds", 1), 2)
    if "pipeline_rounds" in have:
        new["pipeline_rounds"] = rounds
    if getattr(config, "pipeline_microbatches", 0):
        a_stage = 1 if config.pipeline_microbatches <= sizes.stage else 2
        new["pipeline_microbatches"] = a_stage * sizes.stage
    turn = sizes.stage * rounds if sizes.stage > 1 else 1
    unroll = min(config.scan_unroll, 2)
    # A loop that is unrolled in part stays a loop.
    few = up(2 * unroll if config.scan_unroll < count else 2, turn)
    if getattr(config, "dense_layers", ()):
        new |= _runs([layer in config.dense_layers for layer in range(count)], few)
    elif getattr(config, "num_dense_layers", 0):
        new |= {"num_dense_layers": 1, "num_layers": 1 + few}
    elif "pattern" in have:
        period = len(config.pattern)
        rest = 1 if count % period and turn == 1 else 0
        new["num_layers"] = min(count, period + rest) if turn == 1 else turn * period
    else:
        new["num_layers"] = min(count, few)
        if getattr(config, "full_layers", 0):
            new["full_layers"] = new["num_layers"] // 2
    new["scan_unroll"] = min(unroll, new["num_layers"])
    return new


def _runs(dense: Sequence[bool], few: int) -> dict[str, Any]:
    """Up to four runs of equal layers; experts' as long as ``few``, but no longer than they were."""
    kept: list[bool] = []
    for kind, group in itertools.islice(itertools.groupby(dense), 4):
        kept += [kind] * min(len(list(group)), 1 if kind else few)
    return {"num_layers": len(kept), "dense_layers": tuple(i for i, kind in enumerate(kept) if kind)}


def _experts(config: Any, sizes: Sizes) -> dict[str, int]:
    """Enough experts that a token does not take them all, in groups of which it does not see all."""
    taken = min(config.top_k, 4)
    groups, top_groups = getattr(config, "groups", 1), getattr(config, "top_groups", 1)
    new = {"top_k": taken}
    few, top = min(groups, 4), top_groups
    if groups > 1:
        top = few if top_groups == groups else min(top_groups, few // 2)
        new |= {"groups": few, "top_groups": top}
    unit = math.lcm(few, sizes.expert)
    count = up(max(2 * few, 2 * taken), unit)
    while top * (count // few) < taken:
        count += unit
    # All experts to every token stays all experts to every token.
    if config.top_k == config.num_experts:
        new["top_k"] = count
    if hasattr(config, "shared_experts"):
        new["shared_experts"] = min(config.shared_experts, 2)
    return new | {"num_experts": count}


def _rope(config: Any, sizes: Sizes, turned: int) -> Rope:
    """The same way to stretch positions, from a context that much shorter."""
    rope, original = config.rope, config.rope.original_max_positions
    pairs = int(turned * rope.fraction) // 2

    def spread(divisors: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(divisors[i * len(divisors) // pairs] for i in range(pairs)) if divisors else ()

    return dataclasses.replace(
        rope,
        original_max_positions=sizes.span(original) if original else 0,
        short_factor=spread(rope.short_factor),
        long_factor=spread(rope.long_factor),
    )
