"""The cache: which slot holds what, and that reading a text in parts gives what reading it at once gives."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.models import DecoderConfig, init_cache
from jaxtrain.models.cache import Cache, cache_bytes, insert, slot_positions, write
from jaxtrain.models.decoder import build_decoder, unstack
from jaxtrain.models.decoder_config import DecoderSpec
from jaxtrain.models.layers import MLPSpec
from jaxtrain.models.rope import Rope
from jaxtrain.types import Tokens

V = 23
# It is compiling that takes time.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixedConfig(DecoderConfig):
    """Layers of any windows; those with one have a Rope of their own, as in Gemma 3."""

    windows: tuple[int, ...]

    @functools.cache  # noqa: B019
    def spec(self) -> DecoderSpec:
        def layer(window: int):
            rope = Rope(theta=30.0) if window else self.rope
            return dataclasses.replace(
                self.layer_spec(), attention=self.attention_spec(window=window, rope=rope), mlp=MLPSpec(d_ff=self.d_ff)
            )

        return DecoderSpec(stacks={"layers": tuple(map(layer, self.windows))}, norm=self.norm())


def mixed(windows, **changes):
    sizes = dict(vocab_size=V, d_model=16, num_heads=4, num_kv_heads=2, d_ff=24, max_positions=32)
    return build_decoder(MixedConfig(**sizes | {"num_layers": len(windows), "windows": windows} | changes))


def random_params(model, seed=1):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype), model.shapes())


def make_tokens(ids, segments, starts=0):
    """Rows of one segment; ``starts`` is the position of each row's first token."""
    segments = np.asarray(segments, np.int32)
    positions = (np.cumsum(segments, axis=1) - 1 + np.reshape(starts, (-1, 1))) * segments
    ids = np.where(segments, ids, 0).astype(np.int32)
    positions, weights = positions.astype(np.int32), segments.astype(np.float32)
    return Tokens(ids=ids, targets=ids, weights=weights, positions=positions, segments=segments)


class Ring:
    """What the slots of one row hold, token by token."""

    def __init__(self, slots):
        self.slots = [None] * slots
        self.read = 0

    def put(self, token):
        self.slots[self.read % len(self.slots)] = token
        self.read += 1


@pytest.mark.parametrize("slots", [1, 3, 8])
def test_slots_hold_the_last_tokens(slots):
    for length in range(2 * slots + 2):
        ring = Ring(slots)
        for position in range(length):
            ring.put(position)
        found = np.asarray(slot_positions(jnp.array([length]), slots))[0]
        assert [None if p < 0 else p for p in found.tolist()] == ring.slots


@pytest.mark.parametrize("slots", [3, 5, 16])
@pytest.mark.parametrize("side", ["left", "right"])
def test_writing_is_putting_token_by_token(slots, side):
    """Rows of different lengths, padded on one side, several times in a row, more tokens at once than slots."""
    rng = np.random.default_rng(0)
    B, T = 4, 7
    rings = [Ring(slots) for _ in range(B)]
    array = jnp.zeros((B, 2, slots, 1))
    for _ in range(4):
        counts = rng.integers(0, T + 1, B)
        segments = np.arange(T) < counts[:, None] if side == "right" else np.arange(T) >= T - counts[:, None]
        tokens = make_tokens(np.zeros((B, T)), segments, starts=[ring.read for ring in rings])
        new = rng.normal(size=(B, 2, T, 1))
        array = write(array, jnp.asarray(new), tokens.positions, tokens.segments)
        for b in range(B):
            for t in np.flatnonzero(segments[b]):
                rings[b].put(new[b, :, t, 0])
    wanted = [[np.zeros(2) if held is None else held for held in ring.slots] for ring in rings]
    np.testing.assert_allclose(array[..., 0].swapaxes(1, 2), np.array(wanted), rtol=1e-6)


@pytest.mark.parametrize("slots", [2, 5, 16])
def test_inserting_prompts_is_writing_them(slots):
    """Into some rows, in another order; a row past the end is dropped; what a row held before is gone."""
    rng = np.random.default_rng(1)
    P, lengths = 6, np.array([6, 1, 4, 3], np.int32)
    fresh = rng.normal(size=(4, 2, P, 3)).astype(np.float32)
    old = jnp.asarray(rng.normal(size=(5, 2, slots, 3)), jnp.float32)
    rows = jnp.array([3, 0, 7, 4])
    cache = insert(
        Cache(layers=({"keys": old},), lengths=jnp.full((5,), 9, jnp.int32)),
        rows,
        Cache(layers=({"keys": jnp.asarray(fresh)},), lengths=jnp.asarray(lengths)),
    )
    assert cache.lengths.tolist() == [1, 9, 9, 6, 3]
    found = np.asarray(cache.layers[0]["keys"])
    np.testing.assert_array_equal(found[1:3], old[1:3])
    for number, row in ((0, 3), (1, 0), (3, 4)):
        for slot, position in enumerate(
            np.asarray(slot_positions(jnp.asarray(lengths[number : number + 1]), slots))[0]
        ):
            if position >= 0:
                np.testing.assert_array_equal(found[row, :, slot], fresh[number, :, position])


