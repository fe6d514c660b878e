"""What a model scores on data it was not trained on, before and after a stage."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.objectives.common import head, token_logps
from jaxtrain.types import Apply, Array, Loss, Params, Sum, Tokens

BETTER = ("lower", "higher", "none")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measure:
    """One figure of a stage's table.

    metric: a metric of the objective ("loss", "accuracy", "rewards/margins", …).  label: its name in the table.
    better: "lower", "higher", or "none" for a figure that is only shown.
    required: the value that ``--check`` wants to be reached, beyond an improvement; None wants no more.
    """

    metric: str
    label: str
    better: str
    required: float | None = None

    def __post_init__(self):
        if self.better not in BETTER:
            raise ValueError(f"Measure.better is {self.better!r}; one of {BETTER}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Metrics of an objective over held-out rows.

    measures: which.  data, objective: the stage's own when None.  max_batches: 0 reads all of the held-out rows.
    """

    measures: tuple[Measure, ...]
    data: Any = None
    objective: Any = None
    max_batches: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class BitsPerByte:
    """Bits that the model needs for each UTF-8 byte of held-out text: comparable between tokenizers.

    label, better: as for Measure.  data: a TextDataset; the stage's own when None.  max_batches: 0 reads all.
    """

    label: str
    better: str = "lower"
    data: Any = None
    max_batches: int = 0

    def __post_init__(self):
        if self.better not in BETTER:
            raise ValueError(f"BitsPerByte.better is {self.better!r}; one of {BETTER}")


@dataclasses.dataclass(frozen=True, eq=False)
class ByteLoss:
    """Bits per byte as an objective: ``sum nll / ln 2`` over the bytes that the targets stand for.

    Control tokens stand for no bytes and are left out of both sums.  token_bytes: int32 ``[V]``.
    Source: the definition of Gao et al. (2101.00027), summed by token as in nanochat's ``loss_eval``.
    """

    token_bytes: np.ndarray

    def __call__(self, apply: Apply, params: Params, batch: Tokens, rng: Array | None) -> Loss:
        del rng
        sizes = jnp.asarray(self.token_bytes)[batch.targets] * (batch.weights > 0)
        logps = token_logps(head(apply(params, batch), "lm", type(self).__name__), batch.targets)
        total = -jnp.sum(jnp.where(sizes > 0, logps, 0.0)) / math.log(2)
        weight = jnp.sum(sizes).astype(jnp.float32)
        return Loss(total=total, weight=weight, metrics={"bits_per_byte": Sum(total, weight)})


def make_eval_step(apply: Apply, objective: Any) -> Callable[[Params, Any], dict[str, Sum]]:
    """``step(params, batch) -> metrics`` as sums; "loss" is the objective where it has no metric of that name."""

    def step(params: Params, batch: Any) -> dict[str, Sum]:
        loss = objective(apply, params, batch, None)
        return {"loss": Sum(loss.total, loss.weight), **loss.metrics}

    return jax.jit(step)


def evaluate(
    step: Callable[[Params, Any], dict[str, Sum]], params: Params, batches: Iterable[Any], max_batches: int = 0
) -> dict[str, float]:
    """Metrics over all batches: sums are added in float64 and divided once."""
    sums: dict[str, np.ndarray] = {}
    for number, batch in enumerate(batches):
        if max_batches and number == max_batches:
            break
        for name, (total, weight) in jax.device_get(step(params, batch)).items():
            sums[name] = sums.get(name, 0.0) + np.array([total, weight], np.float64)
    if not sums:
        raise ValueError("there are no held-out batches to evaluate on")
    return {name: float(total / weight) if weight else 0.0 for name, (total, weight) in sums.items()}
