"""Optimizers against their formulas in NumPy, and what they do to stacked layers, masks and state."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtrain.optim import OPTIMIZERS, Adafactor, AdamW, Constant, Linear, Lion, Muon, state_axes

L, D, H, K, F, V = 2, 6, 2, 4, 10, 12
SHAPES = {
    "embed": {"embedding": (V, D)},
    "layers": {
        "attention": {"query": {"kernel": (L, D, H, K)}, "out": {"kernel": (L, H, K, D)}},
        "mlp": {"up": {"kernel": (L, D, F)}},
        "norm": {"scale": (L, D)},
    },
    "reward_head": {"kernel": (D, 1)},
}
AXES = {
    "embed": {"embedding": ("vocab", "embed")},
    "layers": {
        "attention": {
            "query": {"kernel": ("layers", "embed", "q_heads", "head_dim")},
            "out": {"kernel": ("layers", "q_heads", "head_dim", "embed")},
        },
        "mlp": {"up": {"kernel": ("layers", "embed", "mlp")}},
        "norm": {"scale": ("layers", "norm")},
    },
    "reward_head": {"kernel": ("embed", None)},
}
IS_SHAPE = {"is_leaf": lambda x: isinstance(x, tuple)}
STRUCTS = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, jnp.float32), SHAPES, **IS_SHAPE)
RATE = Linear(peak=0.1, warmup_steps=2)
TOTAL = 5
RATES = [0.05, 0.1, 0.1]  # of the first three updates, by hand


def random(seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: rng.normal(size=s).astype(np.float32), SHAPES, **IS_SHAPE)


def run(tx, params, gradients):
    """Parameters after one update a gradient."""
    state = tx.init(params)
    update = jax.jit(tx.update)
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def leaf(tree, path):
    for key in path.split("/"):
        tree = tree[key]
    return np.asarray(tree)


GRADIENTS = [random(seed) for seed in (1, 2, 3)]
QUERY, OUT, UP = "layers/attention/query/kernel", "layers/attention/out/kernel", "layers/mlp/up/kernel"
DECAYED = [(QUERY, 0.1), ("embed/embedding", 0.1), ("layers/norm/scale", 0.0)]


def adamw_reference(w, gradients, decay, b1=0.9, b2=0.95, eps=1e-8):
    m = v = np.zeros_like(w)
    for t, (g, rate) in enumerate(zip(gradients, RATES, strict=True), start=1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        w = w - rate * (m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps) + decay * w)
    return w


@pytest.mark.parametrize(("path", "decay"), DECAYED)
def test_adamw_follows_its_formula(path, decay):
    start = random(0)
    got, _ = run(AdamW(schedule=RATE, weight_decay=0.1).build(TOTAL, STRUCTS, AXES), start, GRADIENTS)
    expected = adamw_reference(leaf(start, path), [leaf(g, path) for g in GRADIENTS], decay)
    np.testing.assert_allclose(leaf(got, path), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("path", "decay"), DECAYED)
def test_lion_follows_its_formula(path, decay):
    start = random(0)
    got, _ = run(Lion(schedule=RATE, weight_decay=0.1).build(TOTAL, STRUCTS, AXES), start, GRADIENTS)
    w, m = leaf(start, path), 0.0
    for gradient, rate in zip(GRADIENTS, RATES, strict=True):
        g = leaf(gradient, path)
        w = w - rate * (np.sign(0.9 * m + 0.1 * g) + decay * w)
        m = 0.99 * m + 0.01 * g
    np.testing.assert_allclose(leaf(got, path), w, rtol=1e-5, atol=1e-6)


def newton_schulz(x):
    """Keller Jordan's iteration for one matrix, in float64."""
    x = np.asarray(x, np.float64) / np.linalg.norm(x)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


@pytest.mark.parametrize(("path", "rows", "columns"), [(QUERY, D, H * K), (OUT, H * K, D), (UP, D, F)])
def test_muon_orthogonalises_the_matrix_of_each_layer(path, rows, columns):
    start = random(0)
    got, _ = run(Muon(schedule=RATE, weight_decay=0.1).build(TOTAL, STRUCTS, AXES), start, GRADIENTS)
    for layer in range(L):
        w, m = leaf(start, path)[layer].reshape(rows, columns), 0.0
        for gradient, rate in zip(GRADIENTS, RATES, strict=True):
            g = leaf(gradient, path)[layer].reshape(rows, columns)
            m = 0.95 * m + g
            direction = newton_schulz(0.95 * m + g)
            # Close to orthogonal: the iteration leaves singular values around 1, not at it.
            assert np.all(np.abs(np.linalg.svd(direction, compute_uv=False) - 1) < 0.4)
            w = w - rate * (0.2 * np.sqrt(max(rows, columns)) * direction + 0.1 * w)
        np.testing.assert_allclose(leaf(got, path)[layer].reshape(rows, columns), w, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("path", "decay"), [*DECAYED[1:], ("reward_head/kernel", 0.1)])
