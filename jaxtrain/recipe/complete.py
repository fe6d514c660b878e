"""Completing a prompt with the model of a finished stage: its folder holds all that is needed."""

from __future__ import annotations

from pathlib import Path

import jax

from jaxtrain.checkpoint import CheckpointError, load_params, read_meta
from jaxtrain.config_json import from_json
from jaxtrain.data.chat import prompt_ids
from jaxtrain.data.tokenizer import Tokenizer
from jaxtrain.generate.sampling import Sampling
from jaxtrain.generate.text import Completion, GenerateStats, generate_text
from jaxtrain.models import build_model
from jaxtrain.recipe.runtime import MODEL_CONFIGS
from jaxtrain.sharding import MeshConfig, make_mesh
from jaxtrain.train.state import abstract_params


def complete(
    folder: Path, prompt: str, *, max_new_tokens: int, temperature: float, top_k: int, top_p: float, seed: int
) -> tuple[Completion, GenerateStats]:
    """Completes ``prompt`` with the newest checkpoint of the stage folder ``folder`` (``RUN/stages/NAME``).

    A model that has learned the chat format gets the prompt as a user's turn; another continues the text.
    Raises ValueError where the folder has no checkpoint, or its model no language-model head.
    """
    if not (folder / "checkpoints").is_dir():
        raise CheckpointError(f"{folder} is no stage's folder: it has no checkpoints (want RUN/stages/NAME)")
    meta = read_meta(folder / "checkpoints")
    config = from_json(meta["model"], MODEL_CONFIGS)
    if "lm" not in config.heads:
        raise ValueError(f"the model of {folder} has the heads {config.heads}: it cannot write")
    tokenizer = Tokenizer.load(folder / "tokenizer")
    model = build_model(config)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    params = load_params(folder / "checkpoints", abstract_params(model, mesh))

    def encode(text: str) -> list[int]:
        if meta["chat"]:
            return prompt_ids(tokenizer, text).tolist()
        return [tokenizer.bos_id, *tokenizer.encode(text)]

    completions, stats = generate_text(
        model,
        params,
        tokenizer,
        [prompt],
        sampling=Sampling(
            temperature=temperature, top_k=top_k, top_p=top_p, stop_ids=(tokenizer.end_id, tokenizer.eos_id)
        ),
        max_new_tokens=max_new_tokens,
        seed=seed,
        encode=encode,
    )
    return completions[0], stats
