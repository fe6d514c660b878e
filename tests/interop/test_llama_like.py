"""What the tables of Llama's relatives and of GPT-2 make of a config.json's odder values, and what they cannot say."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxtrain.interop.exporting import export_params
from jaxtrain.interop.families import FAMILIES
from jaxtrain.interop.family import Fields
from jaxtrain.interop.huggingface import find_family
from jaxtrain.interop.importing import load_pretrained
from jaxtrain.models import (
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Qwen2Config,
    Qwen3Config,
    Rope,
    build_model,
)

FIELDS = {"vocab_size": 19, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4}
FIELDS |= {"num_attention_heads": 4, "num_key_value_heads": 4}
GPT2 = {"vocab_size": 19, "n_embd": 16, "n_layer": 2, "n_head": 4}
SIZES = {"vocab_size": 19, "num_layers": 2, "d_model": 16, "num_heads": 4, "num_kv_heads": 4, "d_ff": 24}
SIZES |= {"max_positions": 32}


def read(model_type, **fields):
    return FAMILIES[model_type].read_config(Fields((GPT2 if model_type == "gpt2" else FIELDS) | fields))


def test_no_window_is_not_an_absent_window():
    assert read("mistral").window == 4096
    assert read("mistral", sliding_window=None).window == 0
    assert read("mistral", sliding_window=7).window == 7
    on = {"use_sliding_window": True, "max_window_layers": 3}
    assert (read("qwen2", **on).window, read("qwen2", **on).full_layers) == (4096, 3)
    assert read("qwen2", **on, sliding_window=None).window == 0
    assert read("qwen2", use_sliding_window=False, sliding_window=7, max_window_layers=1).window == 0
    # Fewer layers than would see everything.
    assert read("qwen3", use_sliding_window=True, sliding_window=7).window == 0


def test_layer_types_say_more_than_max_window_layers():
    full, near = "full_attention", "sliding_attention"
    found = read(
        "qwen2",
        use_sliding_window=True,
        sliding_window=7,
        max_window_layers=28,
        layer_types=[full, near, near, near],
    )
    assert (found.window, found.full_layers) == (7, 1)
    with pytest.raises(ValueError, match=r"layer_types = .*here 4 layers are 'full_attention' up to some layer"):
        read("qwen2", use_sliding_window=True, sliding_window=7, layer_types=[near, full, near, full])
    with pytest.raises(ValueError, match=r"layer_types = .*here 4 layers"):
        read("qwen3", layer_types=[full] * 3)
    with pytest.raises(ValueError, match="'sliding_attention' in layer_types, but use_sliding_window = False"):
        read("qwen3", sliding_window=7, layer_types=[full, full, full, near])


@pytest.mark.parametrize(
    ("name", "value"),
    [("scale_attn_weights", False), ("scale_attn_by_inverse_layer_idx", True), ("add_cross_attention", True)],
)
def test_unusual_gpt2s_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} = {value}"):
        read("gpt2", **{name: value})


def test_what_files_leave_out_is_what_transformers_assumes():
    assert read("gpt2") == GPT2Config(**SIZES | {"d_ff": 64, "max_positions": 1024})
    silent = {name: value for name, value in FIELDS.items() if name != "num_key_value_heads"}
    assert FAMILIES["llama"].read_config(Fields(silent)).num_kv_heads == 4
    assert (
        FAMILIES["mistral"].read_config(Fields(silent | {"hidden_size": 32, "num_attention_heads": 16})).num_kv_heads
        == 8
    )
    assert read("qwen3").head_dim == 128 and read("qwen2").head_dim == 4
    assert read("olmo2").norm_eps == 1e-5 and read("llama").norm_eps == 1e-6
    assert [read(name).tie_embeddings for name in ("llama", "olmo2", "gpt2")] == [False, False, True]
    with pytest.raises(ValueError, match=r"config\.json lacks 'hidden_size'"):
        FAMILIES["llama"].read_config(Fields({"num_attention_heads": 4, "vocab_size": 3, "num_hidden_layers": 1}))


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_dropout_is_left_to_training_and_said(model_type, caplog):
    name = "attn_pdrop" if model_type == "gpt2" else "attention_dropout"
    with caplog.at_level(logging.INFO, logger="jaxtrain"):
        assert read(model_type, **{name: 0.25}).dropout == 0.0
    assert f"'{name}': 0.25" in caplog.text


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (LlamaConfig, {"qk_norm": True}, "LlamaConfig.qk_norm = True has no counterpart"),
        (MistralConfig, {"qk_norm": True}, "MistralConfig.qk_norm = True"),
        (Qwen2Config, {"attention_bias": False}, "Qwen2Config.attention_bias = False"),
        (Qwen2Config, {"head_dim": 8}, "Qwen2Config.head_dim = 8 .* always 4"),
        (Qwen3Config, {"qk_norm": False}, "Qwen3Config.qk_norm = False"),
        (Olmo2Config, {"head_dim": 8}, "Olmo2Config.head_dim = 8"),
        (GPT2Config, {"head_dim": 8}, "GPT2Config.head_dim = 8"),
    ],
    ids=str,
)
def test_what_they_cannot_say_is_not_written(config, changes, message):
    family = next(family for family in FAMILIES.values() if family.config is config)
    family.write_config(config(**SIZES))
    with pytest.raises(ValueError, match=message):
        family.write_config(config(**SIZES | changes))


def test_gpt2_is_also_read_as_it_was_first_published(tmp_path):
    """Without the bare model's name before its tensors, and with the masks that old versions stored."""
    from safetensors.numpy import load_file, save_file

    model = build_model(GPT2Config(**SIZES))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), model.shapes())
    export_params(model, params, tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
    assert "wte.weight" in tensors
    for layer in range(2):
        tensors[f"h.{layer}.attn.bias"] = np.tril(np.ones((1, 1, 32, 32), np.float32))
        tensors[f"h.{layer}.attn.masked_bias"] = np.array(-1e4, np.float32)
    save_file(tensors, file)
    loaded, found, _ = load_pretrained(tmp_path)
    assert dataclasses.replace(loaded.config, init_std=model.config.init_std) == model.config
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), params)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["GPT2LMHeadModel"]


@pytest.mark.parametrize("field", ["fraction", "mscale"])
def test_positions_that_their_class_would_ignore_are_not_written(field):
    rope = Rope(scaling="yarn", factor=2.0, original_max_positions=8, **{field: 0.5})
    config = LlamaConfig(
        vocab_size=20, num_layers=1, d_model=8, num_heads=2, num_kv_heads=1, d_ff=8, max_positions=16, rope=rope
    )
    with pytest.raises(ValueError, match=f"Rope.{field} = 0.5 cannot be written"):
        FAMILIES["llama"].write_config(config)


def test_a_model_of_text_and_images_is_refused_by_name():
    fields = {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}, "vision_config": {}}
    with pytest.raises(ValueError, match=r"'gemma3', a model of text and more.*'gemma3_text'"):
        find_family(fields, Path("model"))
