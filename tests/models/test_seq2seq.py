"""Encoder-decoders: what a token may see, what must not change their numbers, decoding with a cache, and refusals."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.models import SEQ2SEQ, BartConfig, T5Config, build_model
from jaxtrain.models.relative import Relative
from jaxtrain.models.seq2seq_cache import init_seq2seq_cache
from jaxtrain.optim.masks import decay_mask, parameter_paths
from jaxtrain.optim.matrices import as_matrix
from jaxtrain.sharding import MeshConfig, make_mesh, param_shardings, put_batch
from jaxtrain.types import Seq2Seq, Tokens, path_name

V = 20
BASE = {"vocab_size": V, "num_layers": 1, "num_decoder_layers": 2, "d_model": 16, "num_heads": 4, "d_ff": 24}
BASE |= {"max_positions": 16}
FULL = {
    BartConfig: {"scale_embedding": True},
    T5Config: {"head_dim": 6, "relative_buckets": 8, "relative_max_distance": 10, "gated": True, "activation": "silu"},
}
every_family = pytest.mark.parametrize("family", SEQ2SEQ, ids=lambda config: config.__name__)
# Compiling is what takes time here.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def make(family, **changes):
    return build_model(family(**BASE | FULL[family] | changes))


def random_params(model, seed=1):
    rng = np.random.default_rng(seed)

    def one(path, x):
        return jnp.asarray(path_name(path).endswith("scale") + 0.3 * rng.normal(size=x.shape), x.dtype)

    return jax.tree_util.tree_map_with_path(one, model.shapes())


def make_tokens(ids, segments):
    ids, segments = np.asarray(ids, np.int32), np.asarray(segments, np.int32)
    positions = np.zeros_like(ids)
    for row, numbers in zip(positions, segments, strict=True):
        for number in set(numbers) - {0}:
            row[numbers == number] = np.arange((numbers == number).sum())
    weights = np.ones(ids.shape, np.float32)
    return Tokens(ids=ids, targets=ids, weights=weights, positions=positions, segments=segments)


@pytest.fixture(scope="module")
def packed():
    """Two pairs of a source and a target in a row, of other lengths on either side."""
    rng = np.random.default_rng(0)
    return Seq2Seq(
        encoder=make_tokens(rng.integers(1, V, (1, 8)), [[1, 1, 1, 2, 2, 2, 2, 0]]),
        decoder=make_tokens(rng.integers(1, V, (1, 9)), [[1, 1, 1, 1, 2, 2, 2, 0, 0]]),
    )


@pytest.mark.smoke
@every_family
def test_a_target_sees_what_came_before_and_its_own_source(family, packed):
    """The table of embeddings gets one row a token of either side, so that its rows are the inputs."""
    S, T = packed.encoder.ids.shape[1], packed.decoder.ids.shape[1]
    model = make(family, vocab_size=S + T)
    params = random_params(model)
    tokens = Seq2Seq(
        encoder=dataclasses.replace(packed.encoder, ids=np.arange(S, dtype=np.int32)[None]),
        decoder=dataclasses.replace(packed.decoder, ids=np.arange(S, S + T, dtype=np.int32)[None]),
    )

    def hidden(table):
        out = model.apply({**params, "embed": {"embedding": table}}, tokens)
        return jnp.concatenate([out.encoded[0, :, :3], out.hidden[0, :, :3]])

    jacobian = np.asarray(jit(jax.jacrev(hidden))(params["embed"]["embedding"]))
    depends = np.any(jacobian != 0, axis=(1, 3))
    segments = np.concatenate([packed.encoder.segments[0], packed.decoder.segments[0]])
    t, s = np.meshgrid(np.arange(S + T), np.arange(S + T), indexing="ij")
    allowed = (segments[t] == segments[s]) & (segments[s] > 0) & ((s < S) | (s <= t))
    # Padding sees nothing but its own residual stream.
    allowed |= (t == s) & (segments[t] == 0)
    np.testing.assert_array_equal(depends, allowed)


@every_family
def test_packed_rows_read_as_rows_of_their_own(family, packed):
    model = make(family)
    params, forward = random_params(model), jit(model.apply)
    together = forward(params, packed)

    def alone(tokens, start, end):
        ids, segments = np.zeros_like(tokens.ids), np.zeros_like(tokens.ids)
        ids[0, : end - start], segments[0, : end - start] = tokens.ids[0, start:end], 1
        return make_tokens(ids, segments)

    for (a, b), (start, end) in (((0, 3), (0, 4)), ((3, 7), (4, 7))):
        out = forward(params, Seq2Seq(encoder=alone(packed.encoder, a, b), decoder=alone(packed.decoder, start, end)))
        np.testing.assert_allclose(out.encoded[0, : b - a], together.encoded[0, a:b], atol=1e-5)
        np.testing.assert_allclose(out.logits[0, : end - start], together.logits[0, start:end], atol=1e-5)


@every_family
def test_how_layers_are_compiled_changes_no_number(family, packed):
    def compute(**changes):
        model = make(family, **changes)

        def total(params):
            out = model.apply(params, packed)
            return jnp.sum(jnp.sin(out.logits[:, :7])) + jnp.sum(jnp.sin(out.encoded[:, :7]))

        return jax.device_get(jit(jax.value_and_grad(total))(random_params(model)))

    value, grads = compute()
    scale = max(np.abs(x).max() for x in jax.tree.leaves(grads))
    # Whatever is there is used; but a key's bias moves all logits of a query alike, and BART's constant is not trained.
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        name = path_name(path)
        assert name.endswith("key/bias") or (np.abs(grad).max() > 1e-5 * scale) != name.startswith("logits_bias"), name
    found, found_grads = compute(remat="full")
    assert found == pytest.approx(value, rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * scale), found_grads, grads)


@every_family
def test_a_split_sequence_changes_no_number(family):
    """The other axes are the parity suite's."""
    rng = np.random.default_rng(2)
    tokens = Seq2Seq(
        encoder=make_tokens(rng.integers(1, V, (4, 8)), [[1, 1, 1, 1, 1, 2, 2, 0]] * 4),
        decoder=make_tokens(rng.integers(1, V, (4, 4)), [[1, 1, 2, 2]] * 4),
    )
    model = make(family)
    params = jax.device_get(random_params(model))
    wanted = jit(model.apply)(params, tokens)
    mesh = make_mesh(MeshConfig(fsdp=2, context=4))
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, param_shardings(model.axes, model.shapes(), mesh, model.rules))
        found = jit(model.apply)(placed, put_batch(tokens, mesh, model.rules))
    np.testing.assert_allclose(found.logits, wanted.logits, atol=1e-5)
    np.testing.assert_allclose(found.encoded, wanted.encoded, atol=1e-5)


