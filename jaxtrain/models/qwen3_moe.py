"""Qwen3's mixtures of experts (2505.09388)."""

from __future__ import annotations

import dataclasses
import functools
import itertools

from jaxtrain.models.decoder_config import DecoderSpec, LayerSpec
from jaxtrain.models.layers import MLPSpec
from jaxtrain.models.moe import MoESpec
from jaxtrain.models.sparse import MoEConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen3MoeConfig(MoEConfig):
    """d_ff: width of the MLP of dense layers.  expert_d_ff: width of an expert.

    renormalize: the picked experts' weights are divided by their sum.  attention_bias: on queries, keys, values and
    the output.  dense_layers: numbers, from 0, of the layers that have an MLP in the place of experts.
    """

    expert_d_ff: int
    renormalize: bool = True
    attention_bias: bool = False
    dense_layers: tuple[int, ...] = ()
    qk_norm: bool = True
    tie_embeddings: bool = False

    def __post_init__(self):
        if not set(self.dense_layers) < set(range(self.num_layers)):
            raise ValueError(
                f"dense_layers={self.dense_layers} must be some, but not all, of the layers 0 to {self.num_layers - 1}"
            )
        super().__post_init__()

    def layer_spec(self, *, dense: bool = False) -> LayerSpec:
        experts = MoESpec(
            num_experts=self.num_experts,
            top_k=self.top_k,
            d_ff=self.expert_d_ff,
            renormalize=self.renormalize,
            capacity_factor=self.capacity_factor,
            sequence_balance=self.sequence_balance_coef > 0,
        )
        return LayerSpec(
            attention=self.attention_spec(bias=self.attention_bias, out_bias=self.attention_bias),
            mlp=MLPSpec(d_ff=self.d_ff) if dense else experts,
            norm=self.norm(),
        )

    def runs(self) -> dict[str, tuple[int, int, bool]]:
        """Stacks of equal layers by name: (first layer, layers, dense?).  "layers" where all are alike."""
        dense = [layer in self.dense_layers for layer in range(self.num_layers)]
        runs, first = {}, 0
        for kind, group in itertools.groupby(dense):
            count = len(list(group))
            runs["layers" if count == self.num_layers else f"layers_from_{first}"] = (first, count, kind)
            first += count
        return runs

    @functools.cache  # noqa: B019  (as many as there are configs)
    def spec(self) -> DecoderSpec:
        stacks = {name: (self.layer_spec(dense=dense),) * count for name, (_, count, dense) in self.runs().items()}
        return dataclasses.replace(super().spec(), stacks=stacks)
