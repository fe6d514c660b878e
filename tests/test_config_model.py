"""A folder's model as the model of a stage."""

from __future__ import annotations

import dataclasses

import jax
import pytest

from jaxtrain.checkpoint import Checkpoints
from jaxtrain.config_json import from_json, to_json
from jaxtrain.config_model import MODEL_CONFIGS, SavedModel, read_model_config, resolve
from jaxtrain.models import FAMILIES, DecoderConfig, LlamaConfig, Rope, build_model

CONFIG = LlamaConfig(
    vocab_size=20,
    num_layers=1,
    d_model=8,
    num_heads=2,
    num_kv_heads=1,
    d_ff=8,
    max_positions=16,
    rope=Rope(theta=5e5, scaling="linear", factor=2.0),
    attention_bias=True,
    param_dtype="bfloat16",
)


@pytest.fixture
def folder(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    params = build_model(CONFIG).init(jax.random.key(0))
    checkpoints.save(0, {"params": params}, {"model": to_json(CONFIG)})
    checkpoints.close()
    return tmp_path


def test_the_folder_s_model_with_changes(folder):
    assert read_model_config(folder) == CONFIG
    assert resolve(SavedModel(directory=str(folder))) == CONFIG
    changed = resolve(SavedModel(directory=str(folder), heads=("reward",), param_dtype="float32", remat="full"))
    assert changed == dataclasses.replace(CONFIG, heads=("reward",), param_dtype="float32", remat="full")
    assert resolve(changed) is changed


def test_values_are_checked_as_the_family_s_own(folder):
    with pytest.raises(ValueError, match="remat='some'"):
        SavedModel(directory=str(folder), remat="some").resolve()


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no model: it has no checkpoints"):
        SavedModel(directory=str(tmp_path)).resolve()


def test_a_field_that_the_family_lacks_is_refused(folder, monkeypatch):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Bare:
        vocab_size: int = 3

    monkeypatch.setattr("jaxtrain.config_model.read_model_config", lambda folder: Bare())
    with pytest.raises(ValueError, match=r"SavedModel.remat: a Bare, as in .*, has no such field"):
        SavedModel(directory="somewhere", remat="full").resolve()


def test_every_family_can_be_rebuilt_from_a_checkpoint_s_record():
    assert set(MODEL_CONFIGS.values()) >= {*FAMILIES, Rope}
    plain = DecoderConfig(vocab_size=20, num_layers=1, d_model=8, num_heads=2, num_kv_heads=1, d_ff=8, max_positions=16)
    for config in (plain, CONFIG):
        assert from_json(to_json(config), MODEL_CONFIGS) == config
