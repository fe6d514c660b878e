"""Multi-token prediction in and out: our layers against the ones with which transformers drafts tokens."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxtrain.interop.exporting import export_params
from jaxtrain.interop.importing import load_pretrained
from jaxtrain.models import DeepseekV3Config, build_model
from jaxtrain.types import Tokens

CONFIG = DeepseekV3Config(
    vocab_size=40, num_layers=2, d_model=16, num_heads=2, num_kv_heads=2, d_ff=24, max_positions=32, num_experts=4,
    top_k=2, expert_d_ff=8, latent_size=6, plain_dim=4, rope_dim=4, value_dim=4, query_rank=6, num_dense_layers=1,
    groups=2, top_groups=1, mtp_layers=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(parameters, a folder with them)."""
    model, rng = build_model(CONFIG), np.random.default_rng(0)
    params = jax.tree.map(lambda x: (0.4 * rng.normal(size=x.shape)).astype(np.float32), model.shapes())
    folder = tmp_path_factory.mktemp("mtp")
    export_params(model, params, folder)
    return params, folder


def test_its_layers_are_written_and_read(exported, tmp_path):
    params, folder = exported
    names = set(load_file(folder / "model.safetensors"))
    for layer in (2, 3):
        assert {
            f"model.layers.{layer}.{name}.weight" for name in ("eh_proj", "enorm", "hnorm", "shared_head.norm")
        } <= names
    model, found, _ = load_pretrained(folder)
    assert model.config == CONFIG
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), params)


def test_without_them_in_the_file_there_are_none(exported, tmp_path):
    """As in what transformers writes, whose config.json has them all the same."""
    _, folder = exported
    tensors = load_file(folder / "model.safetensors")
    kept = {name: x for name, x in tensors.items() if not name.startswith(("model.layers.2.", "model.layers.3."))}
    save_file(kept, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    assert json.loads((folder / "config.json").read_text())["num_nextn_predict_layers"] == 2
    model, found, _ = load_pretrained(tmp_path)
    assert model.config.mtp_layers == 0 and "mtp" not in found
    # Copies of the shared matrices may stand beside them; other numbers in their place may not.
    copies = {"model.layers.2.embed_tokens.weight": tensors["model.embed_tokens.weight"]}
    copies["model.layers.3.shared_head.head.weight"] = tensors["lm_head.weight"]
    save_file(tensors | copies, tmp_path / "model.safetensors")
    assert load_pretrained(tmp_path)[0].config == CONFIG
    copies["model.layers.3.shared_head.head.weight"] = tensors["lm_head.weight"] + 1
    save_file(tensors | copies, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.layers\.3\.shared_head\.head\.weight"):
        load_pretrained(tmp_path)


@pytest.mark.parity
def test_losses_are_those_of_transformers_drafts(exported, monkeypatch):
    torch = pytest.importorskip("torch", reason="parity needs torch (the 'parity' extra)")
    transformers = pytest.importorskip("transformers", reason="parity needs transformers (the 'parity' extra)")
    from transformers.modeling_layers import MtpModel

    params, folder = exported
    kind = transformers.DeepseekV3ForCausalLM
    # The one layer that it knows is the 61st.
    monkeypatch.setattr(kind, "_keys_to_ignore_on_load_unexpected", [r"model\.layers\.[23].*"])
    main = kind.from_pretrained(folder, attn_implementation="eager").eval()
    drafts = MtpModel.from_pretrained(main).eval()
    T = 9
    ids = np.random.default_rng(1).integers(0, 40, (1, T + 1))
    hidden = main.model(torch.from_numpy(ids[:, :T])).last_hidden_state
    wanted = []
    for step in (0, 1):
        count = T - 1 - step  # the last tokens have none that far ahead
        hidden = hidden[:, :count]
        read = torch.from_numpy(ids[:, step + 1 : step + 1 + count])
        hidden = drafts.forward_layer(step, hidden, torch.arange(count)[None], None, input_ids=read)
        logps = torch.log_softmax(main.lm_head(hidden), dim=-1)
        targets = torch.from_numpy(ids[:, step + 2 : step + 2 + count])
        wanted.append(-float(logps.gather(-1, targets[..., None]).sum().detach()))

    ones = jnp.ones((1, T), jnp.int32)
    tokens = Tokens(
        ids=ids[:, :T], targets=ids[:, 1:], weights=ones * 1.0, positions=jnp.arange(T)[None], segments=ones
    )
    losses = jax.jit(build_model(CONFIG).apply)(params, tokens).auxiliary.losses
    for step in (0, 1):
        assert losses[f"mtp/{step}"].weight == T - 1 - step
        assert float(losses[f"mtp/{step}"].total) / (CONFIG.mtp_coef / 2) == pytest.approx(wanted[step], rel=1e-4)
