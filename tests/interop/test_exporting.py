"""Weights out: what transformers makes of them, and what cannot be written."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.interop.exporting import export_model, export_params
from jaxtrain.interop.importing import load_pretrained
from jaxtrain.interop.safetensors import open_safetensors
from jaxtrain.models import DecoderConfig, Rope, build_model
from jaxtrain.types import Tokens

SIZES = dict(vocab_size=48, num_layers=2, d_model=24, num_heads=4, num_kv_heads=2, d_ff=40, max_positions=64)
CASES = {
    "tied": {},
    "untied, biases": {"tie_embeddings": False, "attention_bias": True, "mlp_bias": True},
    "own head_dim, one kv head": {"head_dim": 10, "num_kv_heads": 1, "norm_eps": 1e-5},
    "linear": {"rope": Rope(theta=5e5, scaling="linear", factor=4.0)},
    "llama3": {"rope": Rope(theta=5e5, scaling="llama3", factor=8.0, original_max_positions=16)},
    "yarn": {"rope": Rope(scaling="yarn", factor=4.0, original_max_positions=16)},
}


def ids(vocab_size: int = 48) -> np.ndarray:
    return np.random.default_rng(1).integers(0, vocab_size, (2, 40)).astype(np.int32)


def logits(model, params) -> np.ndarray:
    ones = np.ones((2, 40), np.int32)
    tokens = Tokens(ids=ids(), targets=ids(), weights=ones, positions=np.arange(40)[None] * ones, segments=ones)
    return np.asarray(jax.jit(model.apply)(params, tokens).logits)


@pytest.fixture
def theirs():
    """A folder's logits in transformers."""
    torch = pytest.importorskip("torch", reason="needs torch (the 'parity' extra)")
    transformers = pytest.importorskip("transformers", reason="needs transformers (the 'parity' extra)")

    def load(folder, dtype="auto"):
        model, told = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
        assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), told
        return model.eval()

    def run(folder):
        with torch.no_grad():
            return load(folder, torch.float32)(torch.from_numpy(ids()).long()).logits.numpy()

    run.load = load
    return run


@pytest.mark.parity
@pytest.mark.parametrize("case", CASES)
def test_transformers_gives_the_same_logits(llama, tmp_path, theirs, case):
    model, params = llama(**CASES[case])
    export_params(model, params, tmp_path, max_shard_bytes=10_000)
    assert (tmp_path / "model.safetensors.index.json").exists()
    ours = logits(model, params)
    assert ours.std() > 0.1
    np.testing.assert_allclose(theirs(tmp_path), ours, atol=1e-4, rtol=0)


@pytest.mark.parity
@pytest.mark.parametrize("case", CASES)
def test_what_transformers_saves_is_read(llama, tmp_path, theirs, case):
    """Its new config.json (rope_parameters) and its own names and shards."""
    model, params = llama(**CASES[case])
    export_params(model, params, tmp_path / "a")
    theirs.load(tmp_path / "a").save_pretrained(tmp_path / "b", max_shard_size="10KB")
    assert (tmp_path / "b" / "model.safetensors.index.json").exists()
    again, found, _ = load_pretrained(tmp_path / "b")
    assert again.config == model.config
    jax.tree.map(np.testing.assert_array_equal, found, params)


@pytest.mark.parity
def test_bfloat16_stays_bfloat16(llama, tmp_path, theirs):
    model, params = llama(dtype="bfloat16")
    done = export_params(model, params, tmp_path)
    assert done.dtype == "bfloat16"
    loaded = theirs.load(tmp_path)
    assert str(loaded.dtype) == "torch.bfloat16"
    weight = loaded.state_dict()["model.layers.1.mlp.up_proj.weight"].float().numpy()
    np.testing.assert_array_equal(weight, params["layers"]["mlp"]["up"]["kernel"][1].T.astype(jnp.float32))


@pytest.mark.parity
def test_a_plain_decoder_is_exported_as_llama(tmp_path, theirs):
    model = build_model(DecoderConfig(**SIZES, tie_embeddings=False, dropout=0.1))
    params = jax.jit(model.init)(jax.random.key(0))
    assert export_params(model, params, tmp_path).family == "Llama"
    np.testing.assert_allclose(theirs(tmp_path), logits(model, params), atol=1e-4, rtol=0)


@pytest.mark.parity
def test_a_plain_decoder_with_normalised_queries_is_exported_as_qwen3(tmp_path, theirs):
    from jaxtrain.interop.families import FAMILIES

    if "qwen3" not in FAMILIES:
        pytest.skip("there is no table for Qwen 3")
    model = build_model(DecoderConfig(**SIZES, qk_norm=True))
    params = jax.jit(model.init)(jax.random.key(0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: x + 0.2 * rng.normal(size=x.shape).astype(x.dtype), params)
    assert export_params(model, params, tmp_path).family.startswith("Qwen")
    np.testing.assert_allclose(theirs(tmp_path), logits(model, params), atol=1e-4, rtol=0)


def test_another_dtype(llama, tmp_path):
    model, params = llama()
    assert export_params(model, params, tmp_path, dtype="bfloat16").dtype == "bfloat16"
    reader = open_safetensors(tmp_path)
    assert {str(reader.dtype(name)) for name in reader.names()} == {"bfloat16"}
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    with pytest.raises(ValueError, match="dtype is 'float16'; 'float32' or 'bfloat16'"):
        export_params(model, params, tmp_path / "x", dtype="float16")


def test_heads_that_have_no_counterpart_are_told(llama, tmp_path):
    model, params = llama(heads=("lm", "value"))
    assert export_params(model, params, tmp_path).left_out == ("value_head/kernel",)
    model, params = llama(heads=("reward",))
    with pytest.raises(ValueError, match=r"heads = \('reward',\) writes no text"):
        export_params(model, params, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_what_has_no_counterpart_is_named(llama, tmp_path):
    model, params = llama(rope=Rope(scaling="ntk", factor=2.0))
    with pytest.raises(ValueError, match=r"Rope\.scaling = 'ntk' has no counterpart"):
        export_params(model, params, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_folder_with_weights_is_left_alone(llama, tmp_path):
    model, params = llama()
    export_params(model, params, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="holds weights already"):
        export_params(*llama(seed=1), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    with pytest.raises(ValueError, match="holds nothing"):
        export_params(model, params, tmp_path / "x", max_shard_bytes=0)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no model"):
        export_model(tmp_path, tmp_path / "out")


def test_a_damaged_checkpoint_is_not_exported(hf_folder, tmp_path):
    from jaxtrain.interop.importing import import_model

    import_model(hf_folder(), tmp_path / "in")
    record = tmp_path / "in" / "checkpoints" / "0" / "meta" / "metadata"
    meta = json.loads(record.read_text())
    meta["digests"]["params"]["layers/mlp/up/kernel"] = "0" * 16
    record.write_text(json.dumps(meta))
    with pytest.raises(ValueError, match="the bits of params/layers/mlp/up/kernel have changed"):
        export_model(tmp_path / "in", tmp_path / "out")
