"""A tiny decoder that divides over every mesh of eight devices, and batches for every objective."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from jaxtrain.models import DecoderConfig, build_model
from jaxtrain.objectives import DPO, LM, SFT, PPOCritic, PPOPolicy, PPOShared, RewardModel
from jaxtrain.types import Pairs, Rollout, Tokens

V, T = 24, 16
# Very uneven: a row's length says how much of it is trained.
LENGTHS = (16, 2, 11, 3, 14, 5, 9, 7)
OBJECTIVES = {
    "LM": LM(z_loss=0.01),
    "SFT": SFT(),
    "SFT-sequence": SFT(reduction="sequence"),
    "RewardModel": RewardModel(centering=0.01, use_margin=True),
    "DPO": DPO(label_smoothing=0.1),
    "PPOPolicy": PPOPolicy(dual_clip=3.0, entropy_coef=0.1),
    "PPOCritic": PPOCritic(),
    "PPOShared": PPOShared(policy=PPOPolicy(entropy_coef=0.1), vf_coef=0.5),
}
# These tests compile much and run it once or twice.
COMPILE_FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def make_tokens(rng, lengths=LENGTHS, packed: bool = False) -> Tokens:
    """Rows padded on the right, a third of each a prompt; ``packed`` puts two segments into the longer ones."""
    rows = len(lengths)
    steps = np.broadcast_to(np.arange(T), (rows, T))
    inside = steps < np.array(lengths)[:, None]
    ids = np.where(inside, rng.integers(1, V, (rows, T)), 0).astype(np.int32)
    cut = np.array([n // 2 if packed and n > 8 else n for n in lengths])[:, None]
    second = inside & (steps >= cut)
    return Tokens(
        ids=ids,
        targets=np.where(inside, rng.integers(1, V, (rows, T)), 0).astype(np.int32),
        weights=(inside & (steps % 3 != 0)).astype(np.float32),
        positions=np.where(inside, np.where(second, steps - cut, steps), 0).astype(np.int32),
        segments=np.where(second, 2, inside).astype(np.int32),
    )


def make_batch(objective, seed: int = 0):
    rng = np.random.default_rng(seed)
    if isinstance(objective, LM | SFT):
        return make_tokens(rng, packed=True)
    rows = len(LENGTHS)
    if isinstance(objective, RewardModel | DPO):
        floats = {f.name: rng.normal(size=rows).astype(np.float32) for f in dataclasses.fields(Pairs)[2:]}
        floats["weight"] = np.array([1, 1, 0.5, 0.5, 1 / 3, 1, 0, 1], np.float32)
        return Pairs(chosen=make_tokens(rng), rejected=make_tokens(rng, LENGTHS[::-1]), **floats)
    floats = {f.name: rng.normal(size=(rows, T)).astype(np.float32) for f in dataclasses.fields(Rollout)[1:]}
    for name in ("old_logps", "reference_logps"):
        floats[name] = (0.3 * floats[name] - np.log(V)).astype(np.float32)
    return Rollout(tokens=make_tokens(rng), **floats)


def tiny_model(**changes):
    sizes = {
        "vocab_size": V,
        "num_layers": 2,
        "d_model": 16,
        "num_heads": 16,
        "num_kv_heads": 8,
        "head_dim": 2,
    }
    sizes |= {"d_ff": 32, "max_positions": 32, "heads": ("lm", "reward", "value")}
    return build_model(DecoderConfig(**sizes | changes))


def random_params(model, seed: int = 0):
    """Larger than an initialisation, the value head's zeros too, so that everything has a gradient."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: (0.3 * rng.normal(size=x.shape)).astype(np.float32), model.shapes())


TOLERANCE = 1e-5


def assert_trees_close(found, expected, tolerance=TOLERANCE):
    """Each leaf to within ``tolerance`` of the largest entry of the tree."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    scale = max(float(np.max(np.abs(x))) for x in jax.tree.leaves(expected))
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * scale, err_msg=str(path))


def make_tools():
    """The functions above, for tests to call; other processes' too."""

    class Tools:
        objectives, fast, V, T, lengths, tolerance = OBJECTIVES, COMPILE_FAST, V, T, LENGTHS, TOLERANCE
        model, params = staticmethod(tiny_model), staticmethod(random_params)
        batch, tokens = staticmethod(make_batch), staticmethod(make_tokens)
        assert_close = staticmethod(assert_trees_close)

    return Tools


@pytest.fixture(scope="session")
def tools():
    """``make_tools``."""
    return make_tools()


def pytest_generate_tests(metafunc):
    if "objective" in metafunc.fixturenames:
        metafunc.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES, scope="session")
