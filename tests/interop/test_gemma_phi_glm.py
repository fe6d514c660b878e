"""config.json of Gemma, Phi-3 and GLM-4: what older files say, what is filled in, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from jaxtrain.interop.families import FAMILIES
from jaxtrain.interop.family import Fields
from jaxtrain.interop.importing import load_pretrained
from jaxtrain.models import Rope
from jaxtrain.types import Tokens

CASES = Path(__file__).parent / "cases"


def fields_of(name, **changes):
    """A case's config.json with changes; None takes a field away."""
    fields = json.loads((CASES / f"{name}.json").read_text()) | changes
    return {key: value for key, value in fields.items() if not key.startswith("_") and value is not None}


def read(name, **changes):
    fields = fields_of(name, **changes)
    return FAMILIES[fields["model_type"]].read_config(Fields(fields))


def write(config, name):
    return FAMILIES[fields_of(name)["model_type"]].write_config(config)


@pytest.mark.parity
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("gemma2-softcaps", {}),
        ("gemma3-scaled", {"layer_types": None}),
        ("gemma3-scaled", {"layer_types": None, "sliding_window_pattern": 3}),
    ],
)
def test_kinds_of_layers_where_they_are_not_named(name, changes):
    transformers = pytest.importorskip("transformers")
    fields = fields_of(name, num_hidden_layers=9, **changes)
    theirs = transformers.CONFIG_MAPPING[fields["model_type"]].from_dict(dict(fields))
    config = read(name, num_hidden_layers=9, **changes)
    assert write(config, name)["layer_types"] == theirs.layer_types
    assert len(config.pattern) == changes.get("sliding_window_pattern", 2 if name.startswith("gemma2") else 6)


def test_the_pattern_is_the_shortest():
    local, rest = "sliding_attention", "full_attention"
    for types, pattern in (
        ([local, rest, local, rest], ("local", "global")),
        ([rest, rest, rest, rest], ("global",)),
        ([local, local, rest, local], ("local", "local", "global")),
        ([local, local, rest, rest], ("local", "local", "global", "global")),
    ):
        assert read("gemma3-scaled", layer_types=types).pattern == pattern


@pytest.mark.parity
@pytest.mark.parametrize("name", ["gemma2-softcaps", "gemma3-types", "phi3-window", "glm4-0414", "glm4-2024"])
def test_what_a_file_leaves_out_is_what_transformers_assumes(name):
    """Sizes apart, which a file must have."""
    transformers = pytest.importorskip("transformers")
    needed = {"model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"}
    needed |= {"num_attention_heads", "architectures"}
    fields = {key: value for key, value in fields_of(name).items() if key in needed}
    family = FAMILIES[fields["model_type"]]
    mapping = transformers.CONFIG_MAPPING[fields["model_type"]]
    theirs = mapping.from_dict(dict(fields)).to_dict()
    written = mapping.from_dict(family.write_config(family.read_config(Fields(fields)))).to_dict()
    ignored = {"architectures", "pad_token_id", "bos_token_id", "eos_token_id"}
    assert {key: written.get(key) for key in theirs.keys() - ignored} == {
        key: theirs[key] for key in theirs.keys() - ignored
    }


def test_null_and_absent_are_two_things_for_caps():
    absent = read("gemma2-softcaps", attn_logit_softcapping=None, final_logit_softcapping=None)
    assert (absent.attention_softcap, absent.final_softcap) == (50.0, 30.0)
    fields = fields_of("gemma2-softcaps") | {"attn_logit_softcapping": None, "final_logit_softcapping": None}
    null = FAMILIES["gemma2"].read_config(Fields(fields))
    assert (null.attention_softcap, null.final_softcap) == (0.0, 0.0)
    assert read("gemma3-scaled").final_softcap == 0.0


def test_gemma_3_has_two_ropes_in_either_form():
    old = read("gemma3-scaled")
    assert (old.rope, old.local_theta) == (Rope(theta=1000.0, scaling="linear", factor=4.0), 20.0)
    parameters = {
        "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
    }
    dropped = dict.fromkeys(("rope_theta", "rope_local_base_freq", "rope_scaling"))
    assert read("gemma3-scaled", rope_parameters=parameters, **dropped) == old
    default = read("gemma3-scaled", **dropped)
    assert (default.rope, default.local_theta) == (Rope(theta=1e6), 1e4)


def test_longrope_of_early_files():
    scaling = fields_of("phi3-longrope-short")["rope_scaling"]
    assert read("phi3-longrope-short", rope_scaling=scaling | {"type": "su"}) == read("phi3-longrope-short")
    assert read("phi3-longrope-short").rope.factor == 4.0


