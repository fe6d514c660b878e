"""Gemma 3's text model (2503.19786): five local layers to a global one, which turn positions at different speeds."""

from __future__ import annotations

import dataclasses

from jaxtrain.models.decoder_config import LayerSpec
from jaxtrain.models.gemma2 import GemmaConfig
from jaxtrain.models.rope import Rope


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gemma3Config(GemmaConfig):
    """rope: of the global layers.  local_theta: the base of the local layers' rope, which is never scaled.

    qk_norm: queries and keys are normalised a head at a time, as in every released model.
    """

    pattern: tuple[str, ...] = ("local",) * 5 + ("global",)
    rope: Rope = Rope(theta=1_000_000.0)
    local_theta: float = 10_000.0
    qk_norm: bool = True

    def kind_spec(self, kind: str) -> LayerSpec:
        return self._kind_spec(kind, Rope(theta=self.local_theta) if kind == "local" else self.rope)
