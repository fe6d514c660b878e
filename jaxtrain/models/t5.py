"""T5 (1910.10683) and its version 1.1 (2002.05202), which Flan-T5 shares: relative positions, no biases, RMS norms."""

from __future__ import annotations

import dataclasses

from jaxtrain.models.layers import NormSpec
from jaxtrain.models.relative import Relative
from jaxtrain.models.seq2seq import Seq2SeqConfig, Seq2SeqSpec


@dataclasses.dataclass(frozen=True, kw_only=True)
class T5Config(Seq2SeqConfig):
    """By default version 1.0's choices; 1.1 has ``gated=True, activation="gelu_tanh", tie_embeddings=False,
    scale_outputs=False``.

    max_positions: nothing in the parameters ends there, since all distances beyond ``relative_max_distance`` are alike.
    relative_buckets, relative_max_distance: see ``Relative``.
    tie_embeddings: the embeddings are the output matrix too.
    scale_outputs: what the logits are read from is multiplied by ``d_model ** -0.5``.
    gated: ``MLPSpec.gated``.
    """

    max_positions: int = 2**20
    activation: str = "relu"
    norm_eps: float = 1e-6
    init_std: float = 1.0
    tie_embeddings: bool = True
    relative_buckets: int = 32
    relative_max_distance: int = 128
    gated: bool = False
    scale_outputs: bool = True

    def __post_init__(self):
        super().__post_init__()
        self.relative()

    def relative(self) -> Relative:
        """How both sides read positions."""
        return Relative(buckets=self.relative_buckets, max_distance=self.relative_max_distance)

    def spec(self) -> Seq2SeqSpec:
        return Seq2SeqSpec(
            block=self.block_spec(
                NormSpec(eps=self.norm_eps), bias=False, gated=self.gated, post_norm=False, scale=1.0
            ),
            relative=self.relative(),
            final_norm=True,
            tied=self.tie_embeddings,
            output_scale=self.d_model**-0.5 if self.scale_outputs else 1.0,
        )