@every_family
def test_optimizers_know_every_parameter(family):
    model = make(family)
    assert len(jax.tree.leaves(decay_mask(model.shapes()))) == len(jax.tree.leaves(model.shapes()))
    names = jax.tree.leaves(model.axes, is_leaf=lambda x: isinstance(x, tuple))
    for path, axes in zip(parameter_paths(model.shapes()), names, strict=True):
        assert (as_matrix(axes, path) is None) == path.endswith(("bias", "scale")), path


@every_family
def test_initial_values(family):
    """Of every part its own, those of T5's queries as small as its unscaled logits need."""
    params = jit(make(family).init)(jax.random.key(0))
    bare = jit(make(family, heads=()).init)(jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, bare, {name: params[name] for name in bare})
    drawn = [x for path, x in jax.tree_util.tree_leaves_with_path(params) if path_name(path).endswith("kernel")]
    scaled = {round(float(x.ravel()[0] / x.std()), 3) for x in drawn}
    assert len(drawn) == len(scaled)
    attention = params["decoder"]["layers"]["cross"]
    ratio = np.std(attention["query"]["kernel"]) / np.std(attention["key"]["kernel"])
    assert ratio == pytest.approx(6**-0.5 if family is T5Config else 1, rel=0.1)


@pytest.mark.smoke
@every_family
def test_dropout_is_on_with_a_key_and_off_without(family, packed):
    model, plain = make(family, dropout=0.4), make(family)
    params = random_params(plain)
    forward = jit(lambda p, key=None: model.apply(p, packed, rng=key))
    off = forward(params)
    np.testing.assert_array_equal(off.hidden, jit(lambda p: plain.apply(p, packed).hidden)(params))
    one, same, other = (forward(params, jax.random.key(n)) for n in (0, 0, 1))
    np.testing.assert_array_equal(one.hidden, same.hidden)
    for name in ("hidden", "encoded"):
        assert np.abs(getattr(one, name) - getattr(other, name)).max() > 1e-3
        assert np.abs(getattr(one, name) - getattr(off, name)).max() > 1e-3


def test_bfloat16_stays_near(packed):
    low = make(T5Config, compute_dtype="bfloat16")
    params = random_params(low)
    out = jit(low.apply)(params, packed)
    assert out.hidden.dtype == out.encoded.dtype == jnp.bfloat16 and out.logits.dtype == jnp.float32
    exact = jit(make(T5Config).apply)(params, packed)
    error = np.abs(out.logits - exact.logits)[0, :7].max()
    assert 0 < error < 0.1 * np.abs(exact.logits).max()


