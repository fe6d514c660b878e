"""No objective holds the logits of all tokens, and none changes by that: on one device and on meshes of eight."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtrain.evaluate.heldout import ByteLoss
from jaxtrain.kernels.cross_entropy import api
from jaxtrain.models import build_model
from jaxtrain.objectives import DPO, LM, SFT, PPOPolicy
from jaxtrain.objectives.dpo import add_reference
from jaxtrain.rl.rollout import score_rows
from jaxtrain.sharding import MeshConfig, make_mesh, param_shardings, put_batch
from jaxtrain.train.state import new_state
from jaxtrain.train.step import make_train_step
from jaxtrain.types import Tokens

OBJECTIVES = {
    "LM": LM(z_loss=0.01, label_smoothing=0.1),
    "SFT": SFT(reduction="sequence", label_smoothing=0.2),
    "DPO": DPO(),
    "PPOPolicy": PPOPolicy(entropy_coef=0.1, kl_coef=0.2, temperature=0.7),
}
MESHES = {
    "tensor": dict(tensor=8),
    "fsdp-tensor": dict(fsdp=2, tensor=4),
    "context-data": dict(context=2, data=4),
    "data": dict(data=8),
}
WARNING = "Involuntary full rematerialization"


def sizes_of(jaxpr) -> list[int]:
    """How many numbers each array of a program holds, in all that it calls."""
    found = []
    for eqn in jaxpr.eqns:
        found += [out.aval.size for out in eqn.outvars if hasattr(out.aval, "size")]
        for inner in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                found += sizes_of(inner)
    return found


@pytest.fixture
def large(tools):
    """``large(cross_entropy)``: a model whose logits of 1,280 tokens are by far its largest array."""

    def build(cross_entropy):
        sizes = dict(vocab_size=40_000, d_model=8, num_heads=2, num_kv_heads=1, d_ff=8, num_layers=1, heads=("lm",))
        return build_model(tools.tiny_config(**sizes, cross_entropy=cross_entropy))

    return build


def rows(tools, objective):
    """A batch of the objective's kind with 1,280 tokens or more."""
    return jax.tree.map(lambda x: np.concatenate([x] * 9), tools.batch(objective))


def largest(function, *args) -> int:
    """The largest array that a traced function computes."""
    return max(sizes_of(jax.make_jaxpr(function)(*args).jaxpr))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_no_array_of_the_train_step_is_as_large_as_the_logits(name, large, tools):
    objective, tx = OBJECTIVES[name], optax.sgd(0.1)
    batch = rows(tools, objective)
    tokens = (2 if name == "DPO" else 1) * 9 * 8 * 19

    def find(model):
        state = jax.eval_shape(lambda: new_state(model.init(jax.random.key(0)), tx, 0))
        return largest(make_train_step(model.apply, objective, tx), state, batch)

    assert find(large("auto")) <= api.PART_BYTES // 4 < tokens * 40_000
    assert find(large("dense")) >= tokens * 40_000  # the test would see them


@pytest.mark.parametrize("kind", ["scores", "reference", "bits-per-byte"])
def test_no_array_of_scoring_is_as_large_as_the_logits(kind, large, tools):
    pairs = kind == "reference"
    batch = rows(tools, DPO() if pairs else LM())

    def find(model):
        if kind == "scores":
            return largest(lambda p: score_rows.__wrapped__(model.apply, 1.0, p, batch), model.shapes())
        if kind == "reference":
            return largest(lambda p: add_reference(model.apply, p, batch), model.shapes())
        return largest(lambda p: ByteLoss(np.ones(40_000, np.int32))(model.apply, p, batch, None), model.shapes())

    assert find(large("auto")) <= api.PART_BYTES // 4
    assert find(large("dense")) >= 9 * 8 * 19 * 40_000


