"""GGUF files: weights, perhaps quantised, with their config and tokenizer in one file.

Read here, tensor by tensor; the ``gguf`` package (the extra ``jaxtrain[gguf]``) knows the blocks of quantised ones.
Names and config are given Hugging Face's form, so that one table a family serves both.
"""

from __future__ import annotations

import dataclasses
import math
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from jaxtrain.interop.safetensors import read_into

# ggml's numbers of the types that are read.  The first three are plain.
PLAIN = {0: np.dtype(np.float32), 1: np.dtype(np.float16), 30: np.dtype(ml_dtypes.bfloat16)}
BLOCKS = {2: "Q4_0", 3: "Q4_1", 8: "Q8_0", 12: "Q4_K", 14: "Q6_K"}
OTHER_TYPES = {6: "Q5_0", 7: "Q5_1", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 13: "Q5_K", 15: "Q8_K", 16: "IQ2_XXS",
               17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS",
               24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0",
               39: "MXFP4"}  # fmt: skip
NUMBERS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "u1", 10: "<u8", 11: "<i8", 12: "<f8"}
BOOL, STRING, ARRAY = 7, 8, 9
CHUNK = 2**22  # numbers dequantised at a time: the library takes several float32 arrays of that size


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """A tensor in the file.  ``start``: bytes from the file's beginning."""

    kind: int
    shape: tuple[int, ...]
    start: int