def test_a_window_bounds_the_slots():
    model = mixed((3, 0, 3))
    shapes = [layer["keys"].shape for layer in init_cache(model.config, 2, 20).layers]
    assert shapes == [(2, 2, 3, 4), (2, 2, 20, 4), (2, 2, 3, 4)]
    assert [layer["keys"].shape[2] for layer in init_cache(model.config, 2, 2).layers] == [2, 2, 2]
    assert cache_bytes(init_cache(model.config, 2, 20).layers) == 2 * 4 * 2 * 2 * 4 * (3 + 20 + 3)
    assert cache_bytes(init_cache(model.config, 2, 20, jnp.bfloat16).layers) == 2 * 2 * 2 * 2 * 4 * (3 + 20 + 3)


@pytest.mark.parametrize("windows", [(0, 0), (3, 0, 5)], ids=str)
def test_a_text_read_in_parts_is_the_text(windows):
    """Parts of any size, ragged and padded on either side; a row that stops early keeps what it has."""
    model = mixed(windows)
    params = random_params(model)
    rng = np.random.default_rng(5)
    B, T = 3, 14
    ids = rng.integers(1, V, (B, T))
    whole = jit(model.apply)(params, make_tokens(ids, np.ones((B, T)))).logits
    step = jit(lambda params, tokens, cache: model.apply(params, tokens, cache=cache))
    cache, read = init_cache(model.config, B, T), np.zeros(B, int)
    for width, side in ((5, "right"), (1, "right"), (5, "left"), (1, "right"), (5, "right"), (5, "left"), (1, "left")):
        counts = np.minimum(rng.integers(0, width + 1, B), np.array([T, T, 4]) - read)
        counts = np.maximum(counts, 0)
        columns = np.arange(width)
        segments = columns < counts[:, None] if side == "right" else columns >= width - counts[:, None]
        part = np.zeros((B, width), int)
        for b in range(B):
            part[b, segments[b]] = ids[b, read[b] : read[b] + counts[b]]
        out = step(params, make_tokens(part, segments, starts=read), cache)
        for b in range(B):
            np.testing.assert_allclose(out.logits[b, segments[b]], whole[b, read[b] : read[b] + counts[b]], atol=1e-5)
        cache, read = out.cache, read + counts
        assert cache.lengths.tolist() == read.tolist()
    assert read[:2].min() > 8 and read[2] == 4


@pytest.mark.parametrize(
    ("windows", "remat", "dropout"),
    [
        ((2, 0) * 2, "none", 0.0),
        ((2, 0) * 2 + (2,), "full", 0.3),
        ((2, 3, 0) * 2 + (2,), "none", 0.3),
        ((0, 2), "full", 0),
    ],
    ids=str,
)
def test_scanned_layers_are_layers_in_line(windows, remat, dropout):
    """Values, gradients and dropout do not depend on how a stack of mixed layers is run."""
    model = mixed(windows, remat=remat, dropout=dropout)
    params = random_params(model)
    rng = np.random.default_rng(2)
    tokens = make_tokens(rng.integers(1, V, (2, 7)), np.arange(7) < np.array([[7], [5]]))
    key = jax.random.key(3) if dropout else None

    def run(params):
        return jnp.sum(jnp.sin(model.apply(params, tokens, rng=key).logits))

    value, grads = jit(jax.value_and_grad(run))(params)
    wanted, wanted_grads = jit(jax.value_and_grad(lambda params: run(unstack(model.config, params))))(params)
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), grads, wanted_grads)


def test_every_layer_has_its_own_window():
    """Moving any one of them, with everything else as it was, moves the result."""
    windows = (2, 3, 2, 3, 2)
    params = random_params(mixed(windows))
    tokens = make_tokens(np.random.default_rng(2).integers(1, V, (1, 7)), np.ones((1, 7)))
    logits = jit(mixed(windows).apply)(params, tokens).logits
    for number in (1, 4):
        moved = tuple(4 if i == number else window for i, window in enumerate(windows))
        assert np.abs(jit(mixed(moved).apply)(params, tokens).logits - logits).max() > 1e-4, number


def test_the_cache_takes_unstacked_layers():
    model = mixed((3, 0, 3))
    params = random_params(model)
    tokens = make_tokens(np.random.default_rng(0).integers(1, V, (2, 6)), np.ones((2, 6)))
    step = jit(lambda params: model.apply(params, tokens, cache=init_cache(model.config, 2, 8)))
    found, wanted = step(unstack(model.config, params)), step(params)
    np.testing.assert_allclose(found.logits, wanted.logits, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found.cache, wanted.cache)