def test_buckets_by_hand():
    relative = Relative(buckets=8, max_distance=16)
    # A direction of an encoder has 4: distances 0 and 1, then those from 2 and from 2 * sqrt(8) on.
    both = relative.bucket(np.array([0, -1, -2, -5, -6, -16, -99, 1, 2, 6, 99]), causal=False)
    assert both.tolist() == [0, 1, 2, 2, 3, 3, 3, 5, 6, 7, 7]
    # A decoder has 8 for what came before: 0 to 3, then from 4, 4 * 2 ** 0.5, 8 and 8 * 2 ** 0.5 on.
    before = relative.bucket(np.array([3, 0, -1, -3, -4, -5, -6, -7, -8, -11, -12, -99]), causal=True)
    assert before.tolist() == [0, 0, 1, 3, 4, 4, 5, 5, 6, 6, 7, 7]
    table = np.arange(8.0)[:, None]
    rows = relative.row_bias(table, 3, causal=False)
    np.testing.assert_array_equal(rows, [[[0, 5, 6], [1, 0, 5], [2, 1, 0]]])
    positions = np.array([[4, 5, 6], [0, 1, 2]])
    np.testing.assert_array_equal(relative.bias(table, positions, positions, causal=False), [rows, rows])


def sources(rng, lengths):
    segments = (np.arange(max(lengths)) < np.array(lengths)[:, None]).astype(np.int32)
    return make_tokens(np.where(segments, rng.integers(1, V, segments.shape), 0), segments)


@every_family
def test_the_cache_gives_what_the_whole_row_gives(family):
    """Prompts of different lengths read at once (padded on the right), then token by token; other sources' lengths."""
    model = make(family)
    rng = np.random.default_rng(3)
    B, prompt, T = 3, 4, 10
    lengths = np.array([4, 1, 3])
    ids = rng.integers(1, V, (B, T)).astype(np.int32)
    encoder = sources(rng, [6, 2, 5])
    # Rows read on from where their prompts end.
    whole = make_tokens(ids, np.ones((B, T)))
    step = jit(lambda p, tokens, cache: model.apply(p, tokens, cache=cache))
    full = jit(lambda p: jax.nn.log_softmax(model.apply(p, Seq2Seq(encoder=encoder, decoder=whole)).logits))
    for params in (random_params(model), random_params(model, seed=2)):
        wanted = np.asarray(full(params))
        segments = (np.arange(prompt) < lengths[:, None]).astype(np.int32)
        read = make_tokens(np.where(segments, ids[:, :prompt], 0), segments)
        cache = init_seq2seq_cache(model.config, B, T)
        out = step(params, Seq2Seq(encoder=encoder, decoder=read), cache)
        found = np.asarray(jax.nn.log_softmax(out.logits))
        np.testing.assert_allclose(found[segments > 0], wanted[:, :prompt][segments > 0], atol=1e-5)
        assert out.cache.lengths.tolist() == lengths.tolist()
        for i in range(T - prompt):
            at = (lengths + i)[:, None]
            one = np.ones((B, 1), np.int32)
            token = dataclasses.replace(make_tokens(np.take_along_axis(ids, at, 1), one), positions=at.astype(np.int32))
            out = step(params, Seq2Seq(encoder=None, decoder=token), out.cache)
            np.testing.assert_allclose(
                jax.nn.log_softmax(out.logits[:, 0]), np.take_along_axis(wanted, at[..., None], 1)[:, 0], atol=1e-5
            )
            assert out.encoded is None
        # Several tokens at once, after what the cache holds.
        more = dataclasses.replace(whole, segments=np.ones_like(ids))
        first, rest = (
            jax.tree.map(lambda x, part=part: x[:, part], more) for part in (slice(0, prompt), slice(prompt, T))
        )
        held = step(params, Seq2Seq(encoder=encoder, decoder=first), init_seq2seq_cache(model.config, B, T)).cache
        found = jax.nn.log_softmax(step(params, Seq2Seq(encoder=None, decoder=rest), held).logits)
        np.testing.assert_allclose(found, wanted[:, prompt:], atol=1e-5)


@every_family
def test_a_finished_row_leaves_the_cache_alone(family):
    model = make(family)
    params, rng = random_params(model), np.random.default_rng(4)
    token = make_tokens([[3], [4]], [[1], [1]])
    step = jit(lambda p, tokens, cache: model.apply(p, tokens, cache=cache))
    out = step(params, Seq2Seq(encoder=sources(rng, [4, 3]), decoder=token), init_seq2seq_cache(model.config, 2, 4))
    after = dataclasses.replace(token, positions=np.ones((2, 1), np.int32), segments=np.array([[1], [0]], np.int32))
    later = step(params, Seq2Seq(encoder=None, decoder=after), out.cache).cache
    assert later.lengths.tolist() == [2, 1]
    for old, new in zip(out.cache.layers, later.layers, strict=True):
        assert np.all(old["keys"][1] == new["keys"][1]) and np.any(old["keys"][0] != new["keys"][0])
        assert set(new) == {"keys", "values", "cross_keys", "cross_values"}


