"""What the stages of a run share: tokenizer, prepared data, and the checkpoints they start from."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from jaxtrain.checkpoint import load_params
from jaxtrain.config import Recipe
from jaxtrain.config_json import hash_json, read_json, to_json, write_json
from jaxtrain.config_model import read_model_config
from jaxtrain.data.datasets import Prepared, open_prepared
from jaxtrain.data.tokenizer import SavedTokenizer, SentencePieceBPE, load_tokenizer
from jaxtrain.data.tokenizer_base import TextTokenizer
from jaxtrain.distributed import check_same, writer_first
from jaxtrain.models import DecoderConfig, Model, build_model
from jaxtrain.recipe.workspace import code_version, stage_folder
from jaxtrain.train.state import abstract_params, init_params
from jaxtrain.types import Params, path_name

# What a stage may have that the checkpoint it starts from lacks.
HEADS = ("lm_head", "reward_head", "value_head", "mtp/")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parent:
    """A checkpoint to start from.  ancestry: the records of its own parents and itself, oldest first."""

    folder: Path
    config: DecoderConfig
    checkpoint: str
    ancestry: tuple[dict[str, str], ...]
    tokenizer: str
    chat: bool


class Runtime:
    """One run: ``out`` is its folder, ``say`` prints a line for the user."""

    def __init__(self, recipe: Recipe, out: Path, say: Callable[[str], None]):
        self.recipe, self.out, self.say = recipe, out, say
        self.tokenizer: TextTokenizer = writer_first(
            lambda: self._tokenizer(recipe.tokenizer), lambda: load_tokenizer(out / "tokenizer")
        )
        check_same("tokenizer", self.tokenizer.digest)
        self._prepared: dict[Any, Prepared] = {}

    @functools.cached_property
    def code_version(self) -> str:
        return code_version()

    def _tokenizer(self, config: SentencePieceBPE | SavedTokenizer) -> TextTokenizer:
        folder = self.out / "tokenizer"
        if isinstance(config, SavedTokenizer):
            tokenizer = config.load()
            tokenizer.save(folder)
            write_json(self.out / "tokenizer.json", {"hash": tokenizer.digest})
            return tokenizer
        texts = hashlib.sha256()
        for source in config.sources:
            for document in source.documents("train"):
                texts.update(hashlib.sha256(document.encode()).digest())
        key = hash_json({"config": to_json(config), "texts": texts.hexdigest()})
        if read_json(self.out / "tokenizer.json") == {"hash": key}:
            self.say("tokenizer: unchanged")
            return load_tokenizer(folder)
        tokenizer = config.train(folder)
        write_json(self.out / "tokenizer.json", {"hash": key})
        self.say(f"tokenizer: trained, {tokenizer.vocab_size} ids")
        return tokenizer

    def prepare(self, dataset: Any) -> Prepared:
        """The data set on disk, made once for all stages that name an equal one."""
        if dataset not in self._prepared:
            key = hash_json({"data": to_json(dataset), "tokenizer": self.tokenizer.digest})[:12]
            folder = self.out / "data" / f"{type(dataset).__name__}-{key}"

            def make() -> Prepared:
                folder.parent.mkdir(parents=True, exist_ok=True)
                return dataset.prepare(self.tokenizer, folder)

            self._prepared[dataset] = writer_first(make, lambda: open_prepared(folder))
        return self._prepared[dataset]

    def folder(self, name: str) -> Path:
        """The folder of a stage of this run, or of the stage folder ``name`` of another."""
        if any(stage.name == name for stage in self.recipe.stages):
            return stage_folder(self.out, name)
        return Path(name)

    def parent(self, name: str) -> Parent:
        """The finished stage called (or lying at) ``name``."""
        folder = self.folder(name)
        result = read_json(folder / "result.json")
        if result is None:
            raise ValueError(f"{folder} holds no finished stage (there is no result.json)")
        return Parent(
            folder=folder,
            config=read_model_config(folder),
            checkpoint=result["checkpoint"],
            ancestry=(
                *result["parents"],
                {"stage": result["stage"], "hash": result["hash"], "checkpoint": result["checkpoint"]},
            ),
            tokenizer=result["tokenizer"],
            chat=result["chat"],
        )

    def check_tokenizer(self, parent: Parent) -> None:
        """Raises ValueError where a parent of another run was trained on other ids."""
        if parent.tokenizer != self.tokenizer.digest:
            raise ValueError(
                f"{parent.folder} was trained with another tokenizer ({parent.tokenizer[:12]}) than this run's "
                f"({self.tokenizer.digest[:12]}): the same ids would mean other text"
            )

    def load(self, parent: Parent, mesh: Mesh) -> tuple[Model, Params]:
        """A parent's model and parameters, on the mesh."""
        model = build_model(parent.config)
        return model, load_params(parent.folder / "checkpoints", abstract_params(model, mesh))

    def start_params(self, model: Model, parent: Parent | None, mesh: Mesh, seed: int) -> Params:
        """Fresh parameters, overlaid by a parent's: heads that it lacks stay fresh, those it has in excess are left.

        Raises ValueError where the trunks differ.
        """
        fresh = init_params(model, mesh, seed)
        if parent is None:
            return fresh
        _, loaded = self.load(parent, mesh)
        return overlay(fresh, loaded, f"{parent.folder}")


def overlay(fresh: Params, loaded: Params, where: str) -> Params:
    """``fresh`` with every array that ``loaded`` has too.  Raises ValueError, naming them, where they do not fit."""
    have = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(loaded)}
    want = {path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(fresh)}
    left = sorted(path for path in set(have) - want if not path.startswith(HEADS))
    lacking = sorted(path for path in want - set(have) if not path.startswith(HEADS))
    if left or lacking:
        raise ValueError(
            f"the checkpoint {where} is of another model: it lacks {lacking[:4]} and has {left[:4]} in excess"
        )

    def one(path, leaf):
        found = have.get(path_name(path), leaf)
        if found.shape != leaf.shape:
            raise ValueError(
                f"the checkpoint {where} is of another model: {path_name(path)} has shape {found.shape} there and "
                f"{leaf.shape} here"
            )
        return found.astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(one, fresh)
