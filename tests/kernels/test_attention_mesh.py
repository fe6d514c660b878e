"""Attention on meshes: every device runs a kernel on its rows and heads, whatever their numbers; and whole models."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxtrain.kernels.attention import api, blocked, on_mesh
from jaxtrain.kernels.attention.masks import Spec, make_marks
from jaxtrain.models import DecoderConfig, build_model
from jaxtrain.objectives import LM
from jaxtrain.sharding import DEFAULT_RULES, MeshConfig, ShardingRules, make_mesh, param_shardings, put_batch
from jaxtrain.train.step import loss_and_grads
from jaxtrain.types import Tokens

FAST = {"xla_backend_optimization_level": 0}
jit = partial(jax.jit, compiler_options=FAST)
WARNING = "Involuntary full rematerialization"


def make(B, T, N, K, H=4):
    """(q, k, v), ids: three documents a row, and padding."""
    rng = np.random.default_rng(0)
    arrays = tuple(jnp.asarray(rng.normal(size=(B, T, heads, H)), jnp.float32) for heads in (N, K, K))
    segments = np.sort(rng.integers(1, 4, (B, T)), axis=1).astype(np.int32)
    segments[0, -2:] = 0
    starts = np.array([[np.argmax(row == s) for s in row] for row in segments])
    return arrays, {"positions": (np.arange(T) - starts).astype(np.int32), "segments": segments}


def differentiated(arrays, ids, sinks=None, **options):
    """out, lse, dq, dk, dv, and the gradient of sinks."""
    marks = {f"{side}_{name}": x for side in "qk" for name, x in ids.items()}

    def loss(arrays, sinks):
        out, lse = api.attention(*arrays, **marks, sinks=sinks, in_order=True, return_lse=True, **options)
        total = jnp.sum(jnp.sin(out)) + jnp.sum(jnp.where(jnp.isneginf(lse), 0.0, jnp.cos(lse)))
        return total, (out, lse)

    grads, found = jax.grad(loss, argnums=(0, 1), has_aux=True)(arrays, sinks)
    return jax.tree.leaves((found, grads))


def check(found, wanted):
    for x, y in zip(found, wanted, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5, rtol=1e-5)


CASES = {
    "rows": (MeshConfig(data=2, fsdp=2, expert=2), (8, 8, 2, 1)),
    "one row on eight": (MeshConfig(data=8), (1, 8, 2, 2)),
    "five rows on four": (MeshConfig(data=4), (5, 8, 2, 2)),
    "key heads divide": (MeshConfig(tensor=2), (2, 8, 8, 4)),
    "fewer key heads": (MeshConfig(tensor=4, data=2), (2, 8, 8, 2)),
    "key heads do not fit": (MeshConfig(tensor=2), (2, 8, 12, 3)),
    "fewer heads": (MeshConfig(tensor=8), (2, 8, 4, 2)),
    "odd heads": (MeshConfig(tensor=2), (2, 8, 3, 3)),
    "odd heads in groups": (MeshConfig(tensor=4), (2, 8, 6, 3)),
    "odd length": (MeshConfig(context=4, data=2), (1, 13, 2, 1)),
    "all at once": (MeshConfig(context=2, tensor=2, data=2), (3, 7, 6, 2)),
}


@pytest.mark.parametrize("name", CASES)
def test_any_sizes_on_any_mesh(name):
    config, sizes = CASES[name]
    arrays, ids = make(*sizes)
    with jax.set_mesh(make_mesh(config)):
        found = jit(partial(differentiated, backend="blocked"))(arrays, ids)
    check(found, jit(partial(differentiated, backend="xla"))(arrays, ids))


def test_options_reach_every_device():
    arrays, ids = make(4, 8, 4, 2)
    sinks = jnp.asarray([0.3, -1.0, 2.0, 0.1])
    options = dict(window=3, softcap=0.8, scale=0.7, q_prefix=jnp.tile(jnp.arange(8), (4, 1)))
    with jax.set_mesh(make_mesh(MeshConfig(context=2, tensor=2, data=2))):
        found = jit(partial(differentiated, backend="blocked", **options))(arrays, ids, sinks)
    check(found, jit(partial(differentiated, backend="xla", **options))(arrays, ids, sinks))


@pytest.mark.parametrize("ways", range(1, 13))
@pytest.mark.parametrize(("N", "K"), [(1, 1), (6, 1), (6, 2), (6, 3), (12, 3), (8, 8), (32, 8)])
def test_every_device_has_the_key_heads_of_its_queries(ways, N, K):
    heads, each = on_mesh._heads(N, K, ways)
    assert heads % ways == 0 and heads - N < ways
    keys = np.repeat(np.arange(K), each)
    keys = np.append(keys, np.full(heads * keys.size // N - keys.size, -1))
    share, key_share = heads // ways, keys.size // ways
    assert key_share * ways == keys.size and share % key_share == 0
    for device in range(ways):
        mine = keys[device * key_share : (device + 1) * key_share]
        for n in range(share):
            head = device * share + n
            if head < N:
                assert mine[n // (share // key_share)] == head // (N // K)


@dataclasses.dataclass(frozen=True)
class Recording:
    """Blocked attention that notes what it is called with: Spec, and the shapes of q and k."""

    calls: list = dataclasses.field(default_factory=list, hash=False, compare=False)

    def forward(self, spec, q, k, *rest):
        self.calls.append((spec, q.shape, k.shape))
        return blocked.forward(spec, q, k, *rest)

    backward = staticmethod(blocked.backward)


def recorded(config, T, S, across="auto", **kinds):
    """The calls for 8 rows of 8 heads over 4 key heads."""
    q, k = jnp.ones((8, 8, T, 4)), jnp.ones((8, 4, S, 4))
    ids = {"q": jnp.ones((8, T), jnp.int32), "k": jnp.ones((8, S), jnp.int32)}
    marks, low, high = make_marks(ids["q"], ids["k"], ids["q"], ids["k"], causal=True)
    backend = Recording()
    with jax.set_mesh(make_mesh(config)):
        spec = Spec(scale=1.0, low=low, high=high, **kinds)
        jax.eval_shape(
            lambda *qkv: on_mesh.attend(backend, spec, *qkv, marks, rules=DEFAULT_RULES, across=across), q, k, k
        )
    return backend.calls


def test_the_work_is_split():
    """Every device's part of rows, heads and the sequence; of the sequence, chunks."""

    def shapes(config, **options):
        return {call[1:] for call in recorded(config, 16, 16, **options)}

    assert shapes(MeshConfig(data=2, fsdp=2, expert=2)) == {((1, 8, 16, 4), (1, 4, 16, 4))}
    assert shapes(MeshConfig(tensor=4)) == {((8, 2, 16, 4), (8, 1, 16, 4))}
    assert shapes(MeshConfig(tensor=8)) == {((8, 1, 16, 4), (8, 1, 16, 4))}
    assert shapes(MeshConfig(context=4)) == {((8, 8, 2, 4), (8, 4, 2, 4))}
    assert shapes(MeshConfig(context=4), across="gather") == {((8, 8, 2, 4), (8, 4, 16, 4))}
    assert shapes(MeshConfig(data=2, tensor=2, context=2)) == {((4, 4, 4, 4), (4, 2, 16, 4))}


