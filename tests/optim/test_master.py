"""Float32 masters of bfloat16 parameters, and moments kept in bfloat16."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtrain.optim import OPTIMIZERS, AdamW, Constant, Lion, MasterState, Muon, apply_updates, state_axes

SHAPES = {"layers": {"up": {"kernel": (2, 8, 6)}, "norm": {"scale": (2, 8)}}, "embed": {"embedding": (12, 8)}}
AXES = {
    "layers": {"up": {"kernel": ("layers", "embed", "mlp")}, "norm": {"scale": ("layers", "norm")}},
    "embed": {"embedding": ("vocab", "embed")},
}
IS_SHAPE = {"is_leaf": lambda x: isinstance(x, tuple)}
RATE = Constant(peak=0.01)


def structs(dtype):
    return jax.tree.map(lambda shape: jax.ShapeDtypeStruct(shape, dtype), SHAPES, **IS_SHAPE)


def random(seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda shape: rng.normal(size=shape).astype(np.float32), SHAPES, **IS_SHAPE)


def run(tx, params, gradients):
    """Parameters and state after an update a gradient."""

    @jax.jit
    def step(params, state, gradient):
        updates, state = tx.update(gradient, state, params)
        return apply_updates(params, updates, state), state

    state = tx.init(params)
    for gradient in gradients:
        params, state = step(params, state, gradient)
    return params, state


START = jax.tree.map(jnp.bfloat16, random(0))
GRADIENTS = [random(seed) for seed in (1, 2, 3)]


def assert_close(found, expected, tolerance=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), found, expected)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_masters_are_what_float32_parameters_would_be(name):
    config = OPTIMIZERS[name](schedule=RATE, weight_decay=0.1)
    params, state = run(config.build(3, structs(jnp.bfloat16), AXES), START, GRADIENTS)
    whole = jax.tree.map(np.float32, START)
    expected, inner = run(config.build(3, structs(jnp.float32), AXES), whole, GRADIENTS)
    assert_close(state.master, expected)
    assert_close(state.inner, inner)
    jax.tree.map(lambda p, m: np.testing.assert_array_equal(p, m.astype(jnp.bfloat16)), params, state.master)


def test_the_same_as_optax():
    config = AdamW(schedule=RATE, weight_decay=0.1, decay_rules=(("", True),))
    _, state = run(config.build(3, structs(jnp.bfloat16), AXES), START, GRADIENTS)
    theirs = optax.adamw(0.01, b1=0.9, b2=0.95, weight_decay=0.1)
    assert_close(state.master, run(theirs, jax.tree.map(np.float32, START), GRADIENTS)[0])


@pytest.mark.parametrize("decaying", [False, True])
def test_small_updates_add_up_with_a_master_alone(decaying):
    """Steps of a thousandth of a parameter, which bfloat16 cannot take."""
    rate = Constant(peak=0.001)
    config = dict(schedule=rate, weight_decay=1.0 if decaying else 0.0, decay_rules=(("", True),))
    ones = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), structs(jnp.bfloat16))
    gradient = jax.tree.map(lambda x: np.full(x.shape, 0.0 if decaying else -1.0, np.float32), ones)
    expected = 0.999**30 if decaying else 1.03
    for master in (True, False):
        tx = Lion(master=master, **config).build(30, structs(jnp.bfloat16), AXES)
        found = jax.tree.leaves(run(tx, ones, [gradient] * 30)[0])
        assert all(x.dtype == jnp.bfloat16 for x in found)
        for x in found:
            np.testing.assert_allclose(np.float32(x), expected if master else 1.0, rtol=2**-8 if master else 0)


def test_who_has_a_master():
    shapes = structs(jnp.bfloat16)
    shapes["layers"]["norm"]["scale"] = jax.ShapeDtypeStruct((2, 8), jnp.float32)
    tx = AdamW(schedule=RATE, frozen=("^embed/",)).build(3, shapes, AXES)
    state = jax.eval_shape(tx.init, shapes)
    assert isinstance(state, MasterState)
    assert state.master["embed"]["embedding"] == state.master["layers"]["norm"]["scale"] == optax.MaskedNode()
    assert state.master["layers"]["up"]["kernel"].dtype == jnp.float32
    names = state_axes(state, shapes, AXES)
    assert names.master["layers"]["up"]["kernel"] == ("layers", "embed", "mlp")
    # What is frozen stays, what has no master is updated as ever.
    params = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), shapes)
    new, _ = run(tx, params, GRADIENTS)
    np.testing.assert_array_equal(new["embed"]["embedding"], params["embed"]["embedding"])
    assert new["layers"]["norm"]["scale"].dtype == jnp.float32
    assert np.all(new["layers"]["norm"]["scale"] != 1)
    for config, dtype in ((AdamW(schedule=RATE), jnp.float32), (AdamW(schedule=RATE, master=False), jnp.bfloat16)):
        state = jax.eval_shape(config.build(3, structs(dtype), AXES).init, structs(dtype))
        assert not isinstance(state, MasterState)
        # Moments are float32 all the same.
        assert {x.dtype for x in jax.tree.leaves(state)} == {jnp.dtype("float32"), jnp.dtype("int32")}


@pytest.mark.parametrize("cls", [AdamW, Muon])
def test_a_second_moment_in_bfloat16(cls):
    """It follows the float32 one to the part that its docstring states."""
    gradients = [random(seed) for seed in range(60)]
    states = {}
    for dtype in ("float32", "bfloat16"):
        tx = cls(schedule=RATE, nu_dtype=dtype).build(60, structs(jnp.float32), AXES)
        states[dtype] = run(tx, random(0), gradients)[1]
    second = {
        dtype: {"/".join(map(str, path)): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}
        for dtype, state in states.items()
    }
    names = [name for name in second["float32"] if "nu" in name]
    assert names
    for name in names:
        low, exact = second["bfloat16"][name], second["float32"][name]
        assert low.dtype == jnp.bfloat16 and exact.dtype == jnp.float32
        np.testing.assert_allclose(np.float32(low), exact, rtol=2**-8 / 0.05)


def test_a_moment_that_would_stand_still_is_refused():
    for cls, fields in (
        (AdamW, {"nu_dtype": "bfloat16", "b2": 0.999}),
        (Muon, {"nu_dtype": "bfloat16", "b2": 0.999}),
        (Lion, {"mu_dtype": "bfloat16", "b2": 0.999}),
    ):
        with pytest.raises(ValueError, match="shrink by less than a 256th"):
            cls(schedule=RATE, **fields)
        cls(schedule=RATE, **fields | {"b2": 0.996})
    # Why: of a moment with no gradient left.
    still, falls = (jnp.bfloat16(jnp.float32(jnp.bfloat16(1.2)) * b2) for b2 in (0.999, 0.996))
    assert still == jnp.bfloat16(1.2) > falls
    with pytest.raises(ValueError, match=r"AdamW\.nu_dtype is 'float16'"):
        AdamW(schedule=RATE, nu_dtype="float16")
