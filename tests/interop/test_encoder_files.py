"""Folders of encoders and encoder-decoders: which heads are read from them, and which configs are refused."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.interop.exporting import export_params
from jaxtrain.interop.families import FAMILIES
from jaxtrain.interop.family import Fields
from jaxtrain.interop.importing import load_pretrained
from jaxtrain.models import BartConfig, BertConfig, ElectraConfig, RobertaConfig, T5Config, build_model

ENCODER = {"vocab_size": 32, "num_layers": 2, "d_model": 16, "num_heads": 2, "d_ff": 24, "max_positions": 12}
SIZES = {"vocab_size": 32, "num_layers": 1, "d_model": 16, "num_heads": 2, "d_ff": 24, "max_positions": 12}


@pytest.fixture
def written(tmp_path):
    """Writes a model's folder, with other fields in its config.json; returns it and the parameters."""

    def write(config, **fields):
        model = build_model(config)
        rng = np.random.default_rng(0)
        params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), model.shapes())
        export_params(model, params, tmp_path)
        said = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(said | fields))
        return tmp_path, jax.device_get(params)

    return write


@pytest.mark.parametrize(
    ("architecture", "heads", "parts"),
    [
        ("BertForPreTraining", ("mlm", "nsp"), {"mlm", "pooler", "next_sentence"}),
        ("BertForMaskedLM", ("mlm",), {"mlm"}),
        ("BertForNextSentencePrediction", ("nsp",), {"pooler", "next_sentence"}),
        ("BertModel", ("pooler",), {"pooler"}),
    ],
)
def test_the_architecture_chooses_the_heads(architecture, heads, parts, written):
    """Of a file that has them all, as bert-base-uncased does."""
    folder, params = written(BertConfig(**ENCODER), architectures=[architecture])
    model, found, _ = load_pretrained(folder)
    assert model.config.heads == heads
    assert set(found) & {"mlm", "pooler", "next_sentence"} == parts
    for name in found:
        jax.tree.map(np.testing.assert_array_equal, found[name], params[name])


def test_a_bare_model_may_lack_its_pooler(written):
    folder, params = written(BertConfig(**ENCODER, heads=()))
    names = json.loads((folder / "config.json").read_text())["architectures"]
    model, found, _ = load_pretrained(folder)
    assert names == ["BertModel"] and model.config.heads == ("pooler",)
    for name in params:
        jax.tree.map(np.testing.assert_array_equal, found[name], params[name])
    assert found["pooler"]["dense"]["kernel"].shape == (16, 16)


@pytest.mark.parametrize(
    "config",
    [
        BertConfig(**ENCODER, heads=("pooler",), activation="gelu_tanh", dropout=0.1),
        RobertaConfig(**ENCODER, position_offset=3),
        ElectraConfig(**ENCODER, embedding_size=8, heads=("mlm",)),
        ElectraConfig(**ENCODER, embedding_size=16),
        BartConfig(**SIZES, num_decoder_layers=2, scale_embedding=True, heads=()),
        T5Config(**SIZES | {"max_positions": 2**20}, gated=True, activation="gelu_tanh"),
        T5Config(**SIZES | {"max_positions": 2**20}, tie_embeddings=False, scale_outputs=False, head_dim=5),
    ],
    ids=lambda config: type(config).__name__,
)
def test_what_is_written_is_read(config, written):
    folder, params = written(config)
    model, found, _ = load_pretrained(folder)
    assert model.config == config
    jax.tree.map(np.testing.assert_array_equal, found, params)


def fields_of(config, **changes):
    family = next(family for family in FAMILIES.values() if family.config is type(config))
    return family, Fields(family.write_config(config) | changes)


BERT, BART, T5 = BertConfig(**ENCODER), BartConfig(**SIZES), T5Config(**SIZES)


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (
            BERT,
            {"architectures": ["BertForTokenClassification"]},
            "'BertForTokenClassification'; supported are BertModel",
        ),
        (BERT, {"position_embedding_type": "relative_key"}, "position_embedding_type = 'relative_key'"),
        (BERT, {"tie_word_embeddings": False}, "tie_word_embeddings = False"),
        (BERT, {"is_decoder": True}, "is_decoder = True"),
        (BART, {"decoder_ffn_dim": 48}, "24 encoder_ffn_dim, but 48 decoder_ffn_dim"),
        (BART, {"normalize_before": True}, "normalize_before = True"),
        (T5, {"feed_forward_proj": "gated-tanh"}, "feed_forward_proj = 'gated-tanh'"),
    ],
    ids=str,
)
def test_what_we_cannot_be_is_refused(config, changes, message):
    family, fields = fields_of(config, **changes)
    with pytest.raises(ValueError, match=message):
        family.read_config(fields)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (BertConfig(**ENCODER, heads=("mlm", "pooler")), "no class of transformers has the heads"),
        (ElectraConfig(**ENCODER, heads=("mlm", "discriminator")), "no class of transformers has the heads"),
        (RobertaConfig(**ENCODER, position_offset=0), "position_offset is 0"),
        (BartConfig(**SIZES, norm_eps=1e-6), "norm_eps is 1e-06"),
        (BartConfig(**SIZES, head_dim=4), "head_dim is 4"),
        (T5Config(**SIZES, tie_embeddings=False), "tie_embeddings is False and scale_outputs True"),
        (T5Config(**SIZES, gated=True, activation="gelu"), "'gated-gelu' means 'gelu_tanh'"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_what_they_cannot_be_is_refused(config, message):
    family = next(family for family in FAMILIES.values() if family.config is type(config))
    with pytest.raises(ValueError, match=message):
        family.write_config(config)


def test_both_ways_of_naming_t5s_versions():
    """transformers 4 says it by tie_word_embeddings, 5 by scale_decoder_outputs."""
    family, fields = fields_of(T5, tie_word_embeddings=False)
    old = family.read_config(fields)
    _, fields = fields_of(T5, tie_word_embeddings=True, scale_decoder_outputs=False)
    assert old == family.read_config(fields) and not old.tie_embeddings and not old.scale_outputs
    _, fields = fields_of(T5, tie_word_embeddings=True, scale_decoder_outputs=True)
    assert family.read_config(fields).tie_embeddings


def test_dropout_of_attention_is_no_obstacle():
    family, fields = fields_of(BERT, attention_probs_dropout_prob=0.1, hidden_dropout_prob=0.2)
    assert family.read_config(fields).dropout == 0.2 and fields.unread() == {}


def test_norms_under_their_old_names(written):
    """As in bert-base-uncased, which was converted from TensorFlow."""
    from safetensors.numpy import load_file, save_file

    folder, params = written(BertConfig(**ENCODER))
    tensors = load_file(folder / "model.safetensors")
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): x
        for name, x in tensors.items()
    }
    assert set(old) - set(tensors)
    save_file(old, folder / "model.safetensors")
    _, found, _ = load_pretrained(folder)
    jax.tree.map(np.testing.assert_array_equal, found, params)
    save_file(old | tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match="under both their old and their new names"):
        load_pretrained(folder)
