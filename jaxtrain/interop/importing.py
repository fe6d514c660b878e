"""Weights in: their tensors read one at a time into arrays that lie where they belong, on one device or on a mesh."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtrain.checkpoint import Checkpoints, load_params, read_meta
from jaxtrain.config_json import hash_json, read_json, to_json, write_json
from jaxtrain.config_model import read_model_config
from jaxtrain.data.tokenizer import load_tokenizer
from jaxtrain.interop.family import Family, Fields
from jaxtrain.interop.huggingface import Source, find_family, open_source, with_names
from jaxtrain.interop.safetensors import Reader
from jaxtrain.interop.weights import Weight
from jaxtrain.models import Model, build_model
from jaxtrain.sharding import MeshConfig, make_mesh, param_shardings
from jaxtrain.types import Params, path_name

log = logging.getLogger("jaxtrain")
SMALL = 2**24  # bytes of an array that is put together on the host
FLOATS = {"float64", "float32", "float16", "bfloat16"}
# Beside checkpoints/ and tokenizer/ in an imported folder.
RECORD, RESULT, ORIGIN = "import.json", "result.json", "huggingface.json"


def load_pretrained(
    source: Path | str, *, mesh: Mesh | None = None, dtype: str | None = None, max_positions: int | None = None
) -> tuple[Model, Params, Any]:
    """(model, parameters, tokenizer or None) of a Hugging Face folder, a GGUF file, or a stage's folder.

    mesh: where the parameters are made, split as the model's rules say; one device by default.
    dtype: "float32" or "bfloat16", of parameters and computation; by default as stored (float16 becomes float32, and
        so does a mixture that bfloat16 would round).
    max_positions: the longest text, in place of the source's (less means smaller caches).

    Raises ValueError for what is damaged, unknown, or does not fit together.
    """
    source = Path(source)
    mesh = make_mesh(MeshConfig()) if mesh is None else mesh
    if (source / "checkpoints").is_dir():
        return _load_stage(source, mesh, dtype, max_positions)
    return _load_source(open_source(source), mesh, dtype, max_positions)


def _load_stage(folder: Path, mesh: Mesh, dtype: str | None, max_positions: int | None) -> tuple[Model, Params, Any]:
    config = read_model_config(folder)
    target = _abstract(build_model(config), mesh)
    params = load_params(folder / "checkpoints", target)
    config = _changed(config, dtype, max_positions)
    model = build_model(config)
    params = jax.tree.map(lambda x, want: x.astype(want.dtype), params, _abstract(model, mesh))
    tokenizer = load_tokenizer(folder / "tokenizer") if (folder / "tokenizer").is_dir() else None
    return model, params, tokenizer


def _load_source(source: Source, mesh: Mesh, dtype: str | None, max_positions: int | None) -> tuple[Model, Params, Any]:
    family = find_family(source.fields, source.path)
    config = read_config(family, source)
    reader = with_names(source.reader, family)
    rules = check_tensors(family, config, reader, source.path)
    config = _changed(config, dtype or _stored_dtype(config, rules, reader), max_positions)
    tokenizer = source.tokenizer() if source.tokenizer else None
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"{source.path}: the tokenizer has {tokenizer.vocab_size:,} ids, but the embedding only "
            f"{config.vocab_size:,} rows: they do not belong together"
        )
    model = build_model(config)
    return model, fill(model, rules, reader, mesh), tokenizer


def read_config(family: Family, source: Source) -> Any:
    """Our config of a source.  Raises ValueError for what the family cannot represent."""
    fields = Fields(source.fields)
    try:
        config = family.read_config(fields)
    except ValueError as error:
        raise ValueError(f"{source.path}: {error}") from error
    except TypeError as error:  # a number where a string is due, or the like
        raise ValueError(f"{source.path}: config.json does not describe a {family.name} model ({error})") from error
    if fields.unread():
        log.warning(
            "%s: config.json has fields that mean nothing for %s: %s", source.path, family.name, fields.unread()
        )
    return family.as_stored(config, set(source.reader.names()))


def _changed(config: Any, dtype: str | None, max_positions: int | None) -> Any:
    changes: dict[str, Any] = {}
    if dtype is not None:
        changes |= {"param_dtype": dtype, "compute_dtype": dtype}
    if max_positions is not None:
        changes["max_positions"] = max_positions
    return dataclasses.replace(config, **changes) if changes else config


def slice_shapes(leaves: Mapping[str, Any], rule: Weight) -> list[tuple[int, ...]]:
    """The shapes of one slice of a rule's arrays.  leaves: the model's arrays by path."""
    for path in rule.ours:
        assert path in leaves, f"the rule for {rule.theirs} fills {path}, which the model has not"
        found, want = leaves[path].shape[: len(rule.stacked)], rule.stacked
        assert found == want, f"{path} has the leading axes {found}, its rule {want}"
    return [leaves[path].shape[len(rule.stacked) :] for path in rule.ours]


def expected_tensors(leaves: Mapping[str, Any], rules: Sequence[Weight]) -> dict[str, tuple[int, ...]]:
    """name -> shape of every tensor that the rules read.  leaves: the model's arrays by path."""
    expected: dict[str, tuple[int, ...]] = {}
    for rule in rules:
        # One byte each, and never touched where the layout is only seen differently.
        empty = [np.zeros(shape, np.int8) for shape in slice_shapes(leaves, rule)]
        shapes = [array.shape for array in rule.to_theirs(empty)]
        for _, names in rule.slices():
            for name, shape in zip(names, shapes, strict=True):
                assert name not in expected, f"two rules read {name}"
                expected[name] = shape
    return expected


