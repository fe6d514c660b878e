"""GGUF files: every type against its formula, names and layout against what llama.cpp stores, and damage."""

from __future__ import annotations

import math
import os
import struct
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

from jaxtrain.interop.gguf import GGUFFile, half_split_rows, open_gguf
from jaxtrain.interop.importing import load_pretrained
from jaxtrain.types import Tokens

gguf = pytest.importorskip("gguf", reason="needs the gguf package (the 'gguf' extra)")
TYPES = gguf.GGMLQuantizationType


def f16(raw: bytes) -> float:
    return float(np.frombuffer(raw, "<f2")[0])


# One block each, a number at a time, from the layouts in ggml's ggml-common.h.
def q4_0(block: bytes) -> list[float]:
    scale, codes = f16(block[:2]), block[2:]
    return [scale * ((c & 15) - 8) for c in codes] + [scale * ((c >> 4) - 8) for c in codes]


def q4_1(block: bytes) -> list[float]:
    scale, least, codes = f16(block[:2]), f16(block[2:4]), block[4:]
    return [scale * (c & 15) + least for c in codes] + [scale * (c >> 4) + least for c in codes]


def q8_0(block: bytes) -> list[float]:
    return [f16(block[:2]) * code for code in struct.unpack("32b", block[2:])]


def q4_k(block: bytes) -> list[float]:
    """256 numbers in eight parts, each with a scale and a minimum of six bits."""
    scale, least, packed, codes = f16(block[:2]), f16(block[2:4]), block[4:16], block[16:]
    values = []
    for part in range(8):
        if part < 4:
            s, m = packed[part] & 63, packed[part + 4] & 63
        else:
            s = (packed[part + 4] & 15) | (packed[part - 4] >> 6) << 4
            m = (packed[part + 4] >> 4) | (packed[part] >> 6) << 4
        for byte in codes[part // 2 * 32 : part // 2 * 32 + 32]:
            values.append(scale * s * (byte >> 4 if part % 2 else byte & 15) - least * m)
    return values


def q6_k(block: bytes) -> list[float]:
    """256 numbers of six bits: four low ones, two high ones; sixteen scales of eight bits."""
    low, high, scales, scale = block[:128], block[128:192], struct.unpack("16b", block[192:208]), f16(block[208:])
    values = []
    for i in range(256):
        half, place = divmod(i, 128)
        quarter, j = divmod(place, 32)
        byte = low[half * 64 + (quarter % 2) * 32 + j]
        code = (byte >> 4 if quarter >= 2 else byte & 15) | ((high[half * 32 + j] >> (2 * quarter)) & 3) << 4
        values.append(scale * scales[i // 16] * (code - 32))
    return values


BLOCKS = {
    "Q4_0": (q4_0, 32, 18, (0,)),
    "Q4_1": (q4_1, 32, 20, (0, 2)),
    "Q8_0": (q8_0, 32, 34, (0,)),
    "Q4_K": (q4_k, 256, 144, (0, 2)),
    "Q6_K": (q6_k, 256, 210, (208,)),
}


@pytest.fixture
def write_gguf(tmp_path):
    """Writes metadata and tensors, either arrays or (type, bytes ``[rows, row bytes]``)."""

    def write(tensors: dict, metadata: dict | None = None, arch: str = "llama", name: str = "m.gguf") -> Path:
        file = tmp_path / name
        writer = gguf.GGUFWriter(file, arch)
        for key, value in (metadata or {}).items():
            {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32, bool: writer.add_bool,
             list: writer.add_array}[type(value)](key, value)  # fmt: skip
        for key, value in tensors.items():
            if isinstance(value, tuple):
                writer.add_tensor(key, value[1], raw_dtype=TYPES[value[0]])
            elif value.dtype == ml_dtypes.bfloat16:
                writer.add_tensor(key, value.view(np.uint8).reshape(*value.shape[:-1], -1), raw_dtype=TYPES.BF16)
            else:
                writer.add_tensor(key, value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return file

    return write


@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_are_dequantised_by_their_formula(kind, write_gguf, monkeypatch):
    formula, size, width, halves = BLOCKS[kind]
    rng = np.random.default_rng(0)
    rows, blocks = 5, 3
    raw = rng.integers(0, 256, (rows, blocks, width), dtype=np.uint8)
    for place in halves:  # random bits would be NaN now and then
        raw[:, :, place : place + 2] = rng.normal(size=(rows, blocks, 1)).astype("<f2").view(np.uint8)
    raw = raw.reshape(rows, -1)
    monkeypatch.setattr("jaxtrain.interop.gguf.CHUNK", 2 * blocks * size)  # two rows at a time, then the odd one
    file = GGUFFile(write_gguf({"t": (kind, raw)}))
    assert file.shape("t") == (rows, blocks * size)
    assert file.dtype("t") == np.float32
    wanted = [[formula(row[i : i + width].tobytes()) for i in range(0, len(row), width)] for row in raw]
    np.testing.assert_allclose(file.read("t"), np.reshape(wanted, (rows, -1)), rtol=1e-5, atol=1e-5)


def test_plain_types_are_read_bit_for_bit(write_gguf):
    rng = np.random.default_rng(0)
    tensors = {
        str(kind): rng.normal(size=shape).astype(kind)
        for kind, shape in ((np.float32, (3, 5)), (np.float16, (7,)), (ml_dtypes.bfloat16, (2, 3, 4)))
    }
    file = GGUFFile(write_gguf(tensors))
    assert file.names() == set(tensors)
    for name, tensor in tensors.items():
        found = file.read(name)
        assert found.dtype == tensor.dtype == file.dtype(name)
        assert found.tobytes() == tensor.tobytes()


def test_metadata_are_plain_values(write_gguf):
    values = {"a": "text ✓", "b": 3, "c": 1.5, "d": True, "e": [1, -2], "f": ["x", ""], "g": [0.5], "h": [True, False]}
    found = GGUFFile(write_gguf({}, values)).metadata
    assert {key: found[key] for key in values} == values
    assert {key: type(found[key]) for key in values} == {key: type(value) for key, value in values.items()}


def test_other_types_are_named(write_gguf):
    file = write_gguf({"t": ("Q5_K", np.zeros((1, 176), np.uint8))})
    with pytest.raises(ValueError, match=r"tensor t is of type Q5_K; supported are F32.*Q6_K"):
        GGUFFile(file)


def test_every_truncation_is_refused(write_gguf, tmp_path):
    file = write_gguf({"t": np.zeros((4, 32), np.float32)}, {"a": "text", "b": [1, 2, 3], "c": ["x", "y"]})
    data = file.read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in range(len(data)):
        cut.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"cut\.gguf"):
            GGUFFile(cut)


def test_every_flipped_byte_is_refused_or_read(write_gguf, tmp_path):
    """Damage is told as such: no crash, no endless loop, nothing allocated that the file does not have."""
    file = write_gguf({"t": np.zeros((2, 32), np.float32)}, {"a": "text", "b": [1, 2, 3], "c": ["x", "y"]})
    data = file.read_bytes()
    bad = tmp_path / "bad.gguf"
    told = 0
    for place in range(len(data) - 256):
        for value in (0, 0x7F, 0xFF):
            bad.write_bytes(data[:place] + bytes([value]) + data[place + 1 :])
            try:
                found = GGUFFile(bad)
                assert all(math.prod(found.shape(name)) <= len(data) for name in found.names())
            except ValueError as error:
                told += "bad.gguf" in str(error)
    assert told > 100


def test_without_the_library_the_extra_is_named(write_gguf, monkeypatch):
    file = write_gguf({"t": ("Q8_0", np.zeros((1, 34), np.uint8))})
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match=r"pip install 'jaxtrain\[gguf\]'"):
        GGUFFile(file)


# Their layer's tensors by ours, as llama.cpp's conversion writes them.
STEMS = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """What the conversion of a Llama does to queries and keys: rows (i, i + H/2) become neighbours."""
    half = weight.shape[0] // heads // 2
    rows = [h * 2 * half + i + half * second for h in range(heads) for i in range(half) for second in (0, 1)]
    return weight[rows]


@pytest.fixture
def convert(write_gguf):
    """A Hugging Face folder as a GGUF file."""
    from jaxtrain.interop.huggingface import open_source

    def to_gguf(folder: Path, **more) -> Path:
        source = open_source(folder)
        fields, reader = source.fields, source.reader
        arch = fields["model_type"]
        heads, kv_heads = fields["num_attention_heads"], fields["num_key_value_heads"]
        tensors = {}
        for name in sorted(reader.names()):
            stem, kind = name.rsplit(".", 1)
            tensor = reader.read(name)
            if stem in TOP:
                tensors[f"{TOP[stem]}.{kind}"] = tensor
                continue
            _, _, layer, inner = stem.split(".", 3)
            if arch == "llama" and inner in ("self_attn.q_proj", "self_attn.k_proj"):
                tensor = interleaved(tensor, heads if "q_proj" in inner else kv_heads)
            tensors[f"blk.{layer}.{STEMS[inner]}.{kind}"] = tensor
        head_dim = fields.get("head_dim", fields["hidden_size"] // heads)
        metadata = {
            f"{arch}.{key}": value
            for key, value in {
                "block_count": fields["num_hidden_layers"],
                "embedding_length": fields["hidden_size"],
                "feed_forward_length": fields["intermediate_size"],
                "context_length": fields["max_position_embeddings"],
                "attention.head_count": heads,
                "attention.head_count_kv": kv_heads,
                "attention.key_length": head_dim,
                "attention.value_length": head_dim,
                "attention.layer_norm_rms_epsilon": fields["rms_norm_eps"],
                "rope.freq_base": float(fields["rope_theta"]),
            }.items()
        }
        return write_gguf({**tensors, **more.pop("tensors", {})}, {**metadata, **more}, arch)

    return to_gguf


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": False, "attention_bias": True, "mlp_bias": True}])
def test_a_llama_is_the_same_from_gguf(hf_folder, convert, changes, dtype):
    folder = hf_folder(dtype=dtype, norm_eps=1e-5, **changes)
    model, params, _ = load_pretrained(folder)
    again, found, tokenizer = load_pretrained(convert(folder))
    assert again.config == model.config
    assert tokenizer is None
    jax.tree.map(np.testing.assert_array_equal, found, params)


@pytest.mark.parametrize("name", ["Qwen2Config", "Qwen3Config", "Olmo2Config"])
def test_other_families_are_the_same_from_gguf(tmp_path, convert, name, monkeypatch):
    """Biases of queries, keys and values; norms of them; norms after the parts: and no reordering of rows."""
    from jaxtrain import models
    from jaxtrain.interop.exporting import export_params

    if name == "Olmo2Config":  # there the same name of theirs is another norm
        monkeypatch.setitem(STEMS, "post_attention_layernorm", "post_attention_norm")
    sizes = dict(vocab_size=48, num_layers=2, d_model=24, num_heads=4, num_kv_heads=2, d_ff=40, max_positions=64)
    model = models.build_model(getattr(models, name)(**sizes, tie_embeddings=False, norm_eps=1e-5))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), model.shapes())
    export_params(model, params, tmp_path / "hf")
    again, found, _ = load_pretrained(convert(tmp_path / "hf"))
    assert again.config == model.config
    jax.tree.map(np.testing.assert_array_equal, found, params)


def test_llama3_scaling_is_recognised(hf_folder, convert):
    from jaxtrain.models import Rope
    from jaxtrain.models.rope import inverse_wavelengths

    rope = Rope(theta=500000.0, scaling="llama3", factor=32.0, original_max_positions=8192)
    plain = inverse_wavelengths(Rope(theta=500000.0), 64)[0]
    factors = (plain / inverse_wavelengths(rope, 64)[0]).astype(np.float32)
    folder = hf_folder(rope=rope, head_dim=64)
    model, _, _ = load_pretrained(convert(folder, tensors={"rope_freqs.weight": factors}))
    assert model.config.rope == rope
    factors[3] = 2.0
    with pytest.raises(ValueError, match="other factors than Llama 3"):
        load_pretrained(convert(folder, tensors={"rope_freqs.weight": factors}))


def test_an_unknown_architecture_is_named(write_gguf):
    with pytest.raises(ValueError, match=r"architecture 'mamba'.*llama"):
        open_gguf(write_gguf({}, arch="mamba"))


def test_an_unexpected_tensor_is_named(hf_folder, convert):
    file = convert(hf_folder(), tensors={"blk.0.attn_sinks.weight": np.zeros(4, np.float32)})
    with pytest.raises(ValueError, match=r"1 tensors .* no place for: blk\.0\.attn_sinks\.weight"):
        load_pretrained(file)


def test_missing_metadata_are_named(write_gguf):
    with pytest.raises(ValueError, match=r"lacks llama\.attention\.head_count"):
        open_gguf(write_gguf({"token_embd.weight": np.zeros((4, 4), np.float32)}))


def test_half_split_rows_undo_the_conversion():
    weight = np.random.default_rng(0).normal(size=(3 * 8, 5))
    np.testing.assert_array_equal(half_split_rows(interleaved(weight, 3), 3), weight)


@pytest.fixture(scope="module")
def smollm2():
    root = Path(os.environ.get("JAXTRAIN_DATA", Path.home() / ".cache" / "jaxtrain-data")) / "smollm2"
    file = next(iter(sorted(root.rglob("*.gguf"))), None)
    if file is None:
        pytest.skip(f"no SmolLM2 GGUF file below {root} ($JAXTRAIN_DATA)")
    return file


def test_smollm2_knows_the_capital_of_france(smollm2):
    """A quantised file from the wild: layout, names, config and tokenizer must all be right for this."""
    model, params, tokenizer = load_pretrained(smollm2, max_positions=64)
    assert model.num_params() == 134_515_008
    ids = tokenizer.encode("The capital of France is")
    apply = jax.jit(model.apply)
    for _ in range(8):
        row = np.zeros((1, 16), np.int32)
        row[0, : len(ids)] = ids
        here = (np.arange(16) < len(ids)).astype(np.int32)[None]
        tokens = Tokens(ids=row, targets=row, weights=here, positions=np.arange(16)[None], segments=here)
        ids.append(int(apply(params, tokens).logits[0, len(ids) - 1].argmax()))
    assert "Paris" in tokenizer.decode(ids)
