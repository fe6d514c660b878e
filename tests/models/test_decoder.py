"""The decoder: what it may see, what must not change its numbers, and what it refuses."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.models import DecoderConfig, Rope, build_model, init_cache
from jaxtrain.models.decoder_config import REMAT_NAMES
from jaxtrain.models.flops import forward_flops_per_token, seen_keys, train_flops_per_token
from jaxtrain.models.gemma2 import Gemma2Config
from jaxtrain.sharding import MeshConfig, make_mesh
from jaxtrain.types import Tokens

V = 19
BASE = {"vocab_size": V, "num_layers": 2, "d_model": 16, "num_heads": 4, "num_kv_heads": 2, "d_ff": 24}
BASE |= {"max_positions": 32, "heads": ("lm", "reward", "value"), "init_std": 0.5}


def make(**changes):
    return build_model(DecoderConfig(**BASE | changes))


def random_params(model, seed=1):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype), model.shapes())


def make_tokens(ids, segments=None, positions=None):
    ids = np.asarray(ids, np.int32)
    segments = np.ones_like(ids) if segments is None else np.asarray(segments, np.int32)
    if positions is None:
        positions = np.zeros_like(ids)
        for row, numbers in zip(positions, segments, strict=True):
            for number in set(numbers) - {0}:
                row[numbers == number] = np.arange((numbers == number).sum())
    return Tokens(ids=ids, targets=ids, weights=np.ones(ids.shape, np.float32), positions=positions, segments=segments)


@pytest.fixture(scope="module")
def model():
    return make()


@pytest.fixture(scope="module")
def params(model):
    return random_params(model)


@pytest.fixture(scope="module")
def forward(model):
    return jax.jit(model.apply)


def read(out):
    return np.concatenate([out.logits, out.rewards[..., None], out.values[..., None]], axis=-1)


@pytest.fixture(scope="module")
def packed():
    """Two segments and padding in a row."""
    ids = np.random.default_rng(0).integers(1, V, (1, 9))
    return make_tokens(ids, segments=[[1, 1, 1, 1, 2, 2, 2, 0, 0]])


@pytest.mark.smoke
def test_nothing_depends_on_a_later_token_or_another_segment(model, params, packed):
    """The jacobian of every output in every input embedding is zero exactly where it must be, and only there.

    The embedding table gets one row a position, so that its rows are the inputs.
    """
    T = packed.ids.shape[1]
    wide = make(vocab_size=T, tie_embeddings=False)
    own = random_params(wide)
    tokens = dataclasses.replace(packed, ids=np.arange(T, dtype=np.int32)[None])

    def outputs(table):
        out = wide.apply({**own, "embed": {"embedding": table}}, tokens)
        return jnp.concatenate([out.logits[0, :, :3], out.rewards[0, :, None], out.values[0, :, None]], axis=-1)

    jacobian = np.asarray(jax.jit(jax.jacrev(outputs))(own["embed"]["embedding"]))  # [T, outputs, T, D]
    depends = np.any(jacobian != 0, axis=-1).transpose(0, 2, 1)  # [output position, input position, output]
    segments = packed.segments[0]
    t, s = np.meshgrid(np.arange(T), np.arange(T), indexing="ij")
    allowed = (s <= t) & (segments[t] == segments[s]) & (segments[s] > 0)
    # Padding sees nothing but its own residual stream.
    allowed |= (t == s) & (segments[t] == 0)
    for number in range(jacobian.shape[1]):
        np.testing.assert_array_equal(depends[..., number], allowed)


def test_packed_rows_read_as_rows_of_their_own(params, forward, packed):
    together = read(forward(params, packed))[0]
    for start, end in ((0, 4), (4, 7)):
        alone = np.zeros((1, 9), np.int32)
        segments = np.zeros((1, 9), np.int32)
        alone[0, : end - start], segments[0, : end - start] = packed.ids[0, start:end], 1
        np.testing.assert_allclose(
            read(forward(params, make_tokens(alone, segments)))[0, : end - start],
            together[start:end],
            atol=1e-5,
        )
    assert packed.positions.tolist() == [[0, 1, 2, 3, 0, 1, 2, 0, 0]]
    # RoPE reads distances, so only positions that run on inside one segment may go unnoticed.
    shuffled = dataclasses.replace(packed, positions=packed.positions * 2)
    assert np.abs(read(forward(params, shuffled))[0, :7] - together[:7]).max() > 1e-2


def test_initial_values_depend_on_the_key_and_the_name_alone():
    def values(**changes):
        return jax.jit(make(**changes).init)(jax.random.key(0))

    everything, lm = values(tie_embeddings=False), values(tie_embeddings=False, heads=("lm",))
    for name, part in lm.items():
        jax.tree.map(np.testing.assert_array_equal, part, everything[name])
    assert set(everything) - set(lm) == {"reward_head", "value_head"}
    assert np.all(everything["value_head"]["kernel"] == 0) and np.any(everything["reward_head"]["kernel"] != 0)
    query = everything["layers"]["attention"]["query"]["kernel"]
    assert np.all(query[0] != query[1])
    other = jax.jit(make(tie_embeddings=False).init)(jax.random.key(1))
    assert np.all(other["layers"]["attention"]["query"]["kernel"] != query)
    assert np.std(query) == pytest.approx(16**-0.5, rel=0.1)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, tensor=2, fsdp=2))):
        under = jax.jit(make(tie_embeddings=False).init)(jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, under, everything)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_the_cache_gives_what_the_whole_row_gives(qk_norm):
    """Left-padded prompts of different lengths in one call, then token by token."""
    model = make(qk_norm=qk_norm)
    params = random_params(model)
    rng = np.random.default_rng(3)
    T, prompt = 11, 6
    segments = (np.arange(T) >= np.array([[0], [3], [5]])).astype(np.int32)
    tokens = make_tokens(np.where(segments, rng.integers(1, V, (3, T)), 0), segments)
    whole = read(jax.jit(model.apply)(params, tokens))
    step = jax.jit(lambda p, t, c: model.apply(p, t, cache=c))
    cache, parts = init_cache(model.config, 3, 16), []
    for start, end in [(0, prompt), *((i, i + 1) for i in range(prompt, T))]:
        out = step(params, jax.tree.map(lambda x, a=start, b=end: x[:, a:b], tokens), cache)
        cache = out.cache
        parts.append(read(out))
    found = np.concatenate(parts, axis=1)
    assert cache.lengths.tolist() == segments.sum(axis=1).tolist()
    np.testing.assert_allclose(found[segments > 0], whole[segments > 0], atol=1e-5, rtol=1e-5)


def test_the_cache_has_an_end(model):
    with pytest.raises(ValueError, match="a cache of 33 positions is longer than the model's max_positions=32"):
        init_cache(model.config, 1, 33)


@pytest.fixture(scope="module")
def values_and_grads(packed):
    def compute(**changes):
        model = make(**changes)

        def total(params):
            out = model.apply(params, packed)
            return jnp.sum(jnp.sin(out.logits)) + jnp.sum(out.rewards * out.values)

        return jax.device_get(jax.jit(jax.value_and_grad(total))(random_params(model)))

    return compute


@pytest.mark.parametrize(
    "changes",
    [
        {"remat": "dots"},
        {"remat": "full"},
        {
            "remat": "full",
            "remat_save": ("attention", "mlp_up"),
            "remat_offload": ("stream", "query"),
            "attention": "blocked",
        },
        {"scan_unroll": 2},
    ],
    ids=str,
)
def test_how_layers_are_compiled_changes_no_number(changes, values_and_grads):
    value, grads = values_and_grads()
    found, found_grads = values_and_grads(**changes)
    assert found == pytest.approx(value, rel=1e-5)
    scale = max(np.abs(x).max() for x in jax.tree.leaves(grads))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * scale), found_grads, grads)


def test_remat_recomputes_what_its_policy_says(packed):
    """Counted in matrix products: "full" makes all of them again, "dots" only those of attention."""

    def products(remat):
        model = make(remat=remat)
        gradient = jax.grad(lambda p: jnp.sum(model.apply(p, packed).logits))
        return str(jax.make_jaxpr(gradient)(random_params(model))).count("dot_general")

    assert products("none") < products("dots") < products("full")


@pytest.fixture(scope="module")
def remat_program(packed):
    """(backend, remat_save, remat_offload) -> the text of a gradient, of layers that normalise before and after."""

    @functools.cache
    def program(backend, save=(), offload=()):
        kinds = dict(remat="full", remat_save=save, remat_offload=offload, attention=backend)
        model = build_model(Gemma2Config(**BASE | kinds))
        gradient = jax.grad(lambda p: jnp.sum(model.apply(p, packed).logits))
        return str(jax.make_jaxpr(gradient)(model.shapes()))

    return program


@pytest.mark.parametrize(("name", "backend"), [*((name, "xla") for name in REMAT_NAMES), ("attention", "blocked")])
def test_what_remat_keeps_by_name(name, backend, remat_program):
    """Kept, it spares at least one matrix product; in the host's memory too, where the program says so."""
    full, moved = remat_program(backend), remat_program(backend, offload=(name,))
    assert "<host>" in moved and "<host>" not in full
    if name != "stream":
        kept = remat_program(backend, save=(name,))
        assert kept.count("dot_general") == moved.count("dot_general") < full.count("dot_general")