class GGUFFile:
    """The metadata and the tensors of one file, under their GGUF names.

    metadata: plain Python values; arrays are lists.
    Raises ValueError for a file that is damaged, truncated, or has a type of tensor that is not supported.
    """

    def __init__(self, file: Path):
        self.file = file
        self.total = file.stat().st_size
        self.metadata: dict[str, Any] = {}
        self.entries: dict[str, Entry] = {}
        with file.open("rb") as stream:
            if stream.read(4) != b"GGUF":
                raise ValueError(f"{file} is not a GGUF file: it does not begin with 'GGUF'")
            (version,) = struct.unpack("<I", self._take(stream, 4))
            if version not in (2, 3):
                raise ValueError(f"{file} has GGUF version {version}; versions 2 and 3 are read, little-endian")
            tensors, pairs = struct.unpack("<QQ", self._take(stream, 16))
            for _ in range(pairs):
                key = self._string(stream)
                (kind,) = struct.unpack("<I", self._take(stream, 4))
                if key in self.metadata:
                    raise self._damaged(f"the key {key!r} stands in it twice")
                self.metadata[key] = self._value(stream, kind)
            raw = [self._tensor(stream) for _ in range(tensors)]
            alignment = self.metadata.get("general.alignment", 32)
            if type(alignment) is not int or alignment < 1:
                raise self._damaged(f"general.alignment is {alignment!r}")
            data = -(-stream.tell() // alignment) * alignment
        for name, kind, shape, offset in raw:
            entry = Entry(kind=kind, shape=shape, start=data + offset)
            if name in self.entries:
                raise self._damaged(f"the tensor {name} stands in it twice")
            end = entry.start + self._bytes(name, entry)
            if end > self.total:
                raise self._damaged(f"the tensor {name} ends at byte {end:,} of {self.total:,} (truncated?)")
            self.entries[name] = entry

    def _damaged(self, fault: str) -> ValueError:
        return ValueError(f"{self.file} is damaged: {fault}; fetch it again")

    def _take(self, stream: BinaryIO, count: int) -> bytes:
        if count > self.total - stream.tell():
            raise self._damaged(f"{count:,} bytes are due at byte {stream.tell():,} of {self.total:,} (truncated?)")
        return stream.read(count)

    def _string(self, stream: BinaryIO) -> str:
        (length,) = struct.unpack("<Q", self._take(stream, 8))
        # Pieces of a byte-level vocabulary need not be UTF-8 by themselves.
        return self._take(stream, length).decode("utf-8", "surrogateescape")

    def _value(self, stream: BinaryIO, kind: int) -> Any:
        if kind == STRING:
            return self._string(stream)
        if kind == ARRAY:
            inner, count = struct.unpack("<IQ", self._take(stream, 12))
            if inner == STRING:
                if 8 * count > self.total:
                    raise self._damaged(f"a list of {count:,} strings in {self.total:,} bytes")
                return [self._string(stream) for _ in range(count)]
            return self._numbers(stream, inner, count)
        return self._numbers(stream, kind, 1)[0]

    def _numbers(self, stream: BinaryIO, kind: int, count: int) -> list[Any]:
        if kind not in NUMBERS:
            raise self._damaged(f"a value has the unknown type {kind}")
        dtype = np.dtype(NUMBERS[kind])
        values = np.frombuffer(self._take(stream, count * dtype.itemsize), dtype)
        return (values != 0).tolist() if kind == BOOL else values.tolist()

    def _tensor(self, stream: BinaryIO) -> tuple[str, int, tuple[int, ...], int]:
        name = self._string(stream)
        (dims,) = struct.unpack("<I", self._take(stream, 4))
        if dims > 4:
            raise self._damaged(f"the tensor {name} has {dims} dimensions")
        shape = struct.unpack(f"<{dims}Q", self._take(stream, 8 * dims))
        kind, offset = struct.unpack("<IQ", self._take(stream, 12))
        return name, kind, tuple(reversed(shape)), offset

    def _bytes(self, name: str, entry: Entry) -> int:
        size = math.prod(entry.shape)
        if entry.kind in PLAIN:
            return size * PLAIN[entry.kind].itemsize
        if entry.kind not in BLOCKS:
            kind = OTHER_TYPES.get(entry.kind, f"number {entry.kind}")
            raise ValueError(
                f"{self.file}: tensor {name} is of type {kind}; supported are F32, F16, BF16, "
                f"{', '.join(BLOCKS.values())}"
            )
        block, width = _block(entry.kind)
        if not entry.shape or entry.shape[-1] % block:
            raise self._damaged(f"the tensor {name} of shape {entry.shape} does not divide into blocks of {block}")
        return size // block * width

    def names(self) -> set[str]:
        return set(self.entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.entries[name].shape

    def dtype(self, name: str) -> np.dtype:
        """float32 for a quantised tensor."""
        return PLAIN.get(self.entries[name].kind, np.dtype(np.float32))

    def read(self, name: str) -> np.ndarray:
        """The tensor, dequantised."""
        entry = self.entries[name]
        if entry.kind in PLAIN:
            array = np.empty(entry.shape, PLAIN[entry.kind])
            read_into(self.file, entry.start, array)
            return array
        quants = _library().quants
        block, width = _block(entry.kind)
        columns = entry.shape[-1]
        result = np.empty((math.prod(entry.shape[:-1]), columns), np.float32)
        row_bytes = columns // block * width
        step = max(1, CHUNK // columns)
        for row in range(0, len(result), step):
            some = np.empty((min(step, len(result) - row), row_bytes), np.uint8)
            read_into(self.file, entry.start + row * row_bytes, some)
            result[row : row + step] = quants.dequantize(some, entry.kind)
        return result.reshape(entry.shape)


def _library() -> Any:
    try:
        import gguf
        import gguf.quants
    except ImportError as error:
        raise ValueError(
            f"quantised GGUF files need the gguf package ({error}); install the extra: pip install 'jaxtrain[gguf]'"
        ) from None
    return gguf


def _block(kind: int) -> tuple[int, int]:
    """How many numbers a block holds, and its bytes."""
    return _library().GGML_QUANT_SIZES[kind]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """How one ``general.architecture`` becomes Hugging Face's.

    layer: their names of a layer's tensors, without ``blk.N.``, to Hugging Face's, without ``model.layers.N.``.
    config: (the architecture's metadata, without its prefix) -> more fields of config.json.
    interleaved: whether queries and keys are stored for turning neighbouring pairs.
    """

    model_type: str
    architecture: str
    layer: Mapping[str, str]
    config: Callable[[Mapping[str, Any], GGUFFile], dict[str, Any]] = lambda values, file: {}
    interleaved: bool = False


ATTENTION = {f"attn_{short}": f"self_attn.{short}_proj" for short in "qkv"} | {"attn_output": "self_attn.o_proj"}
MLP = {f"ffn_{name}": f"mlp.{name}_proj" for name in ("gate", "up", "down")}
PRE_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
POST_NORMS = {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}
QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
ARCHITECTURES = {
    "llama": Architecture(
        model_type="llama",
        architecture="LlamaForCausalLM",
        layer=ATTENTION | MLP | PRE_NORMS,
        interleaved=True,
        config=lambda values, file: {
            "attention_bias": "blk.0.attn_q.bias" in file.entries,
            "mlp_bias": "blk.0.ffn_up.bias" in file.entries,
        },
    ),
    "qwen2": Architecture(model_type="qwen2", architecture="Qwen2ForCausalLM", layer=ATTENTION | MLP | PRE_NORMS),
    "qwen3": Architecture(
        model_type="qwen3", architecture="Qwen3ForCausalLM", layer=ATTENTION | MLP | PRE_NORMS | QK_NORMS
    ),
    "olmo2": Architecture(
        model_type="olmo2", architecture="Olmo2ForCausalLM", layer=ATTENTION | MLP | POST_NORMS | QK_NORMS
    ),
}


class GGUFReader:
    """A GGUF file's tensors under Hugging Face's names and in its layout."""

    def __init__(self, file: GGUFFile):
        self.file = file
        self.architecture = architecture_of(file)
        self.heads = _heads(file)
        self.theirs: dict[str, str] = {}
        for name in file.names():
            if name != "rope_freqs.weight":  # read by ``config_of``
                self.theirs[self._name(name)] = name

    def _name(self, name: str) -> str:
        stem, _, kind = name.rpartition(".")
        if stem in TOP:
            return f"{TOP[stem]}.{kind}"
        parts = stem.split(".", 2)
        if len(parts) == 3 and parts[0] == "blk" and parts[2] in self.architecture.layer:
            return f"model.layers.{parts[1]}.{self.architecture.layer[parts[2]]}.{kind}"
        return name  # reported as unexpected

    def names(self) -> set[str]:
        return set(self.theirs)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.file.shape(self.theirs[name])

    def dtype(self, name: str) -> np.dtype:
        return self.file.dtype(self.theirs[name])

    def read(self, name: str) -> np.ndarray:
        array = self.file.read(self.theirs[name])
        if self.architecture.interleaved:
            for part, heads in zip(("q_proj", "k_proj"), self.heads, strict=True):
                if f".self_attn.{part}." in name:
                    return half_split_rows(array, heads)
        return array


def half_split_rows(array: np.ndarray, heads: int) -> np.ndarray:
    """``[heads * H, ...]`` whose rows pair up as (2i, 2i + 1), reordered to pairs (i, i + H/2)."""
    pairs = array.reshape(heads, -1, 2, *array.shape[1:])
    return pairs.swapaxes(1, 2).reshape(array.shape)


def architecture_of(file: GGUFFile) -> Architecture:
    """Raises ValueError for an architecture that is not supported."""
    name = file.metadata.get("general.architecture")
    if name not in ARCHITECTURES:
        raise ValueError(
            f"{file.file} has the architecture {name!r}; from GGUF, {', '.join(sorted(ARCHITECTURES))} are supported"
        )
    return ARCHITECTURES[name]


def _values(file: GGUFFile) -> dict[str, Any]:
    prefix = file.metadata["general.architecture"] + "."
    return {key.removeprefix(prefix): value for key, value in file.metadata.items() if key.startswith(prefix)}


def _heads(file: GGUFFile) -> tuple[int, int]:
    values = _values(file)
    heads = _need(file, values, "attention.head_count")
    return heads, values.get("attention.head_count_kv", heads)


def _need(file: GGUFFile, values: Mapping[str, Any], key: str) -> Any:
    if key not in values:
        raise ValueError(f"{file.file} lacks {file.metadata['general.architecture']}.{key} in its metadata")
    if not isinstance(values[key], int | float):
        raise ValueError(f"{file.file}: {key} is {values[key]!r:.60}; one number for all layers is supported")
    return values[key]


def config_of(file: GGUFFile) -> dict[str, Any]:
    """What Hugging Face's config.json would say."""
    architecture = architecture_of(file)
    values = _values(file)
    heads, kv_heads = _heads(file)
    width = _need(file, values, "embedding_length")
    head_dim = values.get("attention.key_length", width // heads)
    if values.get("attention.value_length", head_dim) != head_dim:
        raise ValueError(f"{file.file} has values of another length than keys, which is not supported")
    if values.get("rope.dimension_count", head_dim) != head_dim:
        raise ValueError(f"{file.file} turns only {values['rope.dimension_count']} of {head_dim} dimensions of a head")
    if "token_embd.weight" not in file.entries:
        raise ValueError(f"{file.file} has no token_embd.weight")
    return {
        "model_type": architecture.model_type,
        "architectures": [architecture.architecture],
        "vocab_size": file.shape("token_embd.weight")[0],
        "hidden_size": width,
        "num_hidden_layers": _need(file, values, "block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate_size": _need(file, values, "feed_forward_length"),
        "max_position_embeddings": _need(file, values, "context_length"),
        # A float32 in the file; config.json holds the decimal that was meant.
        "rms_norm_eps": float(np.format_float_positional(np.float32(_need(file, values, _EPS)), unique=True)),
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in file.entries,
        "rope_theta": float(values.get("rope.freq_base", 10000.0)),
        **_rope_scaling(file, values, head_dim),
        **architecture.config(values, file),
        **{f"{key}_token_id": file.metadata[f"tokenizer.ggml.{key}_token_id"] for key in ("bos", "eos")
           if f"tokenizer.ggml.{key}_token_id" in file.metadata},
    }  # fmt: skip


_EPS = "attention.layer_norm_rms_epsilon"


def _rope_scaling(file: GGUFFile, values: Mapping[str, Any], head_dim: int) -> dict[str, Any]:
    if "rope_freqs.weight" in file.entries:
        return {"rope_scaling": _llama3(file, head_dim, float(values.get("rope.freq_base", 10000.0)))}
    kind = values.get("rope.scaling.type", "none")
    if kind == "none":
        return {}
    scaling = {"rope_type": kind, "factor": float(_need(file, values, "rope.scaling.factor"))}
    if "rope.scaling.original_context_length" in values:
        scaling["original_max_position_embeddings"] = values["rope.scaling.original_context_length"]
    return {"rope_scaling": scaling}


def _llama3(file: GGUFFile, head_dim: int, theta: float) -> dict[str, Any]:
    """Llama 3's scaling, of which the file keeps only what each wavelength is divided by."""
    found = file.read("rope_freqs.weight").astype(np.float64)
    scaling = {
        "rope_type": "llama3",
        "factor": float(found.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    turns = 8192 * theta ** -(np.arange(0, head_dim, 2) / head_dim) / (2 * math.pi)
    keep = np.clip((turns - 1.0) / 3.0, 0.0, 1.0)
    expected = 1 / (keep + (1 - keep) / scaling["factor"])
    if found.shape != expected.shape or not np.allclose(found, expected, rtol=1e-4):
        raise ValueError(f"{file.file} divides wavelengths (rope_freqs.weight) by other factors than Llama 3 does")
    return scaling


def open_gguf(file: Path) -> tuple[dict[str, Any], GGUFReader, dict[str, Any]]:
    """(config as Hugging Face would write it, tensors, the file's metadata) of a GGUF file."""
    opened = GGUFFile(file)
    return config_of(opened), GGUFReader(opened), opened.metadata
