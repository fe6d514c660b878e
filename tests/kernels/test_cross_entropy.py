"""Cross-entropy from a part of the vocabulary at a time against whole logits, in value and gradient."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtrain.kernels.cross_entropy import api, chunked, reference
from jaxtrain.sharding import MeshConfig, make_mesh

# The tests compile many small programs and run each once.
COMPILE_FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
# Softcap, temperature, what is asked for, bias; each with a table or a kernel in turn.
GRID = list(
    itertools.product((0.0, 3.0), (1.0, 0.7), ((), ("entropy",), ("mean",), ("entropy", "mean")), (False, True))
)
GRID = [(*case, (number + number // 2) % 2 == 0) for number, case in enumerate(GRID)]
NAMES = [f"cap{c:g}-t{t:g}-{'+'.join(w) or 'plain'}{'-bias' * b}-{'VD' if e else 'DV'}" for c, t, w, b, e in GRID]


def make(shape, V, D, *, table, bias, seed=0, dtype=np.float32, spread=2.0):
    rng = np.random.default_rng(seed)
    arrays = {
        "hidden": rng.normal(size=(*shape, D)),
        "matrix": spread / np.sqrt(D) * rng.normal(size=(V, D) if table else (D, V)),
    }
    if bias:
        arrays["bias"] = rng.normal(size=V)
    return {name: jnp.asarray(x, dtype) for name, x in arrays.items()}, rng.integers(0, V, shape)


def total(arrays, targets, run, **options):
    """A number that every result takes part in, each token in its own way; and the results."""
    found = run(**arrays, targets=targets, **options)
    sums = []
    for i, name in enumerate(("logps", "log_z", "entropy", "mean_logps")):
        x = getattr(found, name)
        if x is not None:
            weights = jnp.asarray(np.random.default_rng(i).normal(size=x.shape), x.dtype)
            sums.append(jnp.sum(weights * x * x))
    return sum(sums), found


def compute(arrays, targets, **options):
    """The results, and the gradients by every array."""

    def run(hidden, matrix, targets, bias=None, **options):
        return api.cross_entropy(hidden, matrix, targets, bias=bias, **options)

    function = jax.value_and_grad(lambda x: total(x, targets, run, **options), has_aux=True)
    function = jax.jit(function, compiler_options=COMPILE_FAST)
    (_, found), grads = function(arrays)
    return jax.device_get((found, grads))


def assert_close(found, expected, tolerance=1e-5):
    """Each leaf to within ``tolerance`` of its largest entry."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * max(1.0, np.abs(b).max()))


@pytest.fixture
def parts(monkeypatch):
    """``parts(columns)``: how many columns of the vocabulary to take at a time."""

    def set_columns(columns):
        monkeypatch.setattr(api, "part_columns", lambda tokens, all_columns, size=4: min(columns, all_columns))

    return set_columns


@pytest.mark.parametrize(("softcap", "temperature", "wanted", "bias", "table"), GRID, ids=NAMES)
def test_equals_whole_logits(softcap, temperature, wanted, bias, table, parts):
    arrays, targets = make((3, 5), 37, 8, table=table, bias=bias)
    options = dict(softcap=softcap, temperature=temperature, table=table, **dict.fromkeys(wanted, True))
    expected = compute(arrays, targets, **options, backend="dense")
    for columns in (37, 8):  # one part; four and a rest of five
        parts(columns)
        assert_close(compute(arrays, targets, **options, backend="chunked"), expected)


@pytest.mark.smoke
@pytest.mark.parametrize("backend", ["dense", "chunked"])
def test_what_numpy_says(backend, parts):
    parts(8)
    arrays, targets = make((2, 7), 19, 4, table=True, bias=True)
    found, _ = compute(
        arrays, targets, table=True, softcap=5.0, temperature=0.8, entropy=True, mean=True, backend=backend
    )
    h, w, b = (np.asarray(arrays[name], np.float64) for name in ("hidden", "matrix", "bias"))
    z = 5 * np.tanh((h @ w.T + b) / 5) / 0.8
    log_z = np.log(np.exp(z).sum(-1))
    logp = z - log_z[..., None]
    np.testing.assert_allclose(found.log_z, log_z, rtol=1e-5)
    np.testing.assert_allclose(found.logps, np.take_along_axis(logp, targets[..., None], -1)[..., 0], rtol=1e-5)
    np.testing.assert_allclose(found.entropy, -(np.exp(logp) * logp).sum(-1), rtol=1e-5)
    np.testing.assert_allclose(found.mean_logps, logp.mean(-1), rtol=1e-5)
    np.testing.assert_array_equal(found.correct, logp.argmax(-1) == targets)
    likeliest = compute(arrays, logp.argmax(-1), table=True, softcap=5.0, backend=backend)[0]
    assert likeliest.correct.all() and not found.correct.all()