def check_tensors(family: Family, config: Any, reader: Reader, where: Path) -> tuple[Weight, ...]:
    """The rules to follow: all of the family's, less optional ones whose tensors are absent.

    Raises ValueError, listing them, for tensors that are missing, unexpected, of another shape or type, or that
    contradict the config about tied embeddings.
    """
    leaves = leaves_of(build_model(config).shapes())
    names = reader.names()
    rules = [
        rule
        for rule in family.weights(config)
        if not (rule.optional and not any(set(group) & names for _, group in rule.slices()))
    ]
    covered = {path for rule in rules for path in rule.ours}
    missing_rules = [path for path in leaves if path not in covered]
    optional = {path for rule in family.weights(config) if rule.optional for path in rule.ours}
    assert not set(missing_rules) - optional, f"no rule of {family.name} fills {missing_rules}"

    expected = expected_tensors(leaves, rules)
    aliases = dict(family.aliases(config))
    missing = sorted(set(expected) - names)
    if missing:
        hint = ""
        if "lm_head.weight" in missing and getattr(config, "tie_embeddings", None) is False:
            hint = ". config.json says that the output matrix is its own (tie_word_embeddings is false or absent)"
        raise ValueError(f"{where} lacks {len(missing)} tensors of a {family.name} model: {_some(missing)}{hint}")
    ignored = re.compile("|".join(family.ignored) or r"(?!)")
    extra = sorted(name for name in names - set(expected) - set(aliases) if not ignored.fullmatch(name))
    if extra:
        raise ValueError(
            f"{where} has {len(extra)} tensors that a {family.name} model with this config.json has no place for: "
            f"{_some(extra)}"
        )
    for name, shape in expected.items():
        if reader.shape(name) != shape:
            raise ValueError(
                f"{where}: tensor {name} has shape {list(reader.shape(name))}; config.json implies {list(shape)}"
            )
        if str(reader.dtype(name)) not in FLOATS:
            raise ValueError(f"{where}: tensor {name} is {reader.dtype(name)}, not a float; quantised weights?")
    for alias, name in aliases.items():
        if alias in names and not _equal(reader, alias, name):
            raise ValueError(
                f"{where}: config.json ties {alias} to {name} (tie_word_embeddings), but the file holds a different "
                f"{alias}; set tie_word_embeddings to false in config.json if it is meant"
            )
    return tuple(rules)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (f", … ({len(names) - 6} more)" if len(names) > 6 else "")


def _equal(reader: Reader, one: str, other: str) -> bool:
    if reader.shape(one) != reader.shape(other) or reader.dtype(one) != reader.dtype(other):
        return False
    return reader.read(one).tobytes() == reader.read(other).tobytes()


def _stored_dtype(config: Any, rules: Sequence[Weight], reader: Reader) -> str:
    """bfloat16 where no tensor would be rounded by it, else float32."""
    model = build_model(dataclasses.replace(config, param_dtype="bfloat16"))
    leaves = leaves_of(model.shapes())
    for rule in rules:
        if any(leaves[path].dtype == jnp.bfloat16 for path in rule.ours):
            for _, names in rule.slices():
                if any(str(reader.dtype(name)) != "bfloat16" for name in names):
                    return "float32"
    return "bfloat16"


