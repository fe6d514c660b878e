"""Encoders: what a token may see, what must not change their numbers, what their heads say, and what they refuse."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.models import ENCODERS, BertConfig, ElectraConfig, RobertaConfig, build_model
from jaxtrain.models.encoder_heads import sentence_embeddings
from jaxtrain.optim.masks import decay_mask, parameter_paths
from jaxtrain.optim.matrices import as_matrix
from jaxtrain.sharding import MeshConfig, make_mesh, param_shardings, put_batch
from jaxtrain.types import Outputs, Tokens, path_name

V = 19
BASE = {"vocab_size": V, "num_layers": 2, "d_model": 16, "num_heads": 4, "d_ff": 24, "max_positions": 12}
FULL = {
    BertConfig: {"heads": ("mlm", "nsp")},
    RobertaConfig: {"heads": ("mlm", "pooler"), "type_vocab_size": 2},
    ElectraConfig: {"heads": ("mlm", "discriminator"), "embedding_size": 8},
}
every_family = pytest.mark.parametrize("family", ENCODERS, ids=lambda config: config.__name__)


# Compiling is what takes time here.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def make(family=BertConfig, **changes):
    return build_model(family(**BASE | FULL[family] | changes))


def random_params(model, seed=1):
    rng = np.random.default_rng(seed)

    def one(path, x):
        return jnp.asarray(path_name(path).endswith("scale") + 0.3 * rng.normal(size=x.shape), x.dtype)

    return jax.tree_util.tree_map_with_path(one, model.shapes())


def make_tokens(ids, segments, types=None):
    ids, segments = np.asarray(ids, np.int32), np.asarray(segments, np.int32)
    positions = np.zeros_like(ids)
    for row, numbers in zip(positions, segments, strict=True):
        for number in set(numbers) - {0}:
            row[numbers == number] = np.arange((numbers == number).sum())
    types = None if types is None else np.asarray(types, np.int32)
    weights = np.ones(ids.shape, np.float32)
    return Tokens(ids=ids, targets=ids, weights=weights, positions=positions, segments=segments, types=types)


SEGMENTS = [[1, 1, 1, 1, 2, 2, 2, 0, 0]]
TYPES = [[0, 0, 1, 1, 0, 1, 1, 0, 0]]


@pytest.fixture(scope="module")
def packed():
    """Two segments of two texts each, and padding."""
    return make_tokens(np.random.default_rng(0).integers(1, V, (1, 9)), SEGMENTS, TYPES)


def read(out: Outputs):
    """Every output, side by side: ``[B, T, n]``."""
    arrays = [out.hidden, out.logits, out.pooled, out.next_sentence]
    arrays += [None if out.replaced is None else out.replaced[..., None]]
    return np.concatenate([x for x in arrays if x is not None], axis=-1)


@pytest.mark.smoke
@every_family
def test_a_token_sees_its_segment_and_nothing_else(family, packed):
    """The table of embeddings gets one row a position, so that its rows are the inputs."""
    T = packed.ids.shape[1]
    model = make(family, vocab_size=T, heads=("mlm",))
    params = random_params(model)
    tokens = dataclasses.replace(packed, ids=np.arange(T, dtype=np.int32)[None])

    def hidden(table):
        return model.apply({**params, "embed": {"embedding": table}}, tokens).hidden[0, :, :3]

    jacobian = np.asarray(jit(jax.jacrev(hidden))(params["embed"]["embedding"]))  # [T, outputs, T, E]
    depends = np.any(jacobian != 0, axis=(1, 3))
    segments = packed.segments[0]
    t, s = np.meshgrid(np.arange(T), np.arange(T), indexing="ij")
    # Padding sees nothing but its own residual stream.
    allowed = ((segments[t] == segments[s]) & (segments[s] > 0)) | ((t == s) & (segments[t] == 0))
    np.testing.assert_array_equal(depends, allowed)


@every_family
def test_packed_rows_read_as_rows_of_their_own(family, packed):
    model = make(family)
    params = random_params(model)
    forward = jit(model.apply)
    together = read(forward(params, packed))[0]
    for start, end in ((0, 4), (4, 7)):
        ids, segments, types = (np.zeros((1, 9), np.int32) for _ in range(3))
        segments[0, : end - start] = 1
        ids[0, : end - start], types[0, : end - start] = packed.ids[0, start:end], packed.types[0, start:end]
        alone = read(forward(params, make_tokens(ids, segments, types)))[0, : end - start]
        np.testing.assert_allclose(alone, together[start:end], atol=1e-5)
    moved = dataclasses.replace(packed, positions=packed.positions + 1)
    assert np.abs(read(forward(params, moved))[0, :7] - together[:7]).max() > 1e-2


@every_family
def test_types_are_read(family, packed):
    model = make(family)
    params, forward = random_params(model), jit(model.apply)
    without = dataclasses.replace(packed, types=None)
    zeros = dataclasses.replace(packed, types=np.zeros_like(packed.ids))
    np.testing.assert_array_equal(read(forward(params, without)), read(forward(params, zeros)))
    assert np.abs(read(forward(params, packed)) - read(forward(params, zeros)))[0, :7].max() > 1e-2
    plain = make(family, type_vocab_size=0)
    assert "type_embed" not in plain.shapes()
    with pytest.raises(ValueError, match="the batch has token types, but the model's type_vocab_size is 0"):
        plain.apply(random_params(plain), packed)


def test_positions_of_roberta_start_behind_the_rows_of_padding(packed):
    model, moved = make(RobertaConfig), make(RobertaConfig, position_offset=0)
    params = random_params(model)
    table = params["position_embed"]["embedding"]
    assert table.shape == (12 + 2, 16)
    shorter = {**params, "position_embed": {"embedding": table[2:]}}
    np.testing.assert_array_equal(read(model.apply(params, packed)), read(moved.apply(shorter, packed)))


@pytest.mark.parametrize("width", [8, 16, 24])
def test_embeddings_of_another_width(width, packed):
    model = make(ElectraConfig, embedding_size=width)
    shapes = model.shapes()
    assert ("embed_projection" in shapes) == (width != 16)
    assert shapes["embed"]["embedding"].shape == (V, width) and shapes["mlm"]["dense"]["kernel"].shape == (16, width)
    assert model.apply(random_params(model), packed).logits.shape == (1, 9, V)


def test_heads_are_there_when_asked_for(packed):
    def outputs(family, heads):
        model = make(family, heads=heads)
        return jax.eval_shape(model.apply, model.shapes(), packed), model.shapes()

    out, params = outputs(BertConfig, ())
    assert out.hidden.shape == (1, 9, 16) and not {"mlm", "pooler", "next_sentence"} & set(params)
    assert out.logits is out.pooled is out.next_sentence is out.replaced is None
    out, params = outputs(BertConfig, ("nsp",))
    assert out.next_sentence.shape == (1, 9, 2) and out.pooled.shape == (1, 9, 16) and "mlm" not in params
    out, _ = outputs(ElectraConfig, ("discriminator",))
    assert out.replaced.shape == (1, 9) and out.replaced.dtype == jnp.float32 and out.logits is None
    for family, heads in ((RobertaConfig, ("nsp",)), (ElectraConfig, ("pooler",)), (BertConfig, ("discriminator",))):
        with pytest.raises(ValueError, match="heads must name some of"):
            make(family, heads=heads)


def test_masked_logits_are_read_with_the_embeddings(packed):
    """Moving one id's embedding moves that id's logit and, through what is read, no other of a text without it."""
    model = make(heads=("mlm",))
    params = random_params(model)
    tokens = dataclasses.replace(packed, ids=np.where(packed.ids == 5, 6, packed.ids))
    table = params["embed"]["embedding"]
    moved = {**params, "embed": {"embedding": table.at[5].add(1.0)}}
    change = np.abs(np.asarray(model.apply(moved, tokens).logits) - model.apply(params, tokens).logits).max((0, 1))
    assert change[5] > 0.1 and np.all(np.delete(change, 5) == 0)


@every_family
def test_how_layers_are_compiled_changes_no_number(family, packed):
    def compute(**changes):
        model = make(family, **changes)

        def total(params):
            out = model.apply(params, packed)
            arrays = [out.hidden, out.logits, out.pooled, out.next_sentence, out.replaced]
            return sum(jnp.sum(jnp.sin(x[:, :7])) for x in arrays if x is not None)

        return jax.device_get(jit(jax.value_and_grad(total))(random_params(model)))

    value, grads = compute()
    scale = max(np.abs(x).max() for x in jax.tree.leaves(grads))
    # Whatever is there is used.
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        small = path_name(path).endswith("key/bias")  # moves all logits of a query alike
        assert small or np.abs(grad).max() > 1e-4 * scale, path_name(path)
    found, found_grads = compute(remat="full", scan_unroll=2)
    assert found == pytest.approx(value, rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * scale), found_grads, grads)


@every_family
def test_a_split_sequence_changes_no_number(family):
    """The other axes are the parity suite's."""
    tokens = make_tokens(np.random.default_rng(2).integers(1, 16, (4, 8)), [[1, 1, 1, 1, 1, 2, 2, 0]] * 4)
    model = make(family, vocab_size=16)
    params = jax.device_get(random_params(model))
    wanted = read(jit(model.apply)(params, tokens))
    mesh = make_mesh(MeshConfig(fsdp=2, context=4))
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, param_shardings(model.axes, model.shapes(), mesh, model.rules))
        found = read(jit(model.apply)(placed, put_batch(tokens, mesh, model.rules)))
    np.testing.assert_allclose(found, wanted, atol=1e-5)


