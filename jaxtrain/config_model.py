"""Model configurations by name, and the model of a folder as a configuration of its own."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from jaxtrain.checkpoint import read_meta
from jaxtrain.config_json import from_json
from jaxtrain.models import FAMILIES, Rope

# What a checkpoint's record may name.
MODEL_CONFIGS: dict[str, type] = {config.__name__: config for config in (*FAMILIES, Rope)}


def read_model_config(folder: Path) -> Any:
    """The model configuration of a stage's folder, or of an imported one.  Raises ValueError where there is none."""
    if not (folder / "checkpoints").is_dir():
        raise ValueError(
            f"{folder} holds no model: it has no checkpoints (want RUN/stages/NAME, or what jaxtrain import wrote)"
        )
    return from_json(read_meta(folder / "checkpoints")["model"], MODEL_CONFIGS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SavedModel:
    """The model of a finished stage or of an imported folder, for a stage that starts from it.

    directory: RUN/stages/NAME, or a folder that ``jaxtrain import`` wrote.
    The other fields replace its own where they are given: its sizes stay as they are.
    """

    directory: str
    heads: tuple[str, ...] | None = None
    max_positions: int | None = None
    rope: Rope | None = None
    dropout: float | None = None
    remat: str | None = None
    scan_unroll: int | None = None
    attention: str | None = None
    compute_dtype: str | None = None
    param_dtype: str | None = None
    quantize: str | None = None

    def resolve(self) -> Any:
        """The family's own configuration.  Raises ValueError where the folder has no model, or a model whose family
        lacks one of the fields."""
        return self.changed(read_model_config(Path(self.directory)))

    def changed(self, config: Any) -> Any:
        """``config`` with the fields that are given."""
        changes = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name != "directory" and getattr(self, field.name) is not None
        }
        lacking = sorted(set(changes) - {field.name for field in dataclasses.fields(config)})
        if lacking:
            raise ValueError(
                f"SavedModel.{lacking[0]}: a {type(config).__name__}, as in {self.directory}, has no such field"
            )
        return dataclasses.replace(config, **changes)


def resolve(config: Any) -> Any:
    """``config``, or what a SavedModel stands for."""
    return config.resolve() if isinstance(config, SavedModel) else config
