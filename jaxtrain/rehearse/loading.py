"""Reading a recipe whose models, tokenizer and data may lie elsewhere."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxtrain import config_model, gin_edge
from jaxtrain.config import CONFIGURABLES, Recipe
from jaxtrain.models import LlamaConfig

# Stands in for a model of which nothing is known, not even the family; it is shrunk like any other.
UNKNOWN = dict(
    vocab_size=32768, num_layers=8, d_model=1024, num_heads=8, num_kv_heads=4, d_ff=4096, max_positions=2**20
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loaded:
    """recipe: at its full size.  unknown: folders of SavedModels that are not here, whose models a Llama stands in
    for."""

    recipe: Recipe
    unknown: tuple[str, ...]


def load(file: str, bindings: Sequence[str] = ()) -> Loaded:
    """Reads gin as ``gin_edge.load`` does, except that the folder of a SavedModel may be missing.

    Raises ValueError also for a parent that is neither a stage nor a folder but is spelt almost like a stage.
    """
    unknown: dict[str, None] = {}

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class SavedModel(config_model.SavedModel):
        def resolve(self) -> Any:
            if Path(self.directory).is_dir():
                return super().resolve()
            unknown[self.directory] = None
            return self.changed(LlamaConfig(**UNKNOWN))

    classes = [SavedModel if cls is config_model.SavedModel else cls for cls in CONFIGURABLES]
    recipe = gin_edge.load(Recipe, classes, [file], bindings).config
    names = {stage.name for stage in recipe.stages}
    for stage in recipe.stages:
        for name in stage.parents():
            if name in names or Path(name).is_dir():
                continue
            if meant := difflib.get_close_matches(name, names, n=1):
                raise ValueError(
                    f"stage {stage.name} starts from {name!r}, which is neither one of its stages nor a folder here; "
                    f"did you mean {meant[0]!r}? (A folder that lies elsewhere can be written with its path.)"
                )
    return Loaded(recipe=recipe, unknown=tuple(unknown))