def test_order_is_promised_only_where_it_holds():
    """Neither of chunks, nor of a padded sequence that had fewer queries than keys."""
    assert all(call[0].in_order for call in recorded(MeshConfig(data=2), 8, 8, in_order=True))
    assert not any(call[0].in_order for call in recorded(MeshConfig(data=2), 5, 8, in_order=True))
    for across in ("ring", "gather"):
        calls = recorded(MeshConfig(context=4), 16, 16, in_order=True, across=across)
        assert calls and not any(call[0].in_order for call in calls)


def test_rules_say_what_is_split():
    arrays, ids = make(4, 8, 4, 2)
    heads_over_data = ShardingRules(table=(("batch", ()), ("act_heads", ("data",)), ("sequence", ("tensor", "fsdp"))))
    with jax.set_mesh(make_mesh(MeshConfig(tensor=2, data=2, fsdp=2))):
        run = jit(partial(differentiated, backend="blocked", rules=heads_over_data))
        assert "collective_permute" in run.lower(arrays, ids).as_text()
        found = run(arrays, ids)
        both = ShardingRules(table=(("batch", ("data",)), ("act_heads", ("data",)), ("sequence", ())))
        with pytest.raises(ValueError, match="would both be split over 'data'"):
            differentiated(arrays, ids, backend="blocked", rules=both)
    check(found, jit(partial(differentiated, backend="xla"))(arrays, ids))


