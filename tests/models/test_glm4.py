"""GLM-4: what its two editions consist of, and what their configs refuse."""

from __future__ import annotations

import pytest

from jaxtrain.models import Glm4Config, GlmConfig, Rope, build_model

SIZES = {"vocab_size": 20, "num_layers": 2, "d_model": 16, "num_heads": 2, "num_kv_heads": 1, "d_ff": 24}
SIZES |= {"max_positions": 32}


@pytest.mark.smoke
def test_the_later_edition_has_two_norms_more():
    norms = {"attention_norm", "mlp_norm"}
    for family, wanted in ((GlmConfig, norms), (Glm4Config, norms | {"attention_post_norm", "mlp_post_norm"})):
        shapes = build_model(family(**SIZES)).shapes()
        assert set(shapes["layers"]) == wanted | {"attention", "mlp"}
        assert "lm_head" in shapes
        biased = {name for name, part in shapes["layers"]["attention"].items() if "bias" in part}
        assert biased == {"query", "key", "value"}


def test_published_sizes_give_published_counts():
    sizes = {"vocab_size": 151552, "num_layers": 40, "d_model": 4096, "num_heads": 32, "num_kv_heads": 2}
    config = Glm4Config(**sizes, d_ff=13696, max_positions=32768)
    assert build_model(config).num_params() == 9_400_279_040
    assert config.rope.rotary_dim(config.head_dim) == 64


def test_a_part_of_a_head_that_makes_no_pairs_is_refused():
    with pytest.raises(ValueError, match=r"Rope.fraction=0.4 of head_dim=8 is 3 dimensions; it must be even"):
        Glm4Config(**SIZES, rope=Rope(fraction=0.4))
