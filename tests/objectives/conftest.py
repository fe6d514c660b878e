"""A tiny real decoder with every head, and batches of every kind for it."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.models import DecoderConfig, build_model
from jaxtrain.objectives import DPO, LM, OBJECTIVES, SFT, PPOCritic, PPOPolicy, PPOShared, RewardModel
from jaxtrain.types import Outputs, Pairs, Rollout, Tokens

V = 23
EOS = 2  # also the padding id: masks must come from lengths, never from ids
LENGTHS = (19, 3, 11, 2, 7, 16, 5, 8)

# Options on.  An objective of the table without an entry here is tested with its defaults.
VARIANTS = {
    "LM": LM(z_loss=0.01),
    "SFT": SFT(),
    "SFT-sequence": SFT(reduction="sequence"),
    "RewardModel": RewardModel(centering=0.01, use_margin=True),
    "DPO": DPO(label_smoothing=0.1),
    "DPO-ipo": DPO(loss="ipo"),
    "PPOPolicy": PPOPolicy(dual_clip=3.0, entropy_coef=0.1, kl_coef=0.2, temperature=0.7),
    "PPOCritic": PPOCritic(),
    "PPOShared": PPOShared(policy=PPOPolicy(entropy_coef=0.1), vf_coef=0.5),
}
CASES = VARIANTS | {name: cls() for name, (cls, _) in OBJECTIVES.items() if name not in VARIANTS}
# The tests compile many small programs and run each once or twice.
COMPILE_FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def pytest_generate_tests(metafunc):
    if "any_objective" in metafunc.fixturenames:
        metafunc.parametrize("any_objective", CASES.values(), ids=CASES)
    if "packable" in metafunc.fixturenames:
        chosen = {name: case for name, case in CASES.items() if record_of(case) is not Pairs}
        metafunc.parametrize("packable", chosen.values(), ids=chosen)


def record_of(objective):
    return next(record for cls, record in OBJECTIVES.values() if cls is type(objective))


def make_tokens(rng, lengths=LENGTHS) -> Tokens:
    """One example a row, padded on the right; a third of it is prompt.  Rows end in EOS."""
    rows, T = len(lengths), max(lengths)
    fields = {name: np.zeros((rows, T), np.int32) for name in ("ids", "targets", "positions", "segments")}
    weights = np.zeros((rows, T), np.float32)
    for i, n in enumerate(lengths):
        ids = rng.integers(3, V, n + 1)
        ids[-1] = EOS
        fields["ids"][i, :n], fields["targets"][i, :n] = ids[:-1], ids[1:]
        fields["positions"][i, :n], fields["segments"][i, :n] = np.arange(n), 1
        weights[i, n // 3 : n] = 1
    return pad(Tokens(weights=weights, **fields))


def make_rollout(rng) -> Rollout:
    tokens = make_tokens(rng)
    shape = tokens.ids.shape
    floats = {f.name: rng.normal(size=shape).astype(np.float32) for f in dataclasses.fields(Rollout)[1:]}
    for name in ("old_logps", "reference_logps"):
        floats[name] = 0.3 * floats[name] - np.log(V).astype(np.float32)
    return Rollout(tokens=tokens, **floats)


def make_pairs(rng) -> Pairs:
    floats = {f.name: rng.normal(size=len(LENGTHS)).astype(np.float32) for f in dataclasses.fields(Pairs)[2:]}
    floats["weight"] = np.array([1, 1, 1 / 3, 1 / 3, 1 / 3, 1, 1, 1], np.float32)
    # The sides are padded to different lengths: 19 and 12.
    return Pairs(chosen=make_tokens(rng), rejected=make_tokens(rng, (4, 12, 9, 2, 10, 3, 6, 12)), **floats)


def pad(batch, left=0, right=0):
    """Adds padding columns that hold the EOS id and, in what only padding could read, rubbish."""

    def columns(x, fill):
        return np.pad(x, ((0, 0), (left, right)), constant_values=fill)

    if isinstance(batch, Tokens):
        fills = {"ids": EOS, "targets": EOS, "weights": 0, "positions": 0, "segments": 0}
        outside = batch.segments == 0
        tokens = dataclasses.replace(
            batch, ids=np.where(outside, EOS, batch.ids), targets=np.where(outside, EOS, batch.targets)
        )
        return Tokens(**{name: columns(getattr(tokens, name), fill) for name, fill in fills.items()})
    if isinstance(batch, Pairs):
        return dataclasses.replace(
            batch, chosen=pad(batch.chosen, left, right), rejected=pad(batch.rejected, left, right)
        )
    rubbish = dict.fromkeys(("old_logps", "reference_logps"), -np.inf)
    names = [field.name for field in dataclasses.fields(Rollout)[1:]]
    floats = {name: columns(getattr(batch, name), rubbish.get(name, 1e4)) for name in names}
    return Rollout(tokens=pad(batch.tokens, left, right), **floats)


def unweighted(batch):
    """The same rows with nothing to learn from them."""
    if isinstance(batch, Tokens):
        return dataclasses.replace(batch, weights=np.zeros_like(batch.weights))
    if isinstance(batch, Pairs):
        return dataclasses.replace(
            batch,
            chosen=unweighted(batch.chosen),
            rejected=unweighted(batch.rejected),
            weight=np.zeros_like(batch.weight),
        )
    return dataclasses.replace(batch, tokens=unweighted(batch.tokens))


MAKERS = {Tokens: make_tokens, Rollout: make_rollout, Pairs: make_pairs}


@pytest.fixture
def tools():
    """The functions above, for tests to call."""

    class Tools:
        EOS, V, LENGTHS, COMPILE_FAST = EOS, V, LENGTHS, COMPILE_FAST
        pad, unweighted, record_of = staticmethod(pad), staticmethod(unweighted), staticmethod(record_of)
        make_tokens, make_rollout = staticmethod(make_tokens), staticmethod(make_rollout)
        make_pairs, tiny_config = staticmethod(make_pairs), staticmethod(tiny_config)

        @staticmethod
        def batch(objective, seed=0):
            return MAKERS[record_of(objective)](np.random.default_rng(seed))

    return Tools


def tiny_config(**changes) -> DecoderConfig:
    sizes = {"vocab_size": V, "num_layers": 2, "d_model": 16, "num_heads": 4, "num_kv_heads": 2, "d_ff": 32}
    return DecoderConfig(**sizes | {"max_positions": 128, "heads": ("lm", "reward", "value")} | changes)


def random_params(model, seed=0):
    """Larger than an initialisation, so that the outputs differ well between tokens; the value head too."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), leaf.dtype), model.shapes())