@pytest.fixture(scope="module")
def compute():
    """(mesh, backend) -> loss, metrics and gradients of every objective, and what the compiler wrote."""
    done = {}

    def run(tools, capfd, axes, cross_entropy):
        key = (tuple(axes.items()), cross_entropy)
        if key in done:
            return done[key]
        model = build_model(
            tools.tiny_config(
                vocab_size=96, heads=("lm",), num_kv_heads=8, num_heads=8, num_layers=1, cross_entropy=cross_entropy
            )
        )
        rng = np.random.default_rng(0)
        params = jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype), model.shapes())
        batches = {name: tools.batch(objective) for name, objective in OBJECTIVES.items()}
        if axes.get("context"):
            batches = {name: tools.pad(batch, right=1) for name, batch in batches.items()}

        def everything(params, batches):
            found = {}
            for name, objective in OBJECTIVES.items():

                def total(params, objective=objective, batch=batches[name]):
                    loss = objective(model.apply, params, batch, None)
                    return loss.total, loss

                found[name] = jax.grad(total, has_aux=True)(params)
            return found

        mesh = make_mesh(MeshConfig(**axes))
        params = jax.device_put(params, param_shardings(model.axes, model.shapes(), mesh, model.rules))
        capfd.readouterr()
        with pytest.MonkeyPatch.context() as patch, jax.set_mesh(mesh):
            patch.setattr(api, "part_columns", lambda tokens, columns, size=4: 5)
            program = jax.jit(everything, compiler_options=tools.COMPILE_FAST)
            done[key] = jax.device_get(program(params, put_batch(batches, mesh))), capfd.readouterr().err
        return done[key]

    return run


@pytest.mark.parametrize("axes", MESHES.values(), ids=MESHES)
def test_meshes_of_eight_equal_whole_logits_on_one(axes, compute, tools, assert_close, capfd):
    expected, _ = compute(tools, capfd, {}, "dense")
    found, said = compute(tools, capfd, axes, "chunked")
    for name in OBJECTIVES:
        assert_close(found[name], expected[name], 2e-5)
    assert WARNING not in said


def test_outputs_with_logits_at_hand():
    """``Outputs(logits=…)``, ``replace(logits=…)`` and a lazy record read the same."""
    import dataclasses

    from jaxtrain.models.heads import LazyLogits
    from jaxtrain.objectives.common import token_logps
    from jaxtrain.types import Outputs

    rng = np.random.default_rng(0)
    hidden, matrix, bias = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((2, 3, 4), (4, 5), (5,)))
    targets = rng.integers(0, 5, (2, 3))
    lazy = Outputs(hidden=hidden, lm=LazyLogits(hidden=hidden, matrix=matrix, bias=bias, table=False, softcap=3.0))
    wanted = 3.0 * np.tanh((np.asarray(hidden) @ np.asarray(matrix) + bias) / 3.0)
    np.testing.assert_allclose(lazy.logits, wanted, rtol=1e-5)
    for outputs in (Outputs(hidden=hidden, logits=wanted), dataclasses.replace(lazy, logits=wanted)):
        np.testing.assert_array_equal(outputs.logits, wanted)
        np.testing.assert_allclose(token_logps(outputs.lm, targets), token_logps(lazy.lm, targets), rtol=1e-5)
    assert Outputs(hidden=hidden).logits is None
    assert jax.tree.structure(jax.jit(lambda x: x)(lazy)) == jax.tree.structure(lazy)


def test_label_smoothing_by_hand():
    """Σ_v q_v (−log p_v) with q the target's one-hot mixed with the uniform distribution."""
    from jaxtrain.types import Outputs

    p = np.array([0.5, 0.25, 0.25])
    tokens = Tokens(**{name: np.zeros((1, 1), np.int32) for name in ("ids", "targets", "positions", "segments")},
                    weights=np.ones((1, 1), np.float32))  # fmt: skip
    q = 0.9 * np.array([1.0, 0.0, 0.0]) + 0.1 / 3
    for objective in (LM(label_smoothing=0.1), SFT(label_smoothing=0.1)):
        loss = objective(lambda *a, **k: Outputs(hidden=None, logits=jnp.log(p)[None, None]), {}, tokens, None)
        np.testing.assert_allclose(loss.total, -(q * np.log(p)).sum(), rtol=1e-6)
        np.testing.assert_allclose(loss.metrics["loss"].total, np.log(2), rtol=1e-6)
    with pytest.raises(ValueError, match=r"LM.label_smoothing is 1.0; give it a number of at least 0 and below 1"):
        LM(label_smoothing=1.0)
