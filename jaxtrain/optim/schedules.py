"""Learning-rate schedules: frozen configs that build pure functions of the update count.

Every schedule is ``fn(step) -> float32 scalar`` where ``step`` counts the updates already made, so the
first update reads ``fn(0)``.  Two conventions keep every update of a run useful:

- warm-up gives ``peak * (step + 1) / warmup``: the first update is not wasted on a rate of 0, and the
  last warm-up update is made at ``peak``;
- a decay from step ``a`` to the end N has progress ``(step - a) / (N - a)``: step ``a`` is at the top and
  the bottom is reached at step N, one past the last update.  Beyond N the last value holds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

ScheduleFn = Callable[[Any], Any]
DECAY_SHAPES = ("linear", "sqrt")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """What every schedule has: a highest rate and a linear warm-up to it.

    peak: the highest learning rate.
    warmup_steps: length of the warm-up in updates; or
    warmup_fraction: its length as a fraction of the run, rounded to updates.  At most one of the two.

    Raises ValueError for a rate that is not positive, a fraction outside [0, 1], or both lengths given;
    ``build`` raises ValueError if the parts do not fit in ``total_steps``.
    """

    peak: float
    warmup_steps: int = 0
    warmup_fraction: float = 0.0

    def __post_init__(self):
        if not self.peak > 0:
            raise ValueError(f"{self._name}.peak is {self.peak}; a learning rate must be positive.")
        if self.warmup_steps < 0:
            raise ValueError(f"{self._name}.warmup_steps is {self.warmup_steps}; it must be at least 0.")
        self._check_fraction("warmup_fraction")
        if self.warmup_steps and self.warmup_fraction:
            raise ValueError(
                f"{self._name} has both warmup_steps={self.warmup_steps} and "
                f"warmup_fraction={self.warmup_fraction}; give one of them."
            )

    @property
    def _name(self) -> str:
        return type(self).__name__

    def _check_fraction(self, field: str) -> None:
        value = getattr(self, field)
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{self._name}.{field} is {value}; it must lie between 0 and 1.")

    def warmup(self, total_steps: int) -> int:
        """The number of warm-up updates in a run of ``total_steps``."""
        return self.warmup_steps or round(self.warmup_fraction * total_steps)

    def build(self, total_steps: int) -> ScheduleFn:
        """A traceable function from the update count (int scalar) to the rate (float32 scalar)."""
        if total_steps < 1:
            raise ValueError(f"{self._name} needs at least one step, not {total_steps}.")
        warmup = self.warmup(total_steps)
        if warmup > total_steps:
            raise ValueError(
                f"{self._name}.warmup_steps is {warmup}, more than the run's {total_steps} steps; "
                "shorten it or use warmup_fraction."
            )
        factor = self._after_warmup(total_steps, warmup)

        def rate(step):
            step = jnp.asarray(step)
            ramp = (step + 1).astype(jnp.float32) / max(warmup, 1)
            return (self.peak * jnp.where(step < warmup, ramp, factor(step))).astype(jnp.float32)

        return rate

    def _after_warmup(self, total_steps: int, warmup: int) -> ScheduleFn:
        """The factor of ``peak`` from step ``warmup`` on."""
        raise NotImplementedError


def _progress(step, start: int, end: int):
    """How far ``step`` is from start to end, float32 in [0, 1]; the difference is taken in integers."""
    return jnp.clip((step - start).astype(jnp.float32) / max(end - start, 1), 0.0, 1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Constant(Schedule):
    """``peak`` throughout, after the warm-up."""

    def _after_warmup(self, total_steps, warmup):
        return lambda step: jnp.float32(1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear(Schedule):
    """A straight line from ``peak`` to ``final_fraction * peak``."""

    final_fraction: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        self._check_fraction("final_fraction")

    def _after_warmup(self, total_steps, warmup):
        return lambda step: 1 - (1 - self.final_fraction) * _progress(step, warmup, total_steps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WarmupCosine(Schedule):
    """Half a cosine from ``peak`` to ``final_fraction * peak`` (SGDR without restarts, arXiv 1608.03983)."""

    final_fraction: float = 0.1

    def __post_init__(self):
        super().__post_init__()
        self._check_fraction("final_fraction")

    def _after_warmup(self, total_steps, warmup):
        def factor(step):
            wave = 0.5 * (1 + jnp.cos(jnp.pi * _progress(step, warmup, total_steps)))
            return self.final_fraction + (1 - self.final_fraction) * wave

        return factor


@dataclasses.dataclass(frozen=True, kw_only=True)
class WarmupStableDecay(Schedule):
    """``peak`` held, then a decay over the last ``decay_fraction`` of the run (arXiv 2404.06395).

    decay_shape: 'linear' (``1 - p``) or 'sqrt' (``1 - sqrt(p)``, arXiv 2405.18392), p the decay's progress.
    final_fraction: the rate at the end, as a fraction of ``peak``.
    """

    decay_fraction: float = 0.2
    decay_shape: str = "sqrt"
    final_fraction: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        self._check_fraction("decay_fraction")
        self._check_fraction("final_fraction")
        if self.decay_shape not in DECAY_SHAPES:
            raise ValueError(
                f"WarmupStableDecay.decay_shape is {self.decay_shape!r}; it must be one of {DECAY_SHAPES}."
            )

    def _after_warmup(self, total_steps, warmup):
        decay = round(self.decay_fraction * total_steps)
        if warmup + decay > total_steps:
            raise ValueError(
                f"WarmupStableDecay has {warmup} warm-up and {decay} decay steps, more than the run's "
                f"{total_steps}; shorten one of them."
            )
        start = total_steps - decay

        def factor(step):
            progress = _progress(step, start, total_steps)
            left = 1 - (jnp.sqrt(progress) if self.decay_shape == "sqrt" else progress)
            return self.final_fraction + (1 - self.final_fraction) * left

        return factor


@dataclasses.dataclass(frozen=True, kw_only=True)
class InverseSqrt(Schedule):
    """``peak * sqrt(W / (step + 1))`` with W the warm-up length, at least 1 (arXiv 1706.03762)."""

    def _after_warmup(self, total_steps, warmup):
        # Below step W the warm-up applies; the maximum only keeps the unused branch finite.
        width = float(max(warmup, 1))
        return lambda step: jnp.sqrt(width / jnp.maximum((step + 1).astype(jnp.float32), width))
