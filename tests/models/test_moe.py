"""Mixtures of experts against plain loops: routing, capacity, padding, balance, and experts split over devices."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from jaxtrain.models import DeepseekV3Config, MixtralConfig, Qwen3MoeConfig, build_model
from jaxtrain.models.balance import BalanceSpec, auxiliary, move_biases
from jaxtrain.models.moe import INNER, OUTER, ROUTER, MoESpec, route, sparse
from jaxtrain.sharding import DEFAULT_RULES, MeshConfig, ShardingRules, make_mesh

B, T, D, E, F = 8, 6, 12, 8, 20
QUICK = {"xla_backend_optimization_level": 0}
SPECS = {
    "top2": MoESpec(num_experts=E, top_k=2, d_ff=F),
    "raw": MoESpec(num_experts=E, top_k=3, d_ff=F, renormalize=False, sequence_balance=True),
    "groups": MoESpec(num_experts=E, top_k=3, d_ff=F, scores="sigmoid", bias=True, groups=4, top_groups=2, scale=2.5),
    "capacity": MoESpec(num_experts=E, top_k=2, d_ff=F, capacity_factor=0.8, sequence_balance=True),
}
# Rows of two texts, some of which end early.
SEGMENTS = np.array([[1, 1, 1, 2, 2, 2], [1, 1, 1, 1, 0, 0], [1, 2, 2, 2, 2, 0], [0, 0, 0, 0, 0, 0]] * 2, np.int32)


def make(spec, seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"router": (D, E), "gate": (E, D, F), "up": (E, D, F), "down": (E, F, D)}
    weights = {name: (0.5 * rng.normal(size=shape)).astype(np.float32) for name, shape in shapes.items()}
    if spec.bias:
        weights["bias"] = (0.3 * rng.normal(size=E)).astype(np.float32)
    return rng.normal(size=(B, T, D)).astype(np.float32), weights


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def plain_shares(spec, logits, bias):
    """What ``route`` should say of one token: {expert: weight}."""
    scores = softmax(logits) if spec.scores == "softmax" else 1 / (1 + np.exp(-logits))
    choice = scores + (0 if bias is None else bias)
    groups = choice.reshape(spec.groups, -1)
    used = np.argsort(-np.sort(groups, axis=1)[:, -2:].sum(1))[: spec.top_groups]
    size = E // spec.groups
    allowed = [e for e in range(E) if e // size in used]
    picked = sorted(allowed, key=lambda e: -choice[e])[: spec.top_k]
    total = sum(scores[e] for e in picked) if spec.renormalize else 1.0
    return {e: spec.scale * scores[e] / total for e in picked}


def plain(spec, x, segments, weights):
    """(y, dropped, counts) token by token, in the batch's order."""
    y, counts, held, dropped = np.zeros_like(x), np.zeros(E), np.zeros(E), 0
    capacity = np.ceil(spec.capacity_factor * spec.top_k * (segments > 0).sum() / E) if spec.capacity_factor else np.inf
    for b, t in zip(*np.nonzero(segments), strict=True):
        token = x[b, t]
        for e, share in plain_shares(spec, token @ weights["router"], weights.get("bias")).items():
            counts[e] += 1
            if held[e] == capacity:
                dropped += 1
                continue
            held[e] += 1
            gate, up = token @ weights["gate"][e], token @ weights["up"][e]
            y[b, t] += share * ((gate / (1 + np.exp(-gate)) * up) @ weights["down"][e])
    return y, dropped, counts


def compute(spec, x, segments, weights, mesh=None, rules=DEFAULT_RULES):
    """((y, what it says), gradients of x and weights), and the compiled program's text."""

    def total(x, weights):
        y, said = sparse(spec, x, segments, weights, rules)
        extra = jnp.sum(said["scores"] * jnp.arange(E)) + said["router_z"] + said.get("sequence", 0.0)
        return jnp.sum(jnp.where(segments[..., None] > 0, jnp.sin(y), 0.0)) + extra, (y, said)

    function = jax.jit(jax.grad(total, (0, 1), has_aux=True), compiler_options=QUICK)
    if mesh is None:
        grads, found = function(x, weights)
        return jax.device_get((found, grads)), ""
    names = {"router": ROUTER, "bias": ("router",), "gate": INNER, "up": INNER, "down": OUTER}
    placed = {
        name: jax.device_put(w, NamedSharding(mesh, DEFAULT_RULES.spec(names[name]))) for name, w in weights.items()
    }
    with jax.set_mesh(mesh):
        program = function.lower(x, placed).compile()
        grads, found = program(x, placed)
    return jax.device_get((found, grads)), program.as_text()


