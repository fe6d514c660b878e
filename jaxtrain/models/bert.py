"""BERT (1810.04805), and what has its architecture: MiniLM and most sentence encoders."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from jaxtrain.models.encoder import EncoderConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class BertConfig(EncoderConfig):
    """heads: "mlm", the logits of masked tokens; "pooler"; "nsp", next-sentence prediction, with its pooler."""

    HEADS: ClassVar[tuple[str, ...]] = ("mlm", "nsp", "pooler")

    heads: tuple[str, ...] = ("mlm", "nsp")