SCALED = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10.0}


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("gemma3-scaled", {"vision_config": {"hidden_size": 8}}, "text and images; only its text model"),
        ("gemma3-scaled", {"text_config": {"hidden_size": 8}}, "text and images; only its text model"),
        ("gemma3-types", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0"),
        ("gemma3-types", {"rope_parameters": {"rope_type": "linear"}}, "a dict for each of"),
        ("gemma3-types", {"rope_parameters": {"sliding_attention": SCALED}}, "scales the positions of local layers"),
        ("gemma3-types", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
        ("gemma2-softcaps", {"attention_bias": True}, "attention_bias = True"),
        ("gemma2-softcaps", {"layer_types": ["full_attention"]}, "want 4 of sliding_attention, full_attention"),
        ("gemma2-softcaps", {"layer_types": ["chunked_attention"] * 4}, "layer_types = .'chunked_attention'"),
        ("phi3-window", {"attention_bias": True}, "attention_bias = True"),
        ("phi3-window", {"rope_scaling": SCALED}, "by 'linear'; Phi-3 is supported with longrope"),
        ("phi3-longrope-short", {"original_max_position_embeddings": None}, "from 64, but original_max.* = 4096"),
        ("phi3-longrope-short", {"max_position_embeddings": None}, "but lacks max_position_embeddings"),
        ("phi3-longrope-short", {"partial_rotary_factor": None}, "have 3 divisors, but a head of 8 has 4 pairs"),
        ("phi3-longrope-short", {"rope_scaling": {"type": "longrope", "long_factor": [1.0]}}, "gives no short_factor"),
        ("glm4-0414", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    ],
)
def test_what_cannot_be_represented_is_refused(name, changes, message):
    with pytest.raises(ValueError, match=message):
        read(name, **changes)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("gemma2-softcaps", {"qk_norm": True}, "Gemma2Config.qk_norm = True has no counterpart"),
        ("gemma3-types", {"qk_norm": False}, "Gemma3Config.qk_norm = False has no counterpart"),
        ("gemma3-types", {"num_heads": 3, "num_kv_heads": 1}, "d_model=32 with num_heads=3"),
        ("phi3-window", {"qk_norm": True}, "Phi3Config.qk_norm = True has no counterpart"),
        ("phi3-window", {"rope": Rope(scaling="linear", factor=2.0)}, "Rope.scaling = 'linear' cannot be written"),
        ("glm4-0414", {"qk_norm": True}, "Glm4Config.qk_norm = True has no counterpart"),
        ("glm4-2024", {"qk_norm": True}, "GlmConfig.qk_norm = True has no counterpart"),
        ("glm4-2024", {"rope": Rope(scaling="ntk", factor=2.0)}, "'ntk' has no counterpart"),
    ],
)
def test_what_their_classes_lack_is_not_written(name, changes, message):
    with pytest.raises(ValueError, match=message):
        write(dataclasses.replace(read(name), **changes), name)


@pytest.mark.parametrize(
    "rope",
    [
        Rope(fraction=1.0),
        Rope(fraction=0.5, scaling="llama3", factor=2.0, original_max_positions=32),
        Rope(theta=7.0, fraction=0.25, scaling="yarn", factor=2.0, original_max_positions=32),
    ],
)
def test_glm_4_turns_as_much_of_a_head_as_it_said(rope):
    config = dataclasses.replace(read("glm4-0414"), rope=rope)
    assert FAMILIES["glm4"].read_config(Fields(write(config, "glm4-0414"))).rope == rope


def test_longrope_is_written_with_what_does_not_follow():
    config = read("phi3-longrope-short")
    for changes in ({}, {"factor": 3.0}, {"attention_factor": 1.5}):
        changed = dataclasses.replace(config, rope=dataclasses.replace(config.rope, **changes))
        written = write(changed, "phi3-longrope-short")
        assert written["rope_scaling"].keys() - {"type", "short_factor", "long_factor"} == changes.keys()
        assert FAMILIES["phi3"].read_config(Fields(written)) == changed


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("gemma2-softcaps", {"hidden_act": "gelu_pytorch_tanh", "cache_implementation": "hybrid"}),
        ("gemma3-scaled", {"sliding_window_pattern": 6, "cache_implementation": "hybrid"}),
        ("gemma3-types", {"_sliding_window_pattern": 6, "attn_logit_softcapping": None}),
        ("phi3-longrope-short", {"auto_map": {"AutoConfig": "x.Y"}, "resid_pdrop": 0.1, "embd_pdrop": 0.0}),
        ("glm4-2024", {"attention_dropout": 0.0}),
    ],
)
def test_files_as_they_were_published_hold_nothing_unknown(name, more):
    fields = Fields(fields_of(name, **more))
    assert FAMILIES[fields["model_type"]].read_config(fields) == read(name)
    assert fields.unread() == {}


@pytest.mark.parity
@pytest.mark.parametrize("case", ["phi3-longrope-short"], indirect=True)
def test_longrope_changes_its_factors_where_transformers_does(case, tmp_path):
    torch = pytest.importorskip("torch")
    case.theirs.save_pretrained(tmp_path)
    model, params, _ = load_pretrained(tmp_path)
    border = model.config.rope.original_max_positions
    ids = case.rng().integers(3, model.config.vocab_size, (1, border + 1)).astype(np.int32)
    ones = np.ones_like(ids)
    rows = {"ids": ids, "targets": ids, "positions": np.arange(border + 1, dtype=np.int32)[None], "segments": ones}
    found = {}
    for length in (border, border + 1):
        tokens = Tokens(**{name: row[:, :length] for name, row in rows.items()}, weights=1.0 * ones[:, :length])
        found[length] = np.asarray(model.apply(params, tokens).logits)
        with torch.no_grad():
            wanted = case.theirs(torch.from_numpy(ids[:, :length]).long(), use_cache=False).logits.numpy()
        np.testing.assert_allclose(found[length], wanted, atol=1e-4)
    assert np.abs(found[border] - found[border + 1][:, :border]).max() > 1e-2