@every_family
def test_optimizers_know_every_parameter(family):
    model = make(family)
    decays = decay_mask(model.shapes())
    kept = {path for path, leaf in zip(parameter_paths(decays), jax.tree.leaves(decays), strict=True) if leaf}
    assert "mlm/dense/kernel" in kept and "embed/embedding" in kept and "mlm/bias" not in kept
    names = jax.tree.leaves(model.axes, is_leaf=lambda x: isinstance(x, tuple))
    for path, axes in zip(parameter_paths(model.shapes()), names, strict=True):
        matrix = as_matrix(axes, path)
        assert (matrix is None) == path.endswith(("bias", "scale")), path


def test_initial_values_depend_on_the_key_and_the_name_alone():
    def values(**changes):
        return jit(make(**changes).init)(jax.random.key(0))

    everything, bare = values(), values(heads=())
    assert set(everything) - set(bare) == {"mlm", "pooler", "next_sentence"}
    for name, part in bare.items():
        jax.tree.map(np.testing.assert_array_equal, part, everything[name])
    assert np.std(everything["embed"]["embedding"]) == pytest.approx(0.02, rel=0.1)
    drawn = [x for path, x in jax.tree_util.tree_leaves_with_path(everything) if path_name(path).endswith("kernel")]
    scaled = {round(float(x.ravel()[0] / x.std()), 3) for x in drawn}
    assert len(drawn) == 9 and len(scaled) == 9


