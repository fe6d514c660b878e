"""Qwen2 and Qwen2.5 (2407.10671, 2412.15115): biases on queries, keys and values; upper layers may see a window."""

from __future__ import annotations

import dataclasses
import functools

from jaxtrain.models.decoder_config import DecoderConfig, DecoderSpec, LayerSpec
from jaxtrain.models.layers import MLPSpec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen2Config(DecoderConfig):
    """window: a token of the layers after the first ``full_layers`` sees itself and the ``window - 1`` tokens before
    it; 0: all layers see all.  attention_bias: on queries, keys and values."""

    window: int = 0
    full_layers: int = 0
    attention_bias: bool = True

    def __post_init__(self):
        super().__post_init__()
        if self.window < 0:
            raise ValueError(f"window={self.window} must be at least 1, or 0 for none")
        if not 0 <= self.full_layers < max(self.num_layers, 1) or (self.full_layers and not self.window):
            raise ValueError(
                f"full_layers={self.full_layers} are those before the layers with a window: from 0 to "
                f"num_layers - 1 = {self.num_layers - 1}, and 0 where window is 0"
            )

    def layer_spec(self, window: int = 0) -> LayerSpec:
        """A layer with or without a window."""
        return LayerSpec(
            attention=self.attention_spec(bias=self.attention_bias, window=window),
            mlp=MLPSpec(d_ff=self.d_ff),
            norm=self.norm(),
        )

    @functools.cache  # noqa: B019  (as many as there are configs)
    def spec(self) -> DecoderSpec:
        windows = [self.window if i >= self.full_layers else 0 for i in range(self.num_layers)]
        return DecoderSpec(stacks={"layers": tuple(map(self.layer_spec, windows))}, norm=self.norm())