@pytest.mark.smoke
def test_bfloat16_is_no_worse_than_whole_logits(parts):
    """Over several draws: the error of each gradient against float64, relative to that of whole logits in bfloat16."""
    parts(128)
    options = dict(table=True, entropy=True, mean=True)
    errors = {"dense": [], "chunked": []}
    for seed in range(2):
        arrays, targets = make((4, 32), 500, 64, table=True, bias=False, seed=seed, dtype=jnp.bfloat16)
        with jax.enable_x64(True):
            exact = compute({k: jnp.asarray(x, jnp.float64) for k, x in arrays.items()}, targets, **options)
        for backend, found in errors.items():
            values = compute(arrays, targets, **options, backend=backend)
            assert values[0].logps.dtype == np.float32 and values[1]["matrix"].dtype == jnp.bfloat16
            leaves = zip(jax.tree.leaves(values), jax.tree.leaves(exact), strict=True)
            found.append([np.linalg.norm(np.asarray(a, np.float64) - b) for a, b in leaves])
    dense, ours = (np.mean(errors[backend], axis=0) for backend in ("dense", "chunked"))
    assert np.all(ours <= 1.01 * dense + 1e-6)


def test_gradients_of_float32_parameters_in_bfloat16_are_summed_in_float32(parts):
    """No worse than casting the parameters first, whose gradient is rounded to bfloat16."""
    parts(128)
    arrays, targets = make((4, 32), 500, 64, table=True, bias=False)
    arrays["hidden"] = arrays["hidden"].astype(jnp.bfloat16)
    found = compute(arrays, targets, table=True, backend="chunked")[1]["matrix"]
    assert found.dtype == np.float32 and np.any(found != found.astype(jnp.bfloat16).astype(np.float32))
    rounded = arrays | {"matrix": arrays["matrix"].astype(jnp.bfloat16)}
    values, _ = compute(rounded, targets, table=True, backend="chunked")
    np.testing.assert_array_equal(values.logps, compute(arrays, targets, table=True, backend="chunked")[0].logps)


@settings(max_examples=15, deadline=None)
@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    V=st.integers(1, 70),
    D=st.integers(1, 9),
    columns=st.integers(1, 40),
    table=st.booleans(),
)
def test_any_shape(shape, V, D, columns, table):
    arrays, targets = make(tuple(shape), V, D, table=table, bias=True, seed=V)
    options = dict(table=table, entropy=True, mean=True, softcap=4.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api, "part_columns", lambda tokens, all_columns, size=4: min(columns, all_columns))
        found = compute(arrays, targets, **options, backend="chunked")
    assert_close(found, compute(arrays, targets, **options, backend="dense"), 3e-5)


def test_an_impossible_token(parts):
    """A logit of -inf: 0 · -inf counts as 0 in the entropy, and in no gradient is it NaN."""
    parts(4)
    arrays, targets = make((1, 6), 11, 4, table=False, bias=True)
    arrays["bias"] = arrays["bias"].at[jnp.array([0, 1, 2, 3, 9])].set(-jnp.inf)  # a whole part, and one more
    targets = np.where(np.isin(targets, (0, 1, 2, 3, 9)), 5, targets)
    found, expected = (compute(arrays, targets, entropy=True, backend=b) for b in ("chunked", "dense"))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(found))
    assert_close(found, expected)


def test_large_logits_are_finite(parts):
    parts(2)
    arrays = {"hidden": jnp.ones((1, 1)), "matrix": jnp.array([[1e4, -1e4, 0.0]])}
    found, grads = compute(arrays, np.array([1]), entropy=True, backend="chunked")
    np.testing.assert_allclose(found.logps, [-2e4])
    np.testing.assert_allclose(found.entropy, [0.0], atol=1e-6)
    assert all(np.isfinite(x).all() for x in grads.values())


