"""Multi-token prediction (DeepSeek-V3, 2412.19437, section 2.2): layers that look further ahead, in training only.

Letters: B rows, T tokens, D model width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtrain.models.heads import LazyLogits
from jaxtrain.models.layers import Linear, NormSpec, linear_kinds
from jaxtrain.types import Array, Auxiliary, Params, Sum, Tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class MTPSpec:
    """depth: how many further tokens are predicted, one after the other.  coefficient: of the mean of their losses."""

    depth: int
    coefficient: float

    def __post_init__(self):
        if self.depth < 1 or not self.coefficient >= 0:
            raise ValueError(f"multi-token prediction of {self.depth} tokens with a coefficient of {self.coefficient}")


class MTP(nnx.Module):
    """One step ahead: ``norm(block(proj([norm(embedding of the next token); norm(hidden)])))``.

    ``hidden`` is the main model's after its final norm, then the result of the step before, as in the code that runs
    DeepSeek's weights (the paper leaves the norm out).  Embeddings and output matrix are the main model's.
    """

    def __init__(self, block: Callable[[nnx.Rngs], nnx.Module], norm: NormSpec, config: Any, rngs: nnx.Rngs):
        D = config.d_model
        self.embed_norm = norm.build(D, config.param_dtype)
        self.hidden_norm = norm.build(D, config.param_dtype)
        kinds = linear_kinds(config)
        self.proj = Linear(rngs, (2 * D,), (D,), ("mlp", "embed"), std=(2 * D) ** -0.5, **kinds)
        self.block = block(rngs)
        self.norm = norm.build(D, config.param_dtype)

    def __call__(self, hidden: Array, embedded: Array, **kwargs: Any) -> tuple[Array, Any]:
        """Both ``[B * T, D]`` or ``[B, T, D]``; the rest as for the block.  Returns the new hidden states, and what the
        block has to say about its balance."""
        x = jnp.concatenate([self.embed_norm(embedded), self.hidden_norm(hidden)], axis=-1)
        x, _, said = self.block(self.proj(x), **kwargs)
        return self.norm(x), said


def ahead(tokens: Tokens, steps: int) -> Tokens:
    """What lies ``steps`` tokens further in the same segment, in the place of each token; elsewhere padding."""

    def shifted(x):
        return jnp.pad(x[:, steps:], ((0, 0), (0, min(steps, x.shape[1]))))

    same = (shifted(tokens.segments) == tokens.segments) & (tokens.segments > 0)
    return dataclasses.replace(
        tokens,
        ids=jnp.where(same, shifted(tokens.ids), 0),
        targets=jnp.where(same, shifted(tokens.targets), 0),
        weights=jnp.where(same, shifted(tokens.weights), 0.0),
        segments=jnp.where(same, tokens.segments, 0),
    )


def look_ahead(
    spec: MTPSpec,
    call: Callable[..., tuple[Array, Any]],
    params: Params,
    hidden: Array,
    tokens: Tokens,
    *,
    embed: Callable[[Array], Array],
    head: Callable[[Array], LazyLogits],
    rng: Array | None,
    shared: dict[str, Any],
) -> Auxiliary:
    """The losses of predicting what stands 2, 3, … tokens after each token, weighted as the data weighs that token.

    call: ``MTP`` as a function.  params: stacked over steps.  hidden: ``[B * T, D]`` or ``[B, T, D]``.
    embed: ids ``[B, T]`` -> what the layers read.  head: hidden states -> what logits ``[B, T, V]`` are made of.
    Metrics: mtp/nll and mtp/accuracy, over all steps.
    """
    losses, found, counts = {}, [], []
    for step in range(spec.depth):
        later = ahead(tokens, step + 1)
        layer = jax.tree.map(lambda leaf, step=step: leaf[step], params)
        kwargs = {**shared, "segments": later.segments}
        key = None if rng is None else jax.random.fold_in(rng, step)
        hidden, said = call(layer, hidden, embed(later.ids), key, kwargs)
        counts.append(None if said is None else jax.lax.stop_gradient(said["counts"]))

        scores, kept = head(hidden).score(later.targets), later.weights != 0
        nll, right = (jnp.sum(jnp.where(kept, later.weights * value, 0.0)) for value in (-scores.logps, scores.correct))
        weight = jax.lax.stop_gradient(jnp.sum(later.weights.astype(jnp.float32)))
        losses[f"mtp/{step}"] = Sum(spec.coefficient / spec.depth * nll, weight)
        found.append((nll, right, weight))
    nll, right, weight = (jax.lax.stop_gradient(sum(values)) for values in zip(*found, strict=True))
    return Auxiliary(
        losses=losses if spec.coefficient else {},
        metrics={"mtp/nll": Sum(nll, weight), "mtp/accuracy": Sum(right, weight)},
        counts={} if counts[0] is None else {"mtp/block": jnp.stack(counts)},
    )