@pytest.mark.smoke
def test_dropout_is_on_with_a_key_and_off_without(packed):
    model, plain = make(dropout=0.4), make()
    params = random_params(plain)
    forward = jax.jit(lambda p, key=None: model.apply(p, packed, rng=key).logits)
    off = forward(params)
    np.testing.assert_array_equal(off, jax.jit(lambda p: plain.apply(p, packed).logits)(params))
    one, same, other = (forward(params, jax.random.key(n)) for n in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).max() > 1e-3 and np.abs(one - off).max() > 1e-3
    with_key = jax.jit(lambda p, key: plain.apply(p, packed, rng=key).logits)(params, jax.random.key(0))
    np.testing.assert_array_equal(with_key, off)


def test_dropout_keeps_the_mean():
    from jaxtrain.models.layers import dropout

    x = dropout(jnp.ones((100, 100)), 0.25, jax.random.key(0))
    assert set(np.unique(x)) == {0.0, np.float32(1 / 0.75)}
    assert float(x.mean()) == pytest.approx(1, abs=0.02)


def test_tied_embeddings_share_one_table(packed):
    tied, untied = make(), make(tie_embeddings=False)
    params = random_params(tied)
    assert "lm_head" not in params and "lm_head" in untied.shapes()
    assert untied.num_params() - tied.num_params() == 16 * V
    out = tied.apply(params, packed)
    expected = np.asarray(out.hidden) @ np.asarray(params["embed"]["embedding"]).T
    np.testing.assert_allclose(out.logits, expected, rtol=1e-4, atol=1e-5)
    own = untied.apply({**params, "lm_head": {"kernel": params["embed"]["embedding"].T}}, packed)
    np.testing.assert_allclose(own.logits, out.logits, rtol=1e-4, atol=1e-5)


