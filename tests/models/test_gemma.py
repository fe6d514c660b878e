"""Gemma 2 and 3: which layer is of which kind, and what their configs refuse."""

from __future__ import annotations

import pytest

from jaxtrain.models import Gemma2Config, Gemma3Config, Rope, build_model

SIZES = {"vocab_size": 20, "d_model": 16, "num_heads": 2, "num_kv_heads": 1, "d_ff": 24, "max_positions": 32}

NAMES = ("vocab_size", "num_layers", "d_model", "num_heads", "num_kv_heads", "d_ff", "head_dim")
PUBLISHED = {
    "Gemma 2 2B": dict(zip(NAMES, (256000, 26, 2304, 8, 4, 9216, 256), strict=True)),
    "Gemma 3 270M": dict(zip(NAMES, (262144, 18, 640, 4, 1, 2048, 256), strict=True)),
    "Gemma 3 1B": dict(zip(NAMES, (262144, 26, 1152, 4, 1, 6912, 256), strict=True)),
}


@pytest.mark.smoke
def test_layers_follow_the_pattern():
    layers = Gemma3Config(**SIZES, num_layers=13, window=7, rope=Rope(theta=5.0), local_theta=3.0).spec().layers()
    local, rest = (7, Rope(theta=3.0)), (0, Rope(theta=5.0))
    found = [(layer.attention.window, layer.attention.rope) for layer in layers]
    assert found == [*[local] * 5, rest, *[local] * 5, rest, local]
    layers = Gemma2Config(**SIZES, num_layers=3, window=7, attention_softcap=9.0).spec().layers()
    assert [(layer.attention.window, layer.attention.softcap) for layer in layers] == [(7, 9.0), (0, 9.0), (7, 9.0)]


def test_what_stands_around_the_layers():
    config = Gemma2Config(**SIZES, num_layers=1, head_dim=8, query_pre_attn_scalar=16, final_softcap=5.0)
    spec = config.spec()
    assert (spec.embed_scale, spec.final_softcap, spec.norm.plus_one) == (4.0, 5.0, True)
    assert spec.layers()[0].attention.scale == 0.25
    assert Gemma3Config(**SIZES, num_layers=1, head_dim=64).spec().layers()[0].attention.scale == 0.125
    names = {"attention_norm", "attention_post_norm", "mlp_norm", "mlp_post_norm", "attention", "mlp"}
    assert set(build_model(config).shapes()["layers"]) == names


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        (Gemma2Config, {"pattern": ()}, r"pattern must be made of \('local', 'global'\), found \(\)"),
        (Gemma3Config, {"pattern": ("local", "full")}, "found .*'full'"),
        (Gemma3Config, {"window": 0}, "window=0, but local layers need at least 1"),
        (Gemma2Config, {"attention_softcap": -1.0}, "attention_softcap must not be negative, found -1.0"),
        (Gemma2Config, {"final_softcap": -2.0}, "must not be negative, found 0 and -2.0"),
        (Gemma3Config, {"query_pre_attn_scalar": -3}, "must not be negative, found -3 and 0.0"),
    ],
)
def test_mistakes_are_named(family, changes, message):
    with pytest.raises(ValueError, match=message):
        family(**SIZES | {"num_layers": 2} | changes)


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (Gemma2Config(**SIZES | PUBLISHED["Gemma 2 2B"]), 2_614_341_888),
        (Gemma3Config(**SIZES | PUBLISHED["Gemma 3 270M"]), 268_098_176),
        (Gemma3Config(**SIZES | PUBLISHED["Gemma 3 1B"]), 999_885_952),
    ],
    ids=PUBLISHED,
)
def test_published_sizes_give_published_counts(config, count):
    assert build_model(config).num_params() == count


def test_a_model_without_local_layers_needs_no_window():
    assert Gemma2Config(**SIZES, num_layers=2, pattern=("global",), window=0).kinds() == ("global", "global")
