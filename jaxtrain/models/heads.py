"""What reads the last hidden states: next-token logits, a scalar reward, a value."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtrain.kernels.cross_entropy import reference
from jaxtrain.kernels.cross_entropy.api import cross_entropy, dense_logits
from jaxtrain.kernels.cross_entropy.reference import Scores
from jaxtrain.models.functional import param
from jaxtrain.models.int8 import Int8
from jaxtrain.models.layers import contract, normal
from jaxtrain.sharding import DEFAULT_RULES, ShardingRules, constrain
from jaxtrain.types import Array


class ScalarHead(nnx.Module):
    """``[B, T, D] -> float32 [B, T]``, no bias, computed in float32.

    A reward head starts at std ``1 / sqrt(D + 1)`` (2403.17031), a value head at ``std=0``: a fresh critic then
    says 0 everywhere.
    """

    def __init__(self, size: int, rngs: nnx.Rngs, *, std: float, dtype: Any):
        self.kernel = param(normal(rngs, (size, 1), std, dtype), "embed", "scalar")

    def __call__(self, hidden_BTD: Array) -> Array:
        kernel = self.kernel[...].astype(jnp.float32)
        return jnp.einsum("btd,do->bto", hidden_BTD.astype(jnp.float32), kernel)[..., 0]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["hidden", "matrix", "bias"],
    meta_fields=["table", "softcap", "backend", "rules"],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class LazyLogits:
    """Next-token logits that nobody has computed yet: of all positions they are the largest array of a training step.

    hidden: ``[..., D]`` in the compute dtype, rows and positions (or rows) first.
    matrix: a ``table`` ``[V, D]``, or ``[D, V]``, as it stands among the parameters.  bias: ``[V]`` or None.
    softcap: logits become ``softcap * tanh(logits / softcap)``; 0: unchanged.
    backend: of ``kernels.cross_entropy.api``.
    """

    hidden: Array
    matrix: Array
    bias: Array | None = None
    table: bool
    softcap: float = 0.0
    backend: str = "auto"
    rules: ShardingRules = DEFAULT_RULES

    def score(self, targets: Array, *, temperature: float = 1.0, entropy: bool = False, mean: bool = False) -> Scores:
        """Log-probabilities of ``targets`` and what else is asked for, see ``Scores``."""
        asked = {"temperature": temperature, "entropy": entropy, "mean": mean}
        if isinstance(self.matrix, Int8):
            return reference.scores(self.dense(), targets, **asked)
        return cross_entropy(self.hidden, self.matrix, targets, **self._how(), **asked, backend=self.backend)

    def dense(self) -> Array:
        """``[..., V]`` in float32: for generation and comparisons."""
        if isinstance(self.matrix, Int8):
            assert not self.table and self.bias is None
            logits = contract(self.hidden, self.matrix, preferred_element_type=jnp.float32)
            return self.softcap * jnp.tanh(logits / self.softcap) if self.softcap else logits
        return dense_logits(self.hidden, self.matrix, **self._how())

    def _how(self) -> dict[str, Any]:
        return {"bias": self.bias, "table": self.table, "softcap": self.softcap, "rules": self.rules}


def lazy_logits(hidden: Array, matrix: Array, *, table: bool, rules: ShardingRules, **kwargs: Any) -> LazyLogits:
    """``LazyLogits`` whose matrix is pinned to where its parameter is, so that logits computed later are split too."""
    if not isinstance(matrix, Int8):
        matrix = constrain(matrix, ("vocab", "embed") if table else ("embed", "vocab"), rules)
    return LazyLogits(hidden=hidden, matrix=matrix, table=table, rules=rules, **kwargs)