def test_heads_are_there_when_asked_for(packed):
    out = make(heads=("value",)).apply(random_params(make(heads=("value",))), packed)
    assert out.logits is None and out.rewards is None and out.values.shape == (1, 9)


def test_bfloat16_stays_near(params, forward, packed):
    low = make(compute_dtype="bfloat16")
    out = jax.jit(low.apply)(params, packed)
    assert out.hidden.dtype == jnp.bfloat16
    assert out.logits.dtype == out.rewards.dtype == out.values.dtype == jnp.float32
    exact = read(forward(params, packed))
    assert 0 < np.abs(read(out) - exact).max() < 0.1 * np.abs(exact).max()
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(make(param_dtype="bfloat16").shapes()))


def test_qk_norm_bounds_the_logits(packed):
    model = make(qk_norm=True)
    params = random_params(model)
    assert params["layers"]["attention"]["query_norm"]["scale"].shape == (2, 4)
    large = jax.tree.map(lambda x: x, params)
    large["layers"]["attention"]["query"]["kernel"] = params["layers"]["attention"]["query"]["kernel"] * 1e3
    forward = jax.jit(lambda p: model.apply(p, packed).logits)
    np.testing.assert_allclose(forward(large), forward(params), atol=2e-2)


def test_rope_of_the_config_is_used(params, forward, packed):
    stretched = make(rope=Rope(scaling="linear", factor=2.0))
    twice = dataclasses.replace(packed, positions=packed.positions * 2)
    np.testing.assert_allclose(read(jax.jit(stretched.apply)(params, twice)), read(forward(params, packed)), atol=1e-4)