def test_muon_leaves_embeddings_norms_and_heads_to_adamw(path, decay):
    start = random(0)
    got, _ = run(Muon(schedule=RATE, weight_decay=0.1).build(TOTAL, STRUCTS, AXES), start, GRADIENTS)
    expected = adamw_reference(leaf(start, path), [leaf(g, path) for g in GRADIENTS], decay)
    np.testing.assert_allclose(leaf(got, path), expected, rtol=1e-5, atol=1e-6)


def factored_reference(w, gradients, clip=1.0, eps=1e-30):
    """Adafactor (algorithms 4 and 5 of the paper, no momentum, absolute rate) for one matrix."""
    for t, (g, rate) in enumerate(zip(gradients, RATES, strict=True), start=1):
        decay = 1 - t**-0.8
        squares = g.astype(np.float64) ** 2 + eps
        if t == 1:
            row, column = squares.mean(1), squares.mean(0)
        else:
            row = decay * row + (1 - decay) * squares.mean(1)
            column = decay * column + (1 - decay) * squares.mean(0)
        u = g / np.sqrt(np.outer(row, column) / row.mean())
        w = w - rate * u / max(1.0, np.sqrt((u**2).mean()) / clip)
    return w


@pytest.mark.parametrize(("path", "rows", "columns"), [(QUERY, D, H * K), (OUT, H * K, D), (UP, D, F)])
def test_adafactor_factors_the_matrix_of_each_layer(path, rows, columns):
    start = random(0)
    # A spike in one layer must not touch another's statistics or clipping.
    gradients = [jax.tree.map(np.copy, g) for g in GRADIENTS]
    leaf(gradients[1], path)[0] *= 1000.0
    tx = Adafactor(schedule=RATE, min_size_to_factor=2).build(TOTAL, STRUCTS, AXES)
    got, _ = run(tx, start, gradients)
    for layer in range(L):
        per_layer = [leaf(g, path)[layer].reshape(rows, columns) for g in gradients]
        expected = factored_reference(leaf(start, path)[layer].reshape(rows, columns), per_layer)
        got_layer = leaf(got, path)[layer].reshape(rows, columns)
        np.testing.assert_allclose(got_layer, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("parameter_scale", [False, True])
@pytest.mark.parametrize("least", [2, 128])
def test_adafactor_equals_optax_on_a_plain_matrix(parameter_scale, least):
    config = Adafactor(schedule=RATE, parameter_scale=parameter_scale, min_size_to_factor=least)
    shapes = {"kernel": jax.ShapeDtypeStruct((D, F), jnp.float32)}
    ours = config.build(TOTAL, shapes, {"kernel": ("embed", "mlp")})
    theirs = optax.adafactor(
        RATE.build(TOTAL),
        min_dim_size_to_factor=least,
        multiply_by_parameter_scale=parameter_scale,
        decay_rate=0.8,
    )
    start = {"kernel": leaf(random(0), UP)[0]}
    gradients = [{"kernel": leaf(g, UP)[0]} for g in GRADIENTS]
    got, expected = run(ours, start, gradients)[0], run(theirs, start, gradients)[0]
    np.testing.assert_allclose(got["kernel"], expected["kernel"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("frozen", [(), ("^embed/", "/out/")])
def test_every_optimizer_lowers_a_quadratic_and_keeps_frozen_parameters(name, frozen):
    target = random(4)
    params = start = random(5)
    config = OPTIMIZERS[name](schedule=Constant(peak=0.05), frozen=frozen)
    tx = config.build(40, STRUCTS, AXES)

    def loss(p):
        return sum(jnp.sum(jnp.square(a - b)) for a, b in zip(*map(jax.tree.leaves, (p, target)), strict=True))

    @jax.jit
    def step(p, state):
        updates, state = tx.update(jax.grad(loss)(p), state, p)
        return optax.apply_updates(p, updates), state

    state = tx.init(params)
    for _ in range(40):
        params, state = step(params, state)
    moving = [path for path in (QUERY, OUT, UP, "embed/embedding") if not frozen or path in (QUERY, UP)]
    for path in moving:
        before = np.square(leaf(start, path) - leaf(target, path)).sum()
        assert np.square(leaf(params, path) - leaf(target, path)).sum() < 0.6 * before, path
    for path in {QUERY, OUT, UP, "embed/embedding"} - set(moving):
        np.testing.assert_array_equal(leaf(params, path), leaf(start, path))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_zero_gradients_stay_finite_and_only_decay(name):
    start = random(0)
    config = OPTIMIZERS[name](schedule=Constant(peak=0.1), weight_decay=0.5)
    got, _ = run(config.build(TOTAL, STRUCTS, AXES), start, [jax.tree.map(np.zeros_like, start)])
    np.testing.assert_allclose(leaf(got, QUERY), 0.95 * leaf(start, QUERY), rtol=1e-6)
    np.testing.assert_array_equal(leaf(got, "layers/norm/scale"), leaf(start, "layers/norm/scale"))


def test_decay_rules_and_their_mistakes():
    start, zero = random(0), jax.tree.map(np.zeros_like, random(0))
    rules = (("^embed/", False), ("kernel", True), ("scale", True))
    config = AdamW(schedule=Constant(peak=0.1), weight_decay=1.0, decay_rules=rules)
    got, _ = run(config.build(TOTAL, STRUCTS, AXES), start, [zero])
    np.testing.assert_array_equal(leaf(got, "embed/embedding"), leaf(start, "embed/embedding"))
    np.testing.assert_allclose(leaf(got, "layers/norm/scale"), 0.9 * leaf(start, "layers/norm/scale"), rtol=1e-6)
    bad = AdamW(schedule=Constant(peak=0.1), decay_rules=(("kernel", True),))
    with pytest.raises(ValueError, match=r"AdamW\.decay_rules: no rule covers the parameter 'embed/embedding'"):
        bad.build(TOTAL, STRUCTS, AXES)


def test_the_rate_follows_the_updates_that_were_made():
    """A step that keeps the old state, as a skipped one does, leaves the schedule where it was."""
    config = Lion(schedule=RATE)
    tx = config.build(TOTAL, STRUCTS, AXES)
    params = random(0)
    state = tx.init(params)
    tx.update(GRADIENTS[0], state, params)  # refused: its state is dropped
    for rate in RATES:
        updates, state = tx.update(GRADIENTS[0], state, params)
        assert np.abs(leaf(updates, QUERY)).max() == pytest.approx(rate)
    assert [float(config.learning_rate(step, TOTAL)) for step in range(3)] == pytest.approx(RATES)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_has_the_axes_of_its_parameters(name):
    options = {"min_size_to_factor": 2} if name == "Adafactor" else {}
    tx = OPTIMIZERS[name](schedule=RATE, frozen=("^embed/",), **options).build(TOTAL, STRUCTS, AXES)
    state = jax.eval_shape(tx.init, STRUCTS)
    names = state_axes(state, STRUCTS, AXES)
    found = []
    jax.tree.map(lambda array, name: found.append((array.shape, name)), state, names)
    assert all(len(shape) == len(name) for shape, name in found)
    assert not any("vocab" in name for _, name in found), "frozen parameters have no state"
    query = ("layers", "embed", "q_heads", "head_dim")
    if name == "Adafactor":
        assert ((L, D, 1, 1), ("layers", "embed", None, None)) in found
        assert ((L, 1, H, K), ("layers", None, "q_heads", "head_dim")) in found
    else:
        count = {"AdamW": 2, "Lion": 1, "Muon": 1}[name]
        assert found.count(((L, D, H, K), query)) == count


def test_bfloat16_moments():
    for cls in (AdamW, Lion, Muon):
        tx = cls(schedule=RATE, mu_dtype="bfloat16").build(TOTAL, STRUCTS, AXES)
        params, state = run(tx, random(0), GRADIENTS)
        assert jnp.dtype("bfloat16") in {x.dtype for x in jax.tree.leaves(state)}
        assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AdamW(schedule=RATE, b2=1.0), r"AdamW.b2 is 1.0; it must be in \[0, 1\)"),
        (lambda: Lion(schedule=RATE, weight_decay=-1.0), "Lion.weight_decay is -1.0"),
        (lambda: Muon(schedule=RATE, mu_dtype="float16"), "Muon.mu_dtype is 'float16'"),
        (lambda: Adafactor(schedule=RATE, clip_rms=0.0), "Adafactor.clip_rms is 0.0"),
        (
            lambda: AdamW(schedule=RATE).build(
                TOTAL, {"kernel": jax.ShapeDtypeStruct((2, 3), jnp.float32)}, {"kernel": ("embed",)}
            ),
            "'kernel' has shape .2, 3. and logical axes",
        ),
        (
            lambda: Muon(schedule=RATE).build(
                TOTAL,
                {"kernel": jax.ShapeDtypeStruct((2, 3, 4), jnp.float32)},
                {"kernel": ("embed", "mlp", "other")},
            ),
            "'kernel' has axes .* which make 3 sides",
        ),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
