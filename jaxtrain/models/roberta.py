"""RoBERTa (1907.11692): BERT without next-sentence prediction, whose positions start after those of padding."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from jaxtrain.models.encoder import EncoderConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class RobertaConfig(EncoderConfig):
    """position_offset: rows of the table of positions before a segment's first.  heads: "mlm", "pooler"."""

    HEADS: ClassVar[tuple[str, ...]] = ("mlm", "pooler")

    type_vocab_size: int = 1
    norm_eps: float = 1e-5
    position_offset: int = 2
    heads: tuple[str, ...] = ("mlm",)

    def __post_init__(self):
        super().__post_init__()
        if self.position_offset < 0:
            raise ValueError(f"position_offset must be at least 0, found {self.position_offset}")

    def first_position(self) -> int:
        return self.position_offset

    def mlm_activation(self) -> str:
        # Whatever the layers have.
        return "gelu"