def fill(model: Model, rules: Sequence[Weight], reader: Reader, mesh: Mesh) -> Params:
    """The parameters, made on ``mesh`` and filled layer by layer.

    Beside the arrays themselves, one layer of one rule is in memory; the largest come first, while there is room.
    """
    targets = leaves_of(_abstract(model, mesh))
    done: dict[str, jax.Array] = {}
    shapes = {id(rule): slice_shapes(targets, rule) for rule in rules}
    for rule in sorted(rules, key=lambda rule: -_layer_size(rule, shapes[id(rule)])):
        for path, array in zip(rule.ours, _fill_rule(rule, shapes[id(rule)], targets, reader), strict=True):
            done[path] = array
    absent = set(targets) - set(done)
    if absent:
        fresh = _fresh(model, mesh, frozenset(absent))
        done |= {path: fresh[path] for path in absent}
    return jax.tree_util.tree_map_with_path(lambda path, _: done[path_name(path)], model.shapes())


def _layer_size(rule: Weight, shapes: Sequence[tuple[int, ...]]) -> int:
    return max(1, rule.experts) * sum(math.prod(shape) for shape in shapes)


def _fill_rule(rule: Weight, shapes: list, targets: Mapping[str, Any], reader: Reader) -> list[jax.Array]:
    wanted = [targets[path] for path in rule.ours]

    def parts(names: Sequence[str]) -> list[np.ndarray]:
        found = rule.to_ours([reader.read(name) for name in names], shapes)
        for part, shape in zip(found, shapes, strict=True):
            assert part.shape == shape, f"{names} became {part.shape} instead of {shape}"
        return found

    if not rule.stacked:
        ((_, names),) = rule.slices()
        arrays = [_place(part, want.dtype, want.sharding) for part, want in zip(parts(names), wanted, strict=True)]
        return [array.block_until_ready() for array in arrays]
    # A layer's experts go together: their axis may be split over devices, a layer's never is.  Small stacks do too.
    whole = not rule.layers or sum(want.size * want.dtype.itemsize for want in wanted) <= SMALL
    arrays = [] if whole else [_zeros(want.shape, want.dtype, want.sharding) for want in wanted]
    lead = rule.stacked if whole else rule.stacked[1:]
    last = tuple(count - 1 for count in lead)
    for index, names in rule.slices():
        here = index if whole else index[1:]
        if not any(here):
            stacks = [np.empty((*lead, *shape), want.dtype) for shape, want in zip(shapes, wanted, strict=True)]
        for stack, part in zip(stacks, parts(names), strict=True):
            stack[here] = part
        if here != last:
            continue
        if whole:
            arrays = [_place(stack, want.dtype, want.sharding) for stack, want in zip(stacks, wanted, strict=True)]
        else:
            for number, (stack, want) in enumerate(zip(stacks, wanted, strict=True)):
                spec = PartitionSpec(*want.sharding.spec[1:])
                piece = _place(stack, want.dtype, NamedSharding(want.sharding.mesh, spec))
                # Waited for: pieces read ahead of the device would pile up.
                arrays[number] = _put(want.sharding)(arrays[number], piece, index[0]).block_until_ready()
    return [array.block_until_ready() for array in arrays]


def _place(part: np.ndarray, dtype: Any, sharding: NamedSharding) -> jax.Array:
    """Every device gets its own part only."""
    part = np.ascontiguousarray(part.astype(dtype, copy=False))
    return jax.make_array_from_callback(part.shape, sharding, lambda where: part[where])


def _zeros(shape: tuple[int, ...], dtype: Any, sharding: NamedSharding) -> jax.Array:
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)()