def test_too_long_a_row_is_refused(model, params):
    with pytest.raises(ValueError, match="33 tokens in a row, but the model's max_positions is 32"):
        model.apply(params, make_tokens(np.ones((1, 33))))


def test_models_of_equal_configs_are_one(model):
    assert make() is model and make(qk_norm=True) is not model


def test_flops_by_hand():
    config = make(heads=("lm", "value")).config
    layer = 2 * 16 * 16 * 2 + 2 * 16 * 8 * 2 + 2 * 3 * 16 * 24
    attention = sum(2 * 2 * 4 * 4 * (t + 1) for t in range(8)) / 8
    assert forward_flops_per_token(config, 8) == 2 * (layer + attention) + 2 * 16 * V + 2 * 16
    assert train_flops_per_token(config, 8) == 3 * forward_flops_per_token(config, 8)


@pytest.mark.parametrize(("length", "window"), [(8, 0), (8, 3), (8, 8), (8, 20), (1, 1)])
def test_seen_keys_are_counted_one_by_one(length, window):
    counts = [sum(s <= t and (not window or t - s < window) for s in range(length)) for t in range(length)]
    assert seen_keys(length, window) == pytest.approx(np.mean(counts))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 0}, "num_layers must be at least 1, found 0"),
        ({"d_model": 18}, "d_model=18 is not a multiple of num_heads=4"),
        ({"num_kv_heads": 3}, "num_heads=4 is not a multiple of num_kv_heads=3"),
        ({"head_dim": 5}, "head_dim=5 must be even"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), found 1.0"),
        ({"scan_unroll": 3}, "scan_unroll=3 must be from 1 to num_layers=2"),
        ({"heads": ()}, "heads must name some of"),
        ({"heads": ("lm", "lm")}, "heads must name some of"),
        ({"heads": ("critic",)}, "heads must name some of"),
        ({"remat": "some"}, "remat='some'; one of"),
        ({"remat": "full", "remat_save": ("keys",)}, r"must name some of .* found \('keys',\)"),
        ({"remat": "full", "remat_save": ("key",), "remat_offload": ("key",)}, "once each"),
        ({"remat": "dots", "remat_save": ("key",)}, "what remat='full' keeps, but remat='dots'"),
        ({"remat": "full", "remat_save": ("stream",)}, "is kept anyway"),
        ({"attention": "flash"}, "attention='flash'; one of"),
        ({"compute_dtype": "float16"}, "compute_dtype='float16'; 'float32' or 'bfloat16'"),
        ({"num_heads": 0}, "num_heads must be at least 1, found 0"),
    ],
    ids=str,
)
def test_mistakes_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        DecoderConfig(**BASE | changes)
