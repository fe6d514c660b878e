"""What the tables of mixtures of experts have in common."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from jaxtrain.interop.weights import Weight, linear
from jaxtrain.models.sparse import MoEConfig

# Their names of an expert's matrices, and ours.
NAMES = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}


def expert_rules(theirs: str, ours: str, experts: int, names: Mapping[str, str] = NAMES, **where: Any) -> list[Weight]:
    """The router and every expert of every layer.

    theirs, ours: of a layer's feed-forward part; theirs has "{layer}" in it.  names: of an expert's matrices.
    """
    return [
        linear(f"{theirs}.gate.weight", f"{ours}/router/kernel", **where),
        *(
            linear(
                f"{theirs}.experts.{{expert}}.{name}.weight", f"{ours}/experts/{kind}/kernel", experts=experts, **where
            )
            for name, kind in names.items()
        ),
    ]


def read_balance(fields: Mapping[str, Any]) -> dict[str, float]:
    """The coefficient of the load-balancing loss, which their training adds only if told to return routers' logits."""
    coefficient = fields.get("router_aux_loss_coef", 0.001)
    return {"load_balance_coef": float(coefficient)}


def write_balance(config: MoEConfig) -> dict[str, float]:
    """The inverse.  Capacity and other losses are choices of training, which their classes do not know."""
    return {"router_aux_loss_coef": config.load_balance_coef}


def restacked(rules: Iterable[Weight], stack: str, *, layers: int, first_layer: int) -> list[Weight]:
    """``rules`` of the arrays below "layers/", for those below ``stack``."""
    return [
        dataclasses.replace(
            rule,
            ours=tuple(path.replace("layers/", f"{stack}/", 1) for path in rule.ours),
            layers=layers,
            first_layer=first_layer,
        )
        for rule in rules
    ]