@functools.cache
def _put(sharding: NamedSharding) -> Callable[[jax.Array, jax.Array, int], jax.Array]:
    """Writes one layer into a stack, in place."""

    def put(stack: jax.Array, layer: jax.Array, index: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(stack, layer, index, axis=0)

    return jax.jit(put, donate_argnums=0, out_shardings=sharding)


def _fresh(model: Model, mesh: Mesh, paths: frozenset[str]) -> dict[str, jax.Array]:
    """The leaves that no file holds, as initialised; XLA drops the computation of all others."""
    shardings = {path: leaf.sharding for path, leaf in leaves_of(_abstract(model, mesh)).items() if path in paths}

    def some(key: jax.Array) -> dict[str, jax.Array]:
        return {path: leaf for path, leaf in leaves_of(model.init(key)).items() if path in paths}

    return jax.jit(some, out_shardings=shardings)(jax.random.key(0))


def _abstract(model: Model, mesh: Mesh) -> Params:
    shapes = model.shapes()
    shardings = param_shardings(model.axes, shapes, mesh, model.rules)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def leaves_of(tree: Params) -> dict[str, Any]:
    """path -> leaf."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Imported:
    """What an import read: for the command line to tell.  seconds: wall time, the checkpoint's writing included."""

    config: Any
    kind: str
    parameters: int
    dtype: str
    tokenizer: Any
    seconds: float


def import_model(
    source: Path | str,
    out: Path | str,
    *,
    dtype: str | None = None,
    mesh: Mesh | None = None,
    max_positions: int | None = None,
    force: bool = False,
) -> Imported:
    """Reads ``source`` as ``load_pretrained`` does and writes a folder that looks like a finished stage's.

    force: replace what an earlier import of the same source left in ``out``; nothing else is ever replaced.
    Raises ValueError as ``load_pretrained`` does, and for an ``out`` that is in use.
    """
    began = time.perf_counter()
    source, out = Path(source), Path(out)
    opened = None if (source / "checkpoints").is_dir() else open_source(source)
    if opened is None:
        print_ = hash_json({"path": str(source.resolve()), "checkpoint": read_meta(source / "checkpoints")["digests"]})
    else:
        print_ = opened.fingerprint()
    _claim(out, print_, force)
    mesh = make_mesh(MeshConfig()) if mesh is None else mesh
    if opened is None:
        model, params, tokenizer = _load_stage(source, mesh, dtype, max_positions)
    else:
        model, params, tokenizer = _load_source(opened, mesh, dtype, max_positions)

    out.mkdir(parents=True, exist_ok=True)
    write_json(out / RECORD, {"source": str(source), "fingerprint": print_})
    if tokenizer is not None:
        tokenizer.save(out / "tokenizer")
    digest = "" if tokenizer is None else tokenizer.digest
    chat = _has_chat(source, opened, tokenizer)
    origin = {} if opened is None else {"config": opened.fields, "generation": opened.generation}
    write_json(out / ORIGIN, origin or read_json(source / ORIGIN) or {})
    inputs = {"import": print_, "model": to_json(model.config), "tokenizer": digest}
    key = hash_json(inputs)
    record = {"stage": "import", "hash": key, "model": to_json(model.config), "data": {}, "tokenizer": digest}
    most = max(2**27, max(leaf.nbytes for leaf in jax.tree.leaves(params)))
    checkpoints = Checkpoints(out / "checkpoints", frugal=most)
    try:
        checkpoints.save(0, {"params": params}, {**record, "ancestry": [], "chat": chat})
    finally:
        checkpoints.close()
    seconds = time.perf_counter() - began
    write_json(
        out / RESULT,
        {
            "stage": "import",
            "hash": key,
            "checkpoint": hash_json(read_meta(out / "checkpoints")["digests"]),
            "parents": [],
            "tokenizer": digest,
            "chat": chat,
            "steps": 0,
            "seconds": seconds,
            "tokens_per_second": None,
            "parameters": model.num_params(),
            "evaluation": [],
        },
    )
    return Imported(
        config=model.config,
        kind="stage" if opened is None else opened.kind,
        parameters=model.num_params(),
        dtype=model.config.param_dtype,
        tokenizer=tokenizer,
        seconds=seconds,
    )


def _has_chat(source: Path, opened: Source | None, tokenizer: Any) -> bool:
    if opened is None:
        return bool((read_json(source / RESULT) or {}).get("chat"))
    return getattr(tokenizer, "chat_template", None) is not None


def _claim(out: Path, fingerprint: str, force: bool) -> None:
    """Makes room in ``out``, which may only hold an import of the same source."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; give a folder that does not exist yet")
    if not out.exists() or not any(out.iterdir()):
        return
    record = read_json(out / RECORD)
    if record is None:
        raise ValueError(f"{out} exists and is not an import; choose another --out")
    if record["fingerprint"] != fingerprint:
        raise ValueError(f"{out} holds an import of {record['source']}, or of other weights; choose another --out")
    if (out / RESULT).exists() and not force:
        raise ValueError(f"{out} holds this very import already; --force makes it anew")
    for name in ("checkpoints", "tokenizer"):
        shutil.rmtree(out / name, ignore_errors=True)
    for name in (RESULT, ORIGIN):
        (out / name).unlink(missing_ok=True)