@pytest.mark.parametrize("axes", [("data",), ("data", "tensor")], ids=["some axes", "all axes"])
@pytest.mark.parametrize("varying", [True, False], ids=["checked", "unchecked"])
def test_under_a_shard_map_of_the_callers(axes, varying):
    """Its axes are taken; what is left of the mesh is still split over."""
    arrays, ids = make(4, 8, 4, 2)
    mesh = make_mesh(MeshConfig(data=2, tensor=2))
    names = set(mesh.axis_names) if "tensor" in axes else {"data"}

    def whole(arrays, ids):
        marks = {f"{side}_{name}": x for side in "qk" for name, x in ids.items()}
        out = jax.shard_map(
            lambda arrays, marks: api.attention(*arrays, **marks, backend="blocked"),
            in_specs=P("data"),
            out_specs=P("data"),
            axis_names=names,
            check_vma=varying,
        )(arrays, marks)
        return jnp.sum(jnp.sin(out))

    with jax.set_mesh(mesh):
        found = jit(jax.grad(whole))(arrays, ids)
    marks = {f"{side}_{name}": x for side in "qk" for name, x in ids.items()}
    wanted = jax.grad(lambda arrays: jnp.sum(jnp.sin(api.attention(*arrays, **marks, backend="xla"))))(arrays)
    check(found, wanted)


def test_gradients_of_keys_that_the_caller_does_not_split():
    """One key head for queries that a shard_map of the caller's splits: its gradient is the sum over them."""
    arrays, ids = make(2, 8, 4, 1)
    mesh = make_mesh(MeshConfig(tensor=2, data=2))
    marks = {f"{side}_{name}": x for side in "qk" for name, x in ids.items()}

    def whole(arrays, marks):
        out = jax.shard_map(
            lambda arrays, marks: api.attention(*arrays, **marks, backend="blocked"),
            in_specs=((P(None, None, "tensor"), P(), P()), P()),
            out_specs=P(None, None, "tensor"),
            axis_names={"tensor"},
        )(arrays, marks)
        return jnp.sum(jnp.sin(out))

    with jax.set_mesh(mesh):
        found = jit(jax.grad(whole))(arrays, marks)
    wanted = jax.grad(lambda arrays: jnp.sum(jnp.sin(api.attention(*arrays, **marks, backend="xla"))))(arrays)
    check(found, wanted)


def test_a_mesh_of_one_needs_no_shard_map():
    arrays, ids = make(2, 8, 2, 2)
    with jax.set_mesh(make_mesh(MeshConfig())):
        assert on_mesh.Layout.of(DEFAULT_RULES) is None
        found = jit(partial(differentiated, backend="blocked"))(arrays, ids)
    assert on_mesh.Layout.of(DEFAULT_RULES) is None
    check(found, jit(partial(differentiated, backend="xla"))(arrays, ids))


MODEL_MESHES = {
    "context4-fsdp2": MeshConfig(context=4, fsdp=2),
    "context2-tensor2-data2": MeshConfig(context=2, tensor=2, data=2),
    "context8": MeshConfig(context=8),
}


@pytest.fixture(scope="module")
def model():
    """(model, parameters, batch)."""
    sizes = dict(vocab_size=24, num_layers=2, d_model=16, num_heads=4, num_kv_heads=2, d_ff=32, max_positions=32)
    built = build_model(DecoderConfig(**sizes, remat="full"))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: (0.3 * rng.normal(size=x.shape)).astype(np.float32), built.shapes())
    B, T = 4, 32
    segments = np.sort(rng.integers(1, 4, (B, T)), axis=1).astype(np.int32)
    segments[1, -9:] = 0
    starts = np.array([[np.argmax(row == s) for s in row] for row in segments])
    positions = np.where(segments > 0, np.arange(T) - starts, 0).astype(np.int32)
    ids, targets = (np.where(segments > 0, rng.integers(1, 24, (B, T)), 0).astype(np.int32) for _ in range(2))
    weights = (segments > 0).astype(np.float32)
    return built, params, Tokens(ids=ids, targets=targets, weights=weights, positions=positions, segments=segments)


def gradients(model, config):
    built, params, batch = model
    mesh = make_mesh(config)
    shardings = param_shardings(built.axes, params, mesh, built.rules)
    step = jit(partial(loss_and_grads, built.apply, LM()), out_shardings=(None, shardings))
    with jax.set_mesh(mesh):
        args = jax.device_put(params, shardings), put_batch(batch, mesh), jax.random.key(0)
        program = step.lower(*args).compile()
        return jax.device_get(program(*args)), program.as_text()


@pytest.mark.parametrize("mesh", MODEL_MESHES.values(), ids=MODEL_MESHES)
def test_a_models_gradients_are_those_of_one_device(mesh, model, capfd):
    (loss, grads), text = gradients(model, mesh)
    assert WARNING not in capfd.readouterr().err
    assert "collective-permute" in text
    (one_loss, one_grads), _ = gradients(model, MeshConfig())
    np.testing.assert_allclose(loss.total, one_loss.total, rtol=1e-5)
    for x, y in zip(jax.tree.leaves(grads), jax.tree.leaves(one_grads), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5 * max(1.0, np.abs(y).max()))