def test_float64_stays(parts):
    parts(8)
    with jax.enable_x64(True):
        arrays, targets = make((3, 5), 37, 8, table=True, bias=True, dtype=np.float64)
        options = dict(table=True, entropy=True, mean=True, softcap=3.0, temperature=0.7)
        found, expected = (compute(arrays, targets, **options, backend=b) for b in ("chunked", "dense"))
        assert found[0].logps.dtype == np.float64
        assert_close(found, expected, 1e-12)


MESHES = {
    "tensor": dict(tensor=8),
    "fsdp-tensor": dict(fsdp=2, tensor=4),
    "context-data": dict(context=2, data=4),
    "data": dict(data=8),
    "all": dict(fsdp=2, tensor=2, context=2),
}


@pytest.mark.parametrize("table", [True, False])
@pytest.mark.parametrize("axes", MESHES.values(), ids=MESHES)
def test_equals_one_device(axes, table, parts):
    """Rows and positions that do not divide among the devices, too."""
    parts(5)
    options = dict(table=table, softcap=3.0, temperature=0.7, entropy=True, mean=True)
    arrays, targets = make((3, 5), 64, 8, table=table, bias=True)
    expected = compute(arrays, targets, **options, backend="dense")
    with jax.set_mesh(make_mesh(MeshConfig(**axes))):
        assert_close(compute(arrays, targets, **options, backend="chunked"), expected)


def test_parts():
    """Even, of whole lanes, not above the size asked for unless that is too narrow to be fast."""
    assert api.part_columns(1000, 5000) == 5000
    # By what is enough, a sixteenth of the vocabulary, the size of a part, and what is too narrow to be fast.
    least = {(8192, 128_256): 4096, (8192, 50_257): 3141, (2048, 32_000): 8192, (100_000, 12_000): 1024}
    least[100_000, 151_936] = 4096
    for (tokens, columns), most in least.items():
        part = api.part_columns(tokens, columns)
        assert part % 128 == 0 and part < columns and part <= -(-most // 128) * 128
        assert part * tokens * 4 <= api.PART_BYTES or part <= api.LEAST_COLUMNS
        assert -(-columns // part) == -(-columns // most)


def test_small_logits_are_kept_and_large_ones_are_not(monkeypatch):
    calls = []
    monkeypatch.setattr(chunked, "forward", lambda *args, run=chunked.forward: calls.append(1) or run(*args))
    monkeypatch.setattr(api, "KEPT_BYTES", 4 * 10 * 30)
    for V, expected in ((30, 0), (31, 1)):
        arrays, targets = make((2, 5), V, 4, table=True, bias=False)
        jax.eval_shape(lambda x, t: api.cross_entropy(x["hidden"], x["matrix"], t, table=True), arrays, targets)
        assert len(calls) == expected


def test_bad_arguments():
    arrays, targets = make((2, 5), 12, 4, table=True, bias=True)
    hidden, matrix, bias = arrays["hidden"], arrays["matrix"], arrays["bias"]
    with pytest.raises(ValueError, match="backend 'fused' is unknown; one of"):
        api.cross_entropy(hidden, matrix, targets, table=True, backend="fused")
    with pytest.raises(ValueError, match=r"hidden \(2, 5, 4\), matrix \(12, 4\) , targets \(2, 5\).* do not fit"):
        api.cross_entropy(hidden, matrix, targets)
    with pytest.raises(ValueError, match=r"bias \(12,\) do not fit"):
        api.cross_entropy(hidden, matrix[:11], targets, bias=bias, table=True)
    with pytest.raises(ValueError, match="temperature must be above 0, found 0"):
        api.cross_entropy(hidden, matrix, targets, table=True, temperature=0)
    with (
        jax.set_mesh(make_mesh(MeshConfig(tensor=8))),
        pytest.raises(ValueError, match="a matrix of 12 tokens and width 4 is not divisible by the 8 devices"),
    ):
        api.cross_entropy(hidden, matrix, targets, table=True, backend="chunked")


def test_correct_is_without_gradient():
    logits = jnp.array([[1.0, 2.0]])
    grad = jax.grad(lambda x: jnp.sum(reference.scores(x, jnp.array([1])).correct))(logits)
    np.testing.assert_array_equal(grad, 0.0)
