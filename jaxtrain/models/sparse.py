"""What configs of mixtures of experts share."""

from __future__ import annotations

import dataclasses
import functools

from jaxtrain.models.balance import BalanceSpec
from jaxtrain.models.decoder_config import DecoderConfig, DecoderSpec


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig(DecoderConfig):
    """A decoder whose layers, or most of them, are mixtures of ``num_experts``, ``top_k`` of them for each token.

    capacity_factor: 0 drops no token, see ``MoESpec``.
    load_balance_coef, router_z_coef, sequence_balance_coef: of what training adds to the objective, see
        ``BalanceSpec``.
    """

    num_experts: int
    top_k: int
    capacity_factor: float = 0.0
    load_balance_coef: float = 0.0
    router_z_coef: float = 0.0
    sequence_balance_coef: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        for name in ("load_balance_coef", "router_z_coef", "sequence_balance_coef"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, found {getattr(self, name)}")
        self.spec()  # refuses experts that do not fit

    def balance_spec(self) -> BalanceSpec:
        """What training adds to the objective."""
        return BalanceSpec(
            load_balance=self.load_balance_coef, router_z=self.router_z_coef, sequence=self.sequence_balance_coef
        )

    @functools.cache  # noqa: B019  (as many as there are configs)
    def spec(self) -> DecoderSpec:
        return dataclasses.replace(super().spec(), balance=self.balance_spec())