@pytest.fixture(scope="module")
def one_device():
    return {name: compute(spec, *make(spec)[:1], SEGMENTS, make(spec)[1])[0] for name, spec in SPECS.items()}


@pytest.mark.parametrize("name", SPECS)
def test_equals_a_loop_over_tokens(name, one_device):
    x, weights = make(SPECS[name])
    (y, said), _ = one_device[name]
    wanted, dropped, counts = plain(SPECS[name], x, SEGMENTS, weights)
    np.testing.assert_allclose(y, wanted, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(said["counts"], counts)
    assert said["tokens"] == (SEGMENTS > 0).sum()
    assert said["dropped"] == dropped and (dropped > 0) == (name == "capacity")


def test_gradients_are_those_of_every_expert_on_every_token(one_device):
    """The same sum, written as a product with a matrix of shares that is mostly 0."""
    spec = SPECS["groups"]
    x, weights = make(spec)
    valid = SEGMENTS.reshape(-1, 1) > 0

    def total(x, weights):
        x_ND = x.reshape(-1, D)
        logits = x_ND @ weights["router"]
        shares_NK, picked_NK, scores = route(spec, logits, weights["bias"])
        shares_NE = jnp.sum(jax.nn.one_hot(picked_NK, E) * shares_NK[..., None], axis=1) * valid
        gate, up = (jnp.einsum("nd,edf->nef", x_ND, weights[name]) for name in ("gate", "up"))
        y = jnp.einsum("nef,efd,ne->nd", jax.nn.silu(gate) * up, weights["down"], shares_NE)
        squared = jax.nn.logsumexp(logits, axis=-1) ** 2
        extra = jnp.sum(jnp.where(valid, scores, 0.0) * jnp.arange(E)) + jnp.sum(jnp.where(valid[:, 0], squared, 0.0))
        return jnp.sum(jnp.sin(y)) + extra

    wanted = jax.grad(total, (0, 1))(x, weights)
    wanted[1]["bias"] = jnp.zeros(E)  # picks, and is not differentiated
    found = one_device["groups"][1]
    for path, want in jax.tree_util.tree_leaves_with_path(wanted):
        got = dict(jax.tree_util.tree_leaves_with_path(found))[path]
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4, err_msg=str(path))


@pytest.mark.parametrize("name", ["raw", "capacity"])
def test_padding_has_no_say(name, one_device):
    """Not routed, no room taken, not counted, whatever it holds."""
    x, weights = make(SPECS[name])
    (spoilt, said), (grad_x, grads) = compute(
        SPECS[name], np.where(SEGMENTS[..., None] > 0, x, np.nan), SEGMENTS, weights
    )[0]
    (y, wanted), (wanted_x, wanted_grads) = one_device[name]
    valid = SEGMENTS > 0
    np.testing.assert_array_equal(spoilt[valid], y[valid])
    np.testing.assert_allclose(grad_x[valid], wanted_x[valid], rtol=1e-6, atol=1e-6)
    for name in wanted:
        np.testing.assert_array_equal(said[name], wanted[name], err_msg=name)
    for name in ("gate", "up", "down"):
        np.testing.assert_array_equal(grads[name], wanted_grads[name], err_msg=name)


MESHES = {
    "expert8": MeshConfig(expert=8),
    "expert2-fsdp2-tensor2": MeshConfig(expert=2, fsdp=2, tensor=2),
    "expert2-data2-context2": MeshConfig(expert=2, data=2, context=2),
}


@pytest.mark.parametrize(("name", "mesh"), [("groups", "expert8"), ("capacity", "expert2-data2-context2")]
                         + [("raw", mesh) for mesh in MESHES])  # fmt: skip
def test_experts_on_eight_devices_equal_one(name, mesh, one_device):
    x, weights = make(SPECS[name])
    found, text = compute(SPECS[name], x, SEGMENTS, weights, make_mesh(MESHES[mesh]))
    for path, got in jax.tree_util.tree_leaves_with_path(found):
        want = dict(jax.tree_util.tree_leaves_with_path(one_device[name]))[path]
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max(), err_msg=str(path))
    # No array anywhere in a device's program has the matrices of all experts.
    assert not re.search(rf"\[{E},({D},{F}|{F},{D})\]", text)
    assert re.search(rf"\[{E // MESHES[mesh].expert},({D},{F}|{F},{D})\]", text) or MESHES[mesh].tensor > 1