@pytest.mark.smoke
def test_dropout_is_on_with_a_key_and_off_without(packed):
    model, plain = make(dropout=0.4), make()
    params = random_params(plain)
    forward = jit(lambda p, key=None: model.apply(p, packed, rng=key).hidden)
    off = forward(params)
    np.testing.assert_array_equal(off, jit(lambda p: plain.apply(p, packed).hidden)(params))
    one, same, other = (forward(params, jax.random.key(n)) for n in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).max() > 1e-3 and np.abs(one - off).max() > 1e-3
    assert np.isfinite(one).all()


def test_bfloat16_stays_near(packed):
    low = make(compute_dtype="bfloat16")
    params = random_params(low)
    out = jit(low.apply)(params, packed)
    assert out.hidden.dtype == out.pooled.dtype == jnp.bfloat16
    assert out.logits.dtype == out.next_sentence.dtype == jnp.float32
    exact = read(jit(make().apply)(params, packed))
    assert 0 < np.abs(read(out) - exact)[0, :7].max() < 0.1 * np.abs(exact).max()
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(make(param_dtype="bfloat16").shapes()))


def test_sentence_embeddings_by_hand():
    hidden = np.array([[[3.0, 0.0], [0.0, 4.0], [5.0, 5.0], [-1.0, 0.0]]])
    segments = np.array([[1, 1, 0, 2]])
    found = sentence_embeddings(hidden, segments, count=3)
    np.testing.assert_allclose(found, [[[0.6, 0.8], [-1.0, 0.0], [0.0, 0.0]]], atol=1e-6)
    assert sentence_embeddings(jnp.asarray(hidden, jnp.bfloat16), segments).dtype == jnp.float32


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        (BertConfig, {"num_layers": 0}, "num_layers must be at least 1, found 0"),
        (BertConfig, {"d_model": 18}, "d_model=18 is not a multiple of num_heads=4"),
        (BertConfig, {"type_vocab_size": -1}, "type_vocab_size must be at least 0, found -1"),
        (BertConfig, {"activation": "tanh"}, "activation='tanh'; one of"),
        (BertConfig, {"dropout": 1.0}, r"dropout must be in \[0, 1\), found 1.0"),
        (BertConfig, {"scan_unroll": 3}, "scan_unroll=3 must be from 1 to num_layers=2"),
        (BertConfig, {"heads": ("mlm", "mlm")}, "heads must name some of"),
        (BertConfig, {"remat": "some"}, "remat='some'; one of"),
        (BertConfig, {"attention": "flash"}, "attention='flash'; one of"),
        (BertConfig, {"param_dtype": "float16"}, "param_dtype='float16'; 'float32' or 'bfloat16'"),
        (RobertaConfig, {"position_offset": -1}, "position_offset must be at least 0, found -1"),
        (ElectraConfig, {"embedding_size": -1}, "embedding_size must be at least 0, found -1"),
    ],
    ids=str,
)
def test_mistakes_are_named(family, changes, message):
    with pytest.raises(ValueError, match=message):
        make(family, **changes)


def test_too_long_a_row_and_a_cache_are_refused(packed):
    model = make()
    ids = np.ones((1, 13), np.int32)
    with pytest.raises(ValueError, match="13 tokens in a row, but the model's max_positions is 12"):
        jax.eval_shape(model.apply, model.shapes(), make_tokens(ids, ids))
    with pytest.raises(ValueError, match="an encoder has no cache"):
        model.apply(model.shapes(), packed, cache={})