@pytest.mark.parity
@every_family
def test_greedy_text_is_that_of_transformers(family, tmp_path):
    torch = pytest.importorskip("torch", reason="parity needs torch (the 'parity' extra)")
    transformers = pytest.importorskip("transformers", reason="parity needs transformers (the 'parity' extra)")
    from jaxtrain.interop.exporting import export_params

    # (As many layers on either side: transformers' cache for T5 has the encoder's number.)
    model = make(family, num_layers=2, max_positions=32)
    # Texts that go somewhere: what changes from token to token counts more than what does not.
    factors = {"cross/out": 0.2, "bias": 0.2, "position_embed": 6, "attention/query": 6, "": 1.5}
    factors = {"": 2} if family is T5Config else factors
    params = jax.tree_util.tree_map_with_path(
        lambda path, x: x * next(factor for name, factor in factors.items() if name in path_name(path)),
        random_params(model),
    )
    export_params(model, params, tmp_path)
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    encoder, start, new = sources(np.random.default_rng(5), [7, 3, 5]), 2, 12
    options = dict(decoder_start_token_id=start, pad_token_id=0, eos_token_id=None, forced_eos_token_id=None)
    ids, mask = (torch.from_numpy(np.asarray(x)).long() for x in (encoder.ids, encoder.segments))
    with torch.no_grad():
        wanted = theirs.generate(
            input_ids=ids, attention_mask=mask, do_sample=False, num_beams=1, max_new_tokens=new, **options
        ).numpy()
    assert wanted.shape == (3, new + 1) and len(set(wanted.ravel().tolist())) > 4, "too dull a text to compare"

    step = jit(lambda p, tokens, cache: model.apply(p, tokens, cache=cache))
    cache, found = init_seq2seq_cache(model.config, 3, new), [np.full((3, 1), start, np.int32)]
    for i in range(new):
        at = np.full((3, 1), i, np.int32)
        token = dataclasses.replace(make_tokens(found[-1], np.ones((3, 1))), positions=at)
        out = step(params, Seq2Seq(encoder=encoder if i == 0 else None, decoder=token), cache)
        cache = out.cache
        found.append(np.asarray(jnp.argmax(out.logits, axis=-1), np.int32))
    assert np.concatenate(found, axis=1).tolist() == wanted.tolist()


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        (BartConfig, {"num_decoder_layers": -1}, "num_decoder_layers must be at least 1, found -1"),
        (BartConfig, {"d_model": 18}, "d_model=18 is not a multiple of num_heads=4"),
        (BartConfig, {"head_dim": -1}, "head_dim must be at least 0, found -1"),
        (BartConfig, {"activation": "tanh"}, "activation='tanh'; one of"),
        (BartConfig, {"heads": ("mlm",)}, "heads must name some of"),
        (T5Config, {"relative_buckets": 6}, "relative_buckets must be a positive multiple of 4, found 6"),
        (T5Config, {"relative_max_distance": 4}, "relative_max_distance=4 must exceed half of relative_buckets=8"),
    ],
    ids=str,
)
def test_mistakes_are_named(family, changes, message):
    with pytest.raises(ValueError, match=message):
        make(family, **changes)


def test_what_cannot_be_read_is_refused(packed):
    model = make(BartConfig)
    long = make_tokens(np.ones((1, 17)), np.ones((1, 17)))
    for tokens in (Seq2Seq(encoder=long, decoder=packed.decoder), Seq2Seq(encoder=packed.encoder, decoder=long)):
        with pytest.raises(ValueError, match="17 tokens in a row, but the model's max_positions is 16"):
            jax.eval_shape(model.apply, model.shapes(), tokens)
    with pytest.raises(ValueError, match="a cache of 17 positions is longer than the model's max_positions=16"):
        init_seq2seq_cache(model.config, 1, 17)
    alone = Seq2Seq(encoder=None, decoder=packed.decoder)
    for cache in (None, init_seq2seq_cache(model.config, 1, 9)):
        with pytest.raises(ValueError, match=r"Seq2Seq.encoder is None, and no cache holds"):
            jax.eval_shape(lambda params: model.apply(params, alone, cache=cache), model.shapes())  # noqa: B023
