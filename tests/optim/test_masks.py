"""Rules over parameter paths: first match decides, everything is covered, stale rules are refused."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from jaxtrain.optim import DEFAULT_DECAY_RULES, decay_mask, frozen_mask, parameter_paths, rule_mask

PARAMS = {
    "embed": {"embedding": jnp.zeros((4, 2))},
    "layers": {
        "attention": {"query": {"kernel": jnp.zeros((1, 2, 1, 2)), "bias": jnp.zeros((1, 1, 2))}},
        "norm": {"scale": jnp.zeros((1, 2))},
    },
}


def flat(mask):
    return dict(zip(parameter_paths(mask), jax.tree.leaves(mask), strict=True))


def test_default_rules_decay_matrices_only():
    assert flat(decay_mask(PARAMS)) == {
        "embed/embedding": True,
        "layers/attention/query/kernel": True,
        "layers/attention/query/bias": False,
        "layers/norm/scale": False,
    }


def test_the_first_matching_rule_decides():
    rules = (("^embed/", False), ("embedding|kernel", True), ("", False))
    assert [path for path, value in flat(decay_mask(PARAMS, rules)).items() if value] == [
        "layers/attention/query/kernel"
    ]
    reordered = (rules[1], rules[0], rules[2])
    assert flat(decay_mask(PARAMS, reordered))["embed/embedding"] is True


def test_an_uncovered_parameter_is_named():
    with pytest.raises(ValueError, match=r"no rule covers the parameter 'layers/norm/scale'"):
        rule_mask(PARAMS, (("kernel|embedding|bias", True),), where="AdamW.decay_rules")
    with pytest.raises(ValueError, match="no rule covers the parameter 'odd'"):
        decay_mask({"odd": jnp.zeros(2)}, DEFAULT_DECAY_RULES)


def test_a_rule_that_matches_nothing_is_named():
    with pytest.raises(ValueError, match=r"'kernal' matches no parameter.*layers/norm/scale"):
        decay_mask(PARAMS, (("kernal", True), ("", False)))


def test_default_rules_fit_models_without_norms():
    assert flat(decay_mask({"kernel": jnp.zeros((2, 2))})) == {"kernel": True}


def test_an_invalid_pattern_is_named():
    with pytest.raises(ValueError, match=r"'\(' is not a valid regular expression"):
        decay_mask(PARAMS, (("(", True),))


def test_frozen_parameters():
    assert flat(frozen_mask(PARAMS, ["^embed/", "scale"])) == {
        "embed/embedding": True,
        "layers/attention/query/kernel": False,
        "layers/attention/query/bias": False,
        "layers/norm/scale": True,
    }
    assert not any(jax.tree.leaves(frozen_mask(PARAMS, [])))
    with pytest.raises(ValueError, match="'hed' matches no parameter"):
        frozen_mask(PARAMS, ["embed", "hed"])
    with pytest.raises(ValueError, match="leave at least one to train"):
        frozen_mask(PARAMS, ["embed", "layers"])
