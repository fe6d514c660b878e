"""BART (1910.13461): an encoder-decoder that normalises every sum and learns its positions."""

from __future__ import annotations

import dataclasses

from jaxtrain.models.layers import NormSpec
from jaxtrain.models.seq2seq import Seq2SeqConfig, Seq2SeqSpec

# Its tables of positions begin with rows that nothing reads, where fairseq kept the padding's.
FIRST_POSITION = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class BartConfig(Seq2SeqConfig):
    """scale_embedding: embeddings are multiplied by ``sqrt(d_model)``."""

    scale_embedding: bool = False

    def spec(self) -> Seq2SeqSpec:
        return Seq2SeqSpec(
            block=self.block_spec(NormSpec(kind="layer", eps=self.norm_eps), bias=True, gated=False, post_norm=True),
            first_position=FIRST_POSITION,
            embed_norm=True,
            embed_scale=self.d_model**0.5 if self.scale_embedding else 1.0,
            logits_bias=True,
        )
