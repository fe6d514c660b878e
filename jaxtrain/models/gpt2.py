"""GPT-2 (Radford et al., "Language Models are Unsupervised Multitask Learners", 2019)."""

from __future__ import annotations

import dataclasses
import functools

from jaxtrain.models.decoder_config import DecoderConfig, DecoderSpec, LayerSpec
from jaxtrain.models.layers import ACTIVATIONS, MLPSpec, NormSpec
from jaxtrain.models.rope import Rope


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPT2Config(DecoderConfig):
    """A table of ``max_positions`` embeddings instead of RoPE, LayerNorm, a bias everywhere, an MLP without a gate.

    activation: one of ``layers.ACTIVATIONS``.
    """

    activation: str = "gelu_tanh"
    norm_eps: float = 1e-5

    def __post_init__(self):
        super().__post_init__()
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation={self.activation!r}; one of {tuple(ACTIVATIONS)}")
        for name, only in (("num_kv_heads", self.num_heads), ("rope", Rope()), ("qk_norm", False)):
            if getattr(self, name) != only:
                raise ValueError(f"{name}={getattr(self, name)!r}, but GPT-2 has none of that: leave it at {only!r}")

    def norm(self) -> NormSpec:
        return NormSpec(kind="layer", eps=self.norm_eps)

    def layer_spec(self) -> LayerSpec:
        return LayerSpec(
            attention=self.attention_spec(rope=None, bias=True, out_bias=True),
            mlp=MLPSpec(d_ff=self.d_ff, activation=self.activation, gated=False, bias=True),
            norm=self.norm(),
        )

    @functools.cache  # noqa: B019  (as many as there are configs)
    def spec(self) -> DecoderSpec:
        return dataclasses.replace(super().spec(), learned_positions=True)
