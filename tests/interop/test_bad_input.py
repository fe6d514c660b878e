"""Sources that are damaged, unknown, or do not fit together are refused, saying what, where and what to do."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from jaxtrain.interop.huggingface import open_source
from jaxtrain.interop.importing import import_model, load_pretrained
from jaxtrain.interop.safetensors import SINGLE, SafetensorsWriter
from jaxtrain.main import main


def edit(folder, change):
    """Writes a folder's tensors anew after ``change(tensors)``."""
    reader = open_source(folder).reader
    tensors = {name: reader.read(name) for name in sorted(reader.names())}
    change(tensors)
    writer = SafetensorsWriter(folder, [(name, t.dtype, t.shape) for name, t in tensors.items()])
    for name, tensor in tensors.items():
        writer.write(name, tensor)
    writer.finish()


FIELDS = {
    "unknown architecture": (
        {"model_type": "lama", "architectures": ["LamaForCausalLM"]},
        r"unknown architecture 'lama' \(LamaForCausalLM\); the nearest that is supported is 'llama'",
    ),
    "no architecture": ({"model_type": None, "architectures": None}, "unknown architecture None"),
    "architecture of a wrong kind": ({"model_type": ["llama"]}, "unknown architecture"),
    "another head": (
        {"architectures": ["LlamaForSequenceClassification"]},
        "holds a LlamaForSequenceClassification; of Llama, LlamaForCausalLM can be imported",
    ),
    "architectures of a wrong kind": ({"architectures": [3]}, "must be a list of names"),
    "quantised": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised by gptq"),
    "dynamic rope": (
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
        "scales rotary positions by 'dynamic'; this family is supported with default, linear, llama3",
    ),
    "rope without factor": ({"rope_scaling": {"rope_type": "linear"}}, "gives no factor"),
    "llama3 without its band": (
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        "gives no low_freq_factor",
    ),
    "partial rope": ({"partial_rotary_factor": 0.5}, "turns only part of each head"),
    "another activation": ({"hidden_act": "gelu"}, "hidden_act = 'gelu'; this family is supported with 'silu'"),
    "a size as text": ({"num_hidden_layers": "three"}, r"config\.json does not describe a Llama model"),
    "heads that do not divide": ({"num_attention_heads": 5}, "not a multiple of num_kv_heads"),
    "negative size": ({"vocab_size": -1}, "vocab_size must be at least 1"),
    "a wider model": ({"intermediate_size": 41}, r"has shape \[40, 24\]; config\.json implies \[41, 24\]"),
    "a deeper model": ({"num_hidden_layers": 4}, r"lacks 9 tensors of a Llama model: model\.layers\.3\."),
    "a shallower model": ({"num_hidden_layers": 2}, r"9 tensors .* no place for: model\.layers\.2\."),
    "biases that are not there": ({"attention_bias": True}, r"lacks 12 tensors.*k_proj\.bias"),
    "untied without a head": (
        {"tie_word_embeddings": False},
        r"lacks 1 tensors.*lm_head\.weight\. config\.json says that the output matrix is its own",
    ),
}


@pytest.mark.parametrize("case", FIELDS)
def test_a_config_that_does_not_fit_is_refused(hf_folder, case):
    fields, complaint = FIELDS[case]
    folder = hf_folder(fields=fields)
    with pytest.raises(ValueError, match=complaint) as error:
        load_pretrained(folder)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize("name", ["vocab_size", "hidden_size", "num_attention_heads", "intermediate_size"])
def test_a_field_that_is_missing_is_named(hf_folder, name):
    folder = hf_folder()
    config = json.loads((folder / "config.json").read_text())
    del config[name]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"lacks '{name}'"):
        load_pretrained(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "\x00", '{"a": ' * 10_000])
def test_a_damaged_config_is_refused(hf_folder, text):
    folder = hf_folder()
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        load_pretrained(folder)


