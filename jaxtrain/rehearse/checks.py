"""What can be told of the recipe at its full size without computing: shapes, schedules, and a look at the data.

A miniature would hide it: two models that differ shrink to the same, heads that do not divide are made to.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
from pathlib import Path
from typing import Any

import jax
from jax.sharding import AbstractMesh

from jaxtrain.config import PPOStage, Recipe, check_vocabulary
from jaxtrain.config_json import read_json
from jaxtrain.config_model import read_model_config
from jaxtrain.data.tokenizer import SavedTokenizer
from jaxtrain.data.tokenizer_base import TextTokenizer
from jaxtrain.models import build_model
from jaxtrain.plan.programs import programs
from jaxtrain.recipe.runtime import overlay
from jaxtrain.rehearse.sources import Sample, is_here
from jaxtrain.sharding import AXES


def check_full_size(recipe: Recipe) -> list[str]:
    """Lines that say what was checked.  Raises ValueError, naming the stage, for what does not fit."""
    tokenizer = _tokenizer(recipe)
    names = ", ".join(stage.name for stage in recipe.stages)
    done = [f"{names}: rows and states divide by their meshes; optimizers and schedules can be built"]
    for stage in recipe.stages:
        programs(stage, recipe, full_mesh(stage.mesh))
        if tokenizer is not None:
            check_vocabulary(stage, tokenizer)
        done += [_check_parent(recipe, stage, *pair) for pair in _parents(stage)]
        done += _check_data(stage, tokenizer)
    return list(dict.fromkeys(filter(None, done)))


def full_mesh(config: Any) -> AbstractMesh:
    """The mesh of the recipe, without devices; an axis that takes all the rest of them takes one."""
    sizes = config.sizes(math.prod(size for axis in AXES if (size := getattr(config, axis)) != -1))
    return AbstractMesh(tuple(sizes.values()), AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES))


def _tokenizer(recipe: Recipe) -> TextTokenizer | None:
    config = recipe.tokenizer
    return config.load() if isinstance(config, SavedTokenizer) and Path(config.directory).is_dir() else None


def _parents(stage: Any) -> list[tuple[str, Any]]:
    """(where parameters come from, the model they are for)."""
    pairs = [(stage.init, stage.model)]
    if isinstance(stage, PPOStage) and stage.critic is not None:
        pairs.append((stage.critic_init or stage.init, stage.critic))
    return [(name, model) for name, model in pairs if name is not None]


def _check_parent(recipe: Recipe, stage: Any, name: str, model: Any) -> str | None:
    """That a parent's parameters are those of the model, for a stage of the recipe or a folder that is here."""
    source = next((one.model for one in recipe.stages if one.name == name), None)
    if source is None and not Path(name).is_dir():
        return None
    fresh = build_model(model).shapes()
    have = build_model(source or read_model_config(Path(name))).shapes()
    try:
        jax.eval_shape(lambda a, b: overlay(a, b, name), fresh, have)
    except ValueError as error:
        raise ValueError(f"stage {stage.name}: {error}") from error
    if source is not None:
        return None
    found, wanted = read_json(Path(name) / "result.json"), _tokenizer(recipe)
    if found is None:
        raise ValueError(f"stage {stage.name}: {name} holds no finished stage (there is no result.json)")
    if wanted is not None and found["tokenizer"] != wanted.digest:
        raise ValueError(f"stage {stage.name}: {name} was trained with another tokenizer than Recipe.tokenizer")
    return f"{name} fits the model of {stage.name}"


def _check_data(stage: Any, tokenizer: TextTokenizer | None) -> list[str]:
    """The first rows of each source, tokenized and packed as for the real run."""
    lines = []
    for data in [stage.data, *(one.data for one in getattr(stage, "evaluation", ()) if one.data is not None)]:
        if tokenizer is None or not is_here(data.source):
            continue
        with tempfile.TemporaryDirectory() as folder:
            try:
                dataclasses.replace(data, source=Sample(source=data.source)).prepare(tokenizer, Path(folder) / "data")
            except ValueError as error:
                raise ValueError(f"stage {stage.name}: {error}") from error
        lines.append(f"{data.source}: its first rows, with the real tokenizer at full length")
    return lines