@pytest.fixture(scope="session")
def model():
    """``apply, params`` of the decoder with a learned position table on top, so that positions matter.

    RoPE reads only differences of positions: alone it would not notice a packed row that goes on counting.
    """
    decoder = build_model(tiny_config())
    params = random_params(decoder)
    table = jnp.asarray(0.3 * np.random.default_rng(1).normal(size=(128, V)), jnp.float32)

    def apply(params, tokens, *, cache=None, rng=None):
        outputs = decoder.apply(params["decoder"], tokens, cache=cache, rng=rng)
        extra = params["positions"][tokens.positions]
        return dataclasses.replace(
            outputs,
            logits=outputs.logits + extra,
            rewards=outputs.rewards + extra[..., 0],
            values=outputs.values + extra[..., 1],
        )

    return apply, {"decoder": params, "positions": table}


@pytest.fixture
def lookup():
    """``apply, params`` of the simplest model with every head: it reads each output off its token's row."""

    def apply(params, tokens, *, cache=None, rng=None):
        return Outputs(hidden=None, **{name: table[tokens.ids] for name, table in params.items()})

    rng = np.random.default_rng(0)
    shapes = {"logits": (V, V), "rewards": (V,), "values": (V,)}
    return apply, {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture(scope="session")
def dropout_model():
    """``apply, params`` of the bare decoder with dropout configured."""
    decoder = build_model(tiny_config(dropout=0.5))
    return decoder.apply, random_params(decoder)


@pytest.fixture(scope="session")
def evaluate(model):
    """(objective, batch) -> Loss, gradients of its total; NumPy."""
    apply, params = model
    compiled = {}

    def run(objective, batch):
        if objective not in compiled:

            def total(params, batch):
                loss = objective(apply, params, batch, None)
                return loss.total, loss

            compiled[objective] = jax.jit(jax.value_and_grad(total, has_aux=True), compiler_options=COMPILE_FAST)
        (_, loss), grads = compiled[objective](params, jax.tree.map(jnp.asarray, batch))
        return jax.device_get((loss, grads))

    return run


@pytest.fixture(scope="session")
def assert_close():
    """Compares trees, each leaf to within ``tolerance`` of the largest entry of its tree."""

    def check(found, expected, tolerance=1e-5):
        found_leaves, tree = jax.tree.flatten(found)
        expected_leaves, expected_tree = jax.tree.flatten(expected)
        assert tree == expected_tree
        scale = max(float(np.max(np.abs(x))) for x in expected_leaves)
        for a, b in zip(found_leaves, expected_leaves, strict=True):
            np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * scale)

    return check