NAME = "model.layers.1.mlp.up_proj.weight"
TENSORS = {
    "missing": (lambda tensors: tensors.pop(NAME), r"lacks 1 tensors of a Llama model: model\.layers\.1\.mlp\.up"),
    "misspelt": (lambda tensors: tensors.update({"model.up": tensors.pop(NAME)}), "lacks 1 tensors"),
    "unexpected": (
        lambda tensors: tensors.update({"model.layers.1.mlp.router.weight": np.zeros(3, np.float32)}),
        r"1 tensors .* no place for: model\.layers\.1\.mlp\.router\.weight",
    ),
    "transposed": (
        lambda tensors: tensors.update({NAME: tensors[NAME].T}),
        r"up_proj\.weight has shape \[24, 40\]; config\.json implies \[40, 24\]",
    ),
    "integers": (lambda tensors: tensors.update({NAME: tensors[NAME].astype(np.int8)}), "is int8, not a float"),
    "tied, with another head": (
        lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}),
        r"ties lm_head\.weight to model\.embed_tokens\.weight .* but the file holds a different",
    ),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_do_not_fit_are_refused(hf_folder, case):
    change, complaint = TENSORS[case]
    folder = hf_folder()
    edit(folder, change)
    with pytest.raises(ValueError, match=complaint):
        load_pretrained(folder)


def test_what_carries_nothing_may_be_there(hf_folder):
    """Old files hold rotary frequencies, and a copy of tied embeddings."""
    folder = hf_folder()
    more = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(3, np.float32)}
    edit(folder, lambda tensors: tensors.update(more, **{"lm_head.weight": tensors["model.embed_tokens.weight"]}))
    load_pretrained(folder)


class FakeTokenizer:
    """As many ids as it is told."""

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size


@pytest.mark.parametrize("size", [47, 48, 49])
def test_a_tokenizer_may_not_have_more_ids_than_the_embedding(hf_folder, monkeypatch, size):
    folder = hf_folder()
    (folder / "tokenizer.json").write_text("{}")
    monkeypatch.setattr("jaxtrain.data.tokenizer_source.source_tokenizer", lambda source: FakeTokenizer(size))
    if size <= 48:
        assert load_pretrained(folder)[2].vocab_size == size  # padded rows are common
        return
    with pytest.raises(ValueError, match="the tokenizer has 49 ids, but the embedding only 48 rows"):
        load_pretrained(folder)


def test_sources_that_are_no_sources(tmp_path, hf_folder):
    with pytest.raises(ValueError, match="does not exist"):
        load_pretrained(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"no config\.json and no \.gguf file"):
        load_pretrained(tmp_path)
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match="is a pickle"):
        load_pretrained(tmp_path / "model.bin")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match=r"neither a \.gguf file nor a folder"):
        load_pretrained(tmp_path / "notes.txt")
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"2 \.gguf files; name one"):
        load_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"a\.gguf is damaged"):
        load_pretrained(tmp_path / "a.gguf")
    (tmp_path / "a.gguf").write_bytes(b"not this")
    with pytest.raises(ValueError, match="not a GGUF file"):
        load_pretrained(tmp_path / "a.gguf")
    folder = hf_folder()
    (folder / SINGLE).rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin, which are pickles"):
        load_pretrained(folder)


def test_nothing_is_left_behind_by_a_refused_source(hf_folder, tmp_path, capsys):
    """And the command says why in one line."""
    folder = hf_folder(fields={"model_type": "mamba9"})
    assert main(["import", str(folder), "--out", str(tmp_path / "in")]) == 43
    error = capsys.readouterr().err
    assert error.startswith("jaxtrain: error:") and error.count("\n") == 1 and "mamba9" in error
    assert not (tmp_path / "in").exists()


def test_a_missing_shard_is_named(hf_folder):
    folder = hf_folder(shard_bytes=4000)
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.rename(folder / "elsewhere")
    with pytest.raises(ValueError, match=f"1 shards that are missing: {re.escape(shard.name)}"):
        import_model(folder, folder.parent / "in")
