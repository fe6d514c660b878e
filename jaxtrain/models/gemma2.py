"""Gemma 2 (2408.00118): soft caps, alternating local and global attention, norms before and after every part."""

from __future__ import annotations

import dataclasses
import functools

from jaxtrain.models.decoder_config import DecoderConfig, DecoderSpec, LayerSpec
from jaxtrain.models.layers import MLPSpec, NormSpec
from jaxtrain.models.rope import Rope

KINDS = ("local", "global")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GemmaConfig(DecoderConfig):
    """What Gemma 2 and 3 share.  Embeddings are multiplied by ``sqrt(d_model)``.

    pattern: of "local" and "global"; layer i has ``pattern[i % len(pattern)]``.
    window: in local layers a token sees itself and the ``window - 1`` tokens before it.
    query_pre_attn_scalar: attention logits are divided by its square root; 0 means ``head_dim``.
    final_softcap: next-token logits become ``softcap * tanh(logits / softcap)``; 0: unchanged.
    """

    pattern: tuple[str, ...] = ("local", "global")
    window: int = 4096
    query_pre_attn_scalar: int = 0
    final_softcap: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        if not self.pattern or set(self.pattern) - set(KINDS):
            raise ValueError(f"pattern must be made of {KINDS}, found {self.pattern}")
        if "local" in self.pattern and self.window < 1:
            raise ValueError(f"window={self.window}, but local layers need at least 1")
        if self.query_pre_attn_scalar < 0 or self.final_softcap < 0:
            raise ValueError(
                "query_pre_attn_scalar and final_softcap must not be negative, found "
                f"{self.query_pre_attn_scalar} and {self.final_softcap}"
            )

    def norm(self) -> NormSpec:
        return NormSpec(eps=self.norm_eps, plus_one=True)

    def kind_spec(self, kind: str) -> LayerSpec:
        """A "local" or "global" layer."""
        return self._kind_spec(kind, self.rope)

    def _kind_spec(self, kind: str, rope: Rope, softcap: float = 0.0) -> LayerSpec:
        return LayerSpec(
            attention=self.attention_spec(
                rope=rope,
                window=self.window if kind == "local" else 0,
                softcap=softcap,
                scale=(self.query_pre_attn_scalar or self.head_dim) ** -0.5,
            ),
            mlp=MLPSpec(d_ff=self.d_ff, activation="gelu_tanh"),
            norm=self.norm(),
            norms=("pre", "post"),
        )

    def kinds(self) -> tuple[str, ...]:
        """ "local" or "global", for every layer."""
        return tuple(self.pattern[i % len(self.pattern)] for i in range(self.num_layers))

    @functools.cache  # noqa: B019  (as many as there are configs)
    def spec(self) -> DecoderSpec:
        kinds = {kind: self.kind_spec(kind) for kind in KINDS}
        return DecoderSpec(
            stacks={"layers": tuple(kinds[kind] for kind in self.kinds())},
            norm=self.norm(),
            embed_scale=self.d_model**0.5,
            final_softcap=self.final_softcap,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gemma2Config(GemmaConfig):
    """attention_softcap: attention logits become ``softcap * tanh(logits / softcap)``; 0: unchanged."""

    attention_softcap: float = 50.0
    final_softcap: float = 30.0

    def __post_init__(self):
        super().__post_init__()
        if self.attention_softcap < 0:
            raise ValueError(f"attention_softcap must not be negative, found {self.attention_softcap}")

    def kind_spec(self, kind: str) -> LayerSpec:
        return self._kind_spec(kind, self.rope, self.attention_softcap)
