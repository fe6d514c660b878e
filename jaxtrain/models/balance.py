"""How evenly a mixture's experts are used: what a layer measures, and what training makes of it.

Letters: B rows, T tokens of a row, N = B * T tokens, E experts, K experts a token, L layers.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxtrain.types import Array, Auxiliary, Params, Sum


@dataclasses.dataclass(frozen=True, kw_only=True)
class BalanceSpec:
    """What training adds to the objective for balance, and how fast it moves the routers' biases.

    load_balance: coefficient of ``E * sum over e of f_e * P_e`` with f_e the part of tokens that picked expert e and
        P_e its mean score, both over all layers and tokens (2101.03961, as transformers has it).
    router_z: coefficient of the mean over tokens and layers of ``logsumexp(router logits) ** 2`` (2202.08906).
    sequence: coefficient of the mean over layers and sequences of ``E / K * sum over e of f_e * P_e`` within each
        sequence (2412.19437, eq. 17-20), which counts by its tokens.
    bias_rate: see ``move_biases``.
    """

    load_balance: float = 0.0
    router_z: float = 0.0
    sequence: float = 0.0
    bias_rate: float = 0.0

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if not getattr(self, field.name) >= 0:
                raise ValueError(f"{field.name} of the balance must be at least 0, found {getattr(self, field.name)}")


def measure(
    logits_NE: Array,
    scores_NE: Array,
    chosen_NE: Array,
    segments_BT: Array,
    top_k: int,
    length: int,
    sequence_axes: tuple[str, ...] = (),
) -> dict[str, Array]:
    """A layer's sums over tokens that are not padding: float32 scalars, and "counts" and "scores" ``[E]``.

    logits: of the router.  scores: what it made of them, adding up to 1.  chosen: 1.0 where a token picked an expert.
    length: tokens of a whole row, to measure "sequence" as well; 0: not.
    sequence_axes: the mesh axes over which rows are split.
    """
    valid_N = segments_BT.reshape(-1) > 0
    # Where, not times: what padding holds is arbitrary.
    squared_N = jnp.where(valid_N, jax.nn.logsumexp(logits_NE, axis=-1) ** 2, 0.0)
    scores_NE = jnp.where(valid_N[:, None], scores_NE, 0.0)
    sums = {
        "tokens": jnp.sum(valid_N.astype(jnp.float32)),
        "counts": jnp.sum(chosen_NE, axis=0),
        "scores": jnp.sum(scores_NE, axis=0),
        "router_z": jnp.sum(squared_N),
    }
    if length:
        sums["sequence"] = _by_sequence(scores_NE, chosen_NE, segments_BT, top_k, length, sequence_axes)
    return sums


def _by_sequence(scores_NE, chosen_NE, segments_BT, top_k: int, length: int, axes: tuple[str, ...]) -> Array:
    """``sum over sequences of tokens * E / K * sum over e of f_e * P_e``, a device's part along ``axes``."""
    B, E = segments_BT.shape[0], scores_NE.shape[1]
    rows_B1 = jnp.arange(B)[:, None]

    def by_segment(x_NE):
        sums = jnp.zeros((B, length + 1, x_NE.shape[-1]), jnp.float32)
        sums = sums.at[rows_B1, segments_BT].add(x_NE.reshape(*segments_BT.shape, -1))
        return jax.lax.psum(sums, axes) if axes else sums

    counts_BSE, scores_BSE = by_segment(chosen_NE), by_segment(scores_NE)
    tokens_BS = jnp.sum(counts_BSE, axis=-1) / top_k
    products_BS = jnp.sum(counts_BSE * scores_BSE, axis=-1) / jnp.maximum(tokens_BS, 1.0)
    total = jnp.sum(products_BS) * E / top_k
    # Every device along the axes has the whole sum.
    return total / jax.lax.axis_size(axes) if axes else total


def auxiliary(spec: BalanceSpec, said: Mapping[str, Any]) -> Auxiliary | None:
    """What ``measure`` found in each layer, stacked by stack of layers, as losses and metrics; None of dense layers.

    Losses have their coefficients in them, and count by tokens.  Metrics: moe/load_balance, moe/router_z and
    moe/sequence_balance are the losses before their coefficients, moe/max_load the busiest expert's tokens over the
    mean in the layer where it is largest, moe/dropped the part of assignments beyond the capacity.
    """
    said = {stack: sums for stack, sums in said.items() if sums is not None}
    if not said:
        return None
    stacks = list(said.values())
    layers = {name: jnp.concatenate([sums[name] for sums in stacks]) for name in stacks[0]}
    count, E = layers["counts"].shape
    tokens = jax.lax.stop_gradient(layers["tokens"][0])
    some = jnp.maximum(tokens, 1.0)
    counts_LE = jax.lax.stop_gradient(layers["counts"])

    used_E, scores_E = (jnp.sum(x, axis=0) / (count * some) for x in (counts_LE, layers["scores"]))
    values = {
        "load_balance": (spec.load_balance, E * jnp.sum(used_E * scores_E)),
        "router_z": (spec.router_z, jnp.sum(layers["router_z"]) / (count * some)),
    }
    if "sequence" in layers:
        values["sequence_balance"] = (spec.sequence, jnp.sum(layers["sequence"]) / (count * some))
    picked_L = jnp.sum(counts_LE, axis=1)
    busiest = jnp.max(jnp.max(counts_LE, axis=1) * E / jnp.maximum(picked_L, 1.0))
    metrics = {f"moe/{name}": Sum(jax.lax.stop_gradient(value) * tokens, tokens) for name, (_, value) in values.items()}
    metrics["moe/max_load"] = Sum(busiest * tokens, tokens)
    metrics["moe/dropped"] = Sum(jax.lax.stop_gradient(jnp.sum(layers["dropped"])), jnp.sum(picked_L))
    return Auxiliary(
        losses={f"moe/{name}": Sum(coef * value * tokens, tokens) for name, (coef, value) in values.items() if coef},
        metrics=metrics,
        counts={stack: jax.lax.stop_gradient(sums["counts"]) for stack, sums in said.items()},
    )


def join(first: Auxiliary | None, second: Auxiliary) -> Auxiliary:
    """Both in one; their names differ."""
    if first is None:
        return second
    return Auxiliary(
        losses={**first.losses, **second.losses},
        metrics={**first.metrics, **second.metrics},
        counts={**first.counts, **second.counts},
    )


def move_biases(rate: float, old: Params, new: Params, counts: Mapping[str, Array]) -> Params:
    """``new`` with every router's bias moved from where it was in ``old``, whatever an optimizer did to it:

        bias_e = old_e + rate * sign(mean load - load_e)        (2408.15664; 2412.19437, section 2.1.2)

    counts: float ``[L, E]`` by the path of a stack of layers: tokens of the update's batch that picked each expert.
    """
    for place, counts_LE in counts.items():
        path = (*place.split("/"), "mlp", "router", "bias")
        bias_LE = functools.reduce(lambda tree, key: tree[key], path, old)
        bias_LE = bias_LE + rate * jnp.sign(jnp.mean(counts_LE, axis=1, keepdims=True) - counts_LE)
        new = _replaced(new, path, bias_LE)
    return new


def _replaced(tree: Params, path: tuple[str, ...], value: Array) -> Params:
    return {**tree, path[0]: _replaced(tree[path[0]], path[1:], value) if len(path) > 1 else value}
