"""Weights out: a checkpoint of ours as a Hugging Face folder that ``transformers`` loads."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxtrain.checkpoint import read_meta, saved_array
from jaxtrain.config_json import read_json
from jaxtrain.config_model import read_model_config
from jaxtrain.data.tokenizer import load_tokenizer
from jaxtrain.interop.families import FAMILIES
from jaxtrain.interop.family import NEUTRAL
from jaxtrain.interop.huggingface import CONFIG, GENERATION
from jaxtrain.interop.importing import ORIGIN, expected_tensors, leaves_of
from jaxtrain.interop.safetensors import INDEX, SINGLE, SafetensorsWriter
from jaxtrain.interop.weights import Weight
from jaxtrain.models import DecoderConfig, Model, build_model
from jaxtrain.types import Params

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exported:
    """What an export wrote.  left_out: our arrays that have no counterpart.  seconds: wall time."""

    family: str
    parameters: int
    dtype: str
    files: tuple[str, ...]
    tokenizer: bool
    left_out: tuple[str, ...]
    seconds: float


def export_model(
    folder: Path | str, out: Path | str, *, max_shard_bytes: float = 5e9, dtype: str | None = None
) -> Exported:
    """Writes the model of a stage's folder (or of an imported one) to ``out``: config.json, safetensors,
    the tokenizer's files and generation_config.json.

    One rule's arrays are in memory at a time.
    dtype: "float32" or "bfloat16"; as stored by default.

    Raises ValueError, naming the field, for a model that transformers has no class for, and for an ``out`` that has
    weights already.
    """
    folder = Path(folder)
    config = read_model_config(folder)
    checkpoints = folder / "checkpoints"
    tokenizer = load_tokenizer(folder / "tokenizer") if (folder / "tokenizer").is_dir() else None
    saved = read_meta(checkpoints)
    return _export(
        config,
        lambda path: saved_array(checkpoints, saved, "params", path),
        Path(out),
        tokenizer=tokenizer,
        origin=read_json(folder / ORIGIN) or {},
        max_shard_bytes=max_shard_bytes,
        dtype=dtype,
    )


def export_params(
    model: Model,
    params: Params,
    out: Path | str,
    *,
    tokenizer: Any = None,
    max_shard_bytes: float = 5e9,
    dtype: str | None = None,
) -> Exported:
    """The same from parameters in memory."""
    leaves = leaves_of(params)
    return _export(
        model.config,
        lambda path: np.asarray(leaves[path]),
        Path(out),
        tokenizer=tokenizer,
        origin={},
        max_shard_bytes=max_shard_bytes,
        dtype=dtype,
    )


def _export(
    config: Any,
    array: Callable[[str], np.ndarray],
    out: Path,
    *,
    tokenizer: Any,
    origin: Mapping[str, Any],
    max_shard_bytes: float,
    dtype: str | None,
) -> Exported:
    began = time.perf_counter()
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; {' or '.join(map(repr, DTYPES))}")
    if max_shard_bytes <= 0:
        raise ValueError(f"a shard of {max_shard_bytes:g} bytes holds nothing; give more")
    config = as_family_config(config)
    family = next((family for family in FAMILIES.values() if family.config is type(config)), None)
    if family is None:
        raise ValueError(f"a {type(config).__name__} has no counterpart in transformers that can be exported to")
    _check_heads(config)
    model = build_model(config)
    rules = family.weights(config)
    covered = {path for rule in rules for path in rule.ours}
    leaves = leaves_of(model.shapes())
    left_out = tuple(path for path in leaves if path not in covered)
    assert all(path.startswith(("reward_head", "value_head")) for path in left_out), left_out
    described = {"model_type": family.model_type, "architectures": [family.architectures[0]]}
    described |= family.write_config(config)

    out.mkdir(parents=True, exist_ok=True)
    old = [name for name in (INDEX, SINGLE) if (out / name).exists()] + [p.name for p in out.glob("*.safetensors")]
    if old:
        raise ValueError(f"{out} holds weights already ({old[0]}); choose another --out")
    kinds = {path: DTYPES[dtype] if dtype else np.dtype(leaf.dtype) for path, leaf in leaves.items()}
    architecture = described["architectures"][0]
    bare = architecture.endswith("Model") and not architecture.endswith("LMHeadModel")
    strip = family.base_prefix if bare else ""
    plan = _plan(expected_tensors(leaves, rules), rules, kinds, strip)
    writer = SafetensorsWriter(out, plan, max_shard_bytes=max_shard_bytes)
    for rule in rules:
        _write_rule(rule, array, kinds, writer, strip)
    files = [path.name for path in writer.finish()]

    neutral = {name: value for name, value in origin.get("config", {}).items() if name in NEUTRAL - _OURS}
    written = {**neutral, **_special_ids(tokenizer, neutral), **described, "dtype": dtype or config.param_dtype}
    written |= {"torch_dtype": written["dtype"]}  # the name that transformers 4 reads
    texts = {CONFIG: _text(written)}
    generation = origin.get("generation") or _special_ids(tokenizer, {})
    if generation and "lm" in getattr(config, "heads", ()):
        texts[GENERATION] = _text(generation)
    if tokenizer is not None:
        texts |= tokenizer.export_files()
    for name, data in texts.items():
        _write(out / name, data)
    return Exported(
        family=family.name,
        parameters=model.num_params(),
        dtype=written["dtype"],
        files=(*files, *texts),
        tokenizer=tokenizer is not None,
        left_out=left_out,
        seconds=time.perf_counter() - began,
    )


_OURS = frozenset({"architectures", "auto_map", "dtype", "torch_dtype", "model_type", "quantization_config",
                   "transformers_version", "_name_or_path", "_commit_hash"})  # fmt: skip


def as_family_config(config: Any) -> Any:
    """A plain DecoderConfig as the family that computes the same: Llama, or with norms of queries and keys, Qwen 3.
    Dropout, which is of training only, stays behind.

    Raises ValueError, naming the field, where there is none.
    """
    if type(config) is not DecoderConfig:
        return config
    name = "qwen3" if config.qk_norm else "llama"
    if name not in FAMILIES:
        raise ValueError(f"qk_norm = {config.qk_norm}: no family that can be exported has it")
    fields = {
        field.name: getattr(config, field.name) for field in dataclasses.fields(config) if field.name != "qk_norm"
    }
    family = FAMILIES[name].config
    known = {field.name for field in dataclasses.fields(family)}
    return family(**{key: value for key, value in fields.items() if key in known})


def _check_heads(config: Any) -> None:
    heads = getattr(config, "heads", ())
    if isinstance(config, DecoderConfig) and "lm" not in heads:
        raise ValueError(
            f"a model with heads = {heads} writes no text, and transformers has no class that scores every token as it "
            "does; export the stage that it began from, or use it through jaxtrain"
        )


def _plan(
    shapes: Mapping[str, tuple[int, ...]], rules: Sequence[Weight], kinds: Mapping[str, np.dtype], strip: str
) -> list[tuple[str, np.dtype, tuple[int, ...]]]:
    """(name, dtype, shape) of every tensor, ordered by layer, so that a layer's tensors lie together."""
    plan = []
    for rule in rules:
        for index, names in rule.slices():
            for name in names:
                kind = kinds[rule.ours[0]]
                plan.append((index[:1] if rule.layers else (-1,), name.removeprefix(strip), kind, shapes[name]))
    plan.sort(key=lambda entry: entry[0])
    return [(name, kind, shape) for _, name, kind, shape in plan]


def _write_rule(
    rule: Weight,
    array: Callable[[str], np.ndarray],
    kinds: Mapping[str, np.dtype],
    writer: SafetensorsWriter,
    strip: str,
) -> None:
    arrays = [array(path) for path in rule.ours]
    for index, names in rule.slices():
        parts = [whole[index].astype(kinds[path], copy=False) for path, whole in zip(rule.ours, arrays, strict=True)]
        for name, tensor in zip(names, rule.to_theirs(parts), strict=True):
            writer.write(name.removeprefix(strip), tensor)


def _special_ids(tokenizer: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json and generation_config.json say of a tokenizer, where it is not ``given``."""
    if tokenizer is None:
        return {}
    stops = list(tokenizer.stop_ids)
    ids = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": stops[0] if len(stops) == 1 else stops or tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
    }
    return {name: value for name, value in ids.items() if value is not None and name not in given}


def _text(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _write(path: Path, data: bytes) -> None:
    scratch = path.with_name(f"{path.name}.tmp")
    scratch.write_bytes(data)
    os.replace(scratch, path)
