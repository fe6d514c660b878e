"""Optimizers and learning-rate schedules: frozen configs that build optax transformations."""

from __future__ import annotations

from jaxtrain.optim.masks import DEFAULT_DECAY_RULES, decay_mask, frozen_mask, parameter_paths, rule_mask
from jaxtrain.optim.master import MasterState, apply_updates
from jaxtrain.optim.optimizers import Adafactor, AdamW, Lion, Muon, Optimizer
from jaxtrain.optim.schedules import (
    Constant,
    InverseSqrt,
    Linear,
    Schedule,
    WarmupCosine,
    WarmupStableDecay,
)
from jaxtrain.optim.state_axes import state_axes, state_owners

OPTIMIZERS: dict[str, type[Optimizer]] = {cls.__name__: cls for cls in (AdamW, Adafactor, Lion, Muon)}
SCHEDULES: dict[str, type[Schedule]] = {
    cls.__name__: cls for cls in (WarmupCosine, WarmupStableDecay, Linear, Constant, InverseSqrt)
}

__all__ = [
    "DEFAULT_DECAY_RULES",
    "OPTIMIZERS",
    "SCHEDULES",
    "Adafactor",
    "AdamW",
    "Constant",
    "InverseSqrt",
    "Linear",
    "Lion",
    "MasterState",
    "Muon",
    "Optimizer",
    "Schedule",
    "WarmupCosine",
    "WarmupStableDecay",
    "apply_updates",
    "decay_mask",
    "frozen_mask",
    "parameter_paths",
    "rule_mask",
    "state_axes",
    "state_owners",
]