def test_the_search_for_gathered_experts_would_find_them():
    """The positive control of the test above: rules that split tokens over ``expert``, but not experts."""
    spec = SPECS["top2"]
    table = tuple((name, () if name == "experts" else axes) for name, axes in DEFAULT_RULES.table)
    x, weights = make(spec)
    _, text = compute(spec, x, SEGMENTS, weights, make_mesh(MeshConfig(expert=8)), ShardingRules(table=table))
    assert re.search(rf"\[{E},{D},{F}\]", text)


def test_uneven_rows_and_positions_on_a_mesh():
    spec = SPECS["top2"]
    x, weights = make(spec)
    x, segments = x[:3, :5], SEGMENTS[:3, :5]
    (y, said), _ = compute(spec, x, segments, weights)[0]
    (found, told), _ = compute(spec, x, segments, weights, make_mesh(MESHES["expert2-data2-context2"]))[0]
    np.testing.assert_allclose(found, y, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(told["counts"], said["counts"])


SIZES = {"vocab_size": 24, "num_layers": 2, "d_model": 16, "num_heads": 4, "num_kv_heads": 4, "d_ff": 24}
SIZES |= {"max_positions": 32, "num_experts": 8, "top_k": 2}
LATENT = {"expert_d_ff": 8, "latent_size": 8, "plain_dim": 4, "rope_dim": 4, "value_dim": 4}


def test_each_device_holds_its_own_experts():
    from jaxtrain.train.state import abstract_params

    model = build_model(MixtralConfig(**SIZES))
    shapes = abstract_params(model, make_mesh(MeshConfig(expert=4, fsdp=2)))["layers"]["mlp"]["experts"]
    for kernel in jax.tree.leaves(shapes):
        held = kernel.sharding.shard_shape(kernel.shape)
        assert held[1] == 2 and np.prod(held) * 8 == np.prod(kernel.shape)


def test_flops_are_those_of_active_experts():
    config = DeepseekV3Config(**SIZES, **LATENT, shared_experts=2)
    mlp = build_model(config).shapes()["layers"]["mlp"]
    sizes = {name: sum(x.size for x in jax.tree.leaves(mlp[name])) / 2 for name in ("experts", "shared")}
    active = mlp["router"]["kernel"].size / 2 + sizes["experts"] * config.top_k / config.num_experts + sizes["shared"]
    assert config.layer_spec().mlp.flops_per_token(config.d_model, 5) == 2 * active


def test_router_bias_is_float32_among_bfloat16():
    config = DeepseekV3Config(**SIZES, **LATENT, param_dtype="bfloat16", compute_dtype="bfloat16")
    router = build_model(config).shapes()["layers"]["mlp"]["router"]
    assert router["kernel"].dtype == jnp.bfloat16 and router["bias"].dtype == jnp.float32


def stacked(said, layers=2):
    """The same layer ``layers`` times over, each with other numbers."""
    return {name: np.stack([value * (1 + 0.5 * i) for i in range(layers)]) for name, value in said.items()}


def test_losses_of_balance(one_device):
    """By hand from the sums, and the loss within sequences from its definition."""
    spec = SPECS["raw"]
    x, weights = make(spec)
    (_, said), _ = one_device["raw"]
    found = auxiliary(
        BalanceSpec(load_balance=0.5, router_z=0.25, sequence=2.0), {"layers": stacked(said), "dense": None}
    )
    tokens = (SEGMENTS > 0).sum()
    f, p = (1.25 * said[name] / tokens for name in ("counts", "scores"))
    value = E * np.sum(f * p)
    assert found.losses["moe/load_balance"].total == pytest.approx(0.5 * value * tokens, rel=1e-5)
    assert found.metrics["moe/load_balance"].total == pytest.approx(value * tokens, rel=1e-5)
    logits = (x @ weights["router"])[SEGMENTS > 0]
    z = np.mean(np.log(np.exp(logits).sum(-1)) ** 2)
    assert found.losses["moe/router_z"].total == pytest.approx(0.25 * 1.25 * z * tokens, rel=1e-4)
    assert found.metrics["moe/max_load"].total == pytest.approx(
        said["counts"].max() * E / said["counts"].sum() * tokens
    )
    assert found.metrics["moe/dropped"] == (0, 2.5 * said["counts"].sum())
    assert all(value.weight == tokens for value in found.losses.values())

    total = 0.0
    for row, segments in zip(x, SEGMENTS, strict=True):
        for segment in set(segments) - {0}:
            scores = softmax(row[segments == segment] @ weights["router"])
            picked = np.argsort(-scores, axis=1)[:, : spec.top_k]
            parts = np.bincount(picked.ravel(), minlength=E) * E / (spec.top_k * len(scores))
            total += len(scores) * np.sum(parts * scores.mean(0))
    assert said["sequence"] == pytest.approx(total, rel=1e-5)
    assert found.losses["moe/sequence_balance"].total == pytest.approx(2.0 * 1.25 * total, rel=1e-5)
    assert auxiliary(BalanceSpec(), {"layers": None}) is None
    assert auxiliary(BalanceSpec(), {"layers": stacked(said)}).losses == {}


@pytest.mark.parity
def test_load_balance_is_that_of_transformers():
    torch = pytest.importorskip("torch", reason="parity needs torch (the 'parity' extra)")
    pytest.importorskip("transformers", reason="parity needs transformers (the 'parity' extra)")
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    spec, x, layers = SPECS["top2"], make(SPECS["top2"])[0], []
    logits = []
    for seed in (1, 2, 3):
        weights = make(spec, seed)[1]
        layers.append(compute(spec, x, SEGMENTS, weights)[0][0][1])
        logits.append(torch.from_numpy((x @ weights["router"]).reshape(-1, E)))
    mask = torch.from_numpy((SEGMENTS > 0).astype(np.int64))
    wanted = float(load_balancing_loss_func(tuple(logits), E, spec.top_k, mask))
    found = auxiliary(
        BalanceSpec(), {"layers": {name: np.stack([said[name] for said in layers]) for name in layers[0]}}
    )
    total, weight = found.metrics["moe/load_balance"]
    assert float(total / weight) == pytest.approx(wanted, rel=1e-5)


def test_biases_move_towards_balance_from_where_they_were():
    old = {"layers": {"mlp": {"router": {"bias": np.zeros((2, 4), np.float32), "kernel": 1}, "up": 2}}, "embed": 3}
    new = {"layers": {"mlp": {"router": {"bias": np.ones((2, 4), np.float32), "kernel": 5}, "up": 6}}, "embed": 7}
    counts = {"layers": np.array([[4, 0, 2, 2], [1, 1, 1, 5]], np.float32)}
    moved = move_biases(0.25, old, new, counts)
    bias = moved["layers"]["mlp"]["router"].pop("bias")
    np.testing.assert_array_equal(bias, [[-0.25, 0.25, 0, 0], [0.25, 0.25, 0.25, -0.25]])
    assert moved == {"layers": {"mlp": {"router": {"kernel": 5}, "up": 6}}, "embed": 7}
    assert new["layers"]["mlp"]["router"]["bias"].all(), "changed in place"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 9}, "9 of 8 experts"),
        ({"groups": 3}, "8 experts in 3 groups"),
        ({"groups": 8}, "at least 2"),
        ({"groups": 4, "top_groups": 1, "top_k": 3}, "1 of 4 groups hold 2"),
        ({"capacity_factor": -1.0}, "capacity_factor"),
        ({"load_balance_coef": -0.1}, "load_balance_coef"),
        ({"num_dense_layers": 2}, "num_dense_layers=2"),
        ({"rope_dim": 3}, "rope_dim=3"),
        ({"num_kv_heads": 2}, "num_kv_heads=2"),
        ({"mtp_layers": -1}, "mtp_layers"),
    ],
)
def test_refuses_what_makes_no_sense(changes, message):
    with pytest.raises(ValueError, match=message):
        DeepseekV3Config(**SIZES | LATENT | changes)


def test_dense_layers_may_not_be_all_of_them():
    with pytest.raises(ValueError, match="dense_layers"):
        Qwen3MoeConfig(**SIZES, expert_d_ff=8, dense_layers=(0, 1))
    config = Qwen3MoeConfig(**SIZES | {"num_layers": 4}, expert_d_ff=8, dense_layers=(0, 2, 3))
    assert config.runs() == {
        "layers_from_0": (0, 1, True), "layers_from_1": (1, 1, False), "layers_from_2": (2, 2, True)
    }  # fmt: skip
    assert dataclasses.replace(config, dense_layers=()).runs() == {"layers": (0, 4, False)}
