"""ELECTRA (2003.10555): a small generator fills masks, a discriminator finds what it filled."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from jaxtrain.models.encoder import EncoderConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class ElectraConfig(EncoderConfig):
    """embedding_size: of the tables, which a generator and its discriminator share; 0: ``d_model``.

    heads: "mlm" for a generator, "discriminator" for the other.
    """

    HEADS: ClassVar[tuple[str, ...]] = ("mlm", "discriminator")

    embedding_size: int = 0
    heads: tuple[str, ...] = ("discriminator",)

    def __post_init__(self):
        super().__post_init__()
        if self.embedding_size < 0:
            raise ValueError(f"embedding_size must be at least 0, found {self.embedding_size}")

    def embedding_width(self) -> int:
        return self.embedding_size or self.d_model

    def mlm_activation(self) -> str:
        # Whatever the layers have.
        return "gelu"
