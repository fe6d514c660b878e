"""Grouped products: every backend against the loop over groups, in value and gradient."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.kernels.grouped_matmul import api, blocked

BACKENDS = ("auto", "blocked", "ragged")
# Sizes of the groups, and rows beyond the last one.
CASES = {
    "even": ((8, 8, 8, 8), 0),
    "uneven": ((1, 0, 37, 2, 0, 11), 0),
    "rows-beyond": ((5, 0, 3), 9),
    "all-in-one": ((0, 150, 0), 0),
    "one-row": ((0, 1), 0),
    "nothing": ((0, 0, 0), 4),
    "blocks-of-128": ((300, 129, 128, 0, 1), 7),
}


def make(sizes, beyond, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    rows = sum(sizes) + beyond
    x = rng.normal(size=(rows, 5)).astype(np.float32)
    w = rng.normal(size=(len(sizes), 5, 7)).astype(np.float32)
    return jnp.asarray(x, dtype), jnp.asarray(w, dtype), jnp.asarray(sizes, jnp.int32)


def compute(backend, x, w, sizes):
    def total(x, w):
        y = api.grouped_matmul(x, w, sizes, backend=backend)
        return jnp.sum(jnp.sin(y.astype(jnp.float32))), y

    (_, y), grads = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(x, w)
    return jax.device_get((y, *grads))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_a_loop_over_groups(case, backend):
    arrays = make(*case)
    for found, expected in zip(compute(backend, *arrays), compute("reference", *arrays), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [8, 64, 512])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_gradients_of_matrices_by_blocks_of_a_given_size(case, rows):
    """What TPUs take where their compiler has no kernel."""
    x, _, sizes = make(*case)
    y = jnp.asarray(np.random.default_rng(1).normal(size=(len(x), 7)), jnp.float32).at[int(sum(sizes)) :].set(np.nan)
    owner = np.repeat(np.arange(len(sizes)), np.array(sizes))
    expected = np.zeros((len(sizes), 5, 7))
    for group, a, b in zip(owner, np.array(x), np.array(y), strict=False):
        expected[group] += np.outer(a, b)
    found = jax.jit(blocked.outer_product, static_argnames="rows")(x, y, sizes, rows=rows)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_the_reference_is_what_numpy_says():
    x, w, sizes = make((3, 0, 4), 2)
    owner = np.repeat(np.arange(3), np.array(sizes))
    expected = np.concatenate([np.stack([a @ w[e] for a, e in zip(x, owner)]), np.zeros((2, 7))])
    np.testing.assert_allclose(compute("reference", x, w, sizes)[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_beyond_the_groups_have_no_say(backend):
    """Not even as NaN: a router that left them out must not be able to spoil a gradient."""
    x, w, sizes = make((5, 2), 6)
    spoilt = compute(backend, x.at[7:].set(np.nan), w, sizes)
    for found, expected in zip(spoilt, compute(backend, x, w, sizes), strict=True):
        np.testing.assert_array_equal(found, expected)
    assert not np.any(spoilt[0][7:]) and not np.any(spoilt[1][7:]) and np.all(np.any(spoilt[0][:7], axis=1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_is_summed_in_float32(backend):
    arrays = make((40, 3, 90), 0, dtype=jnp.bfloat16)
    for found, expected in zip(compute(backend, *arrays), compute("reference", *arrays), strict=True):
        assert found.dtype == jnp.bfloat16
        np.testing.assert_allclose(found.astype(np.float32), expected.astype(np.float32), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(("rows", "groups"), [(8, 64), (64, 4), (1000, 8), (4096, 64), (9000, 8)])
def test_blocks_cover_every_row_once(rows, groups):
    size = blocked.block_rows(rows, groups)
    assert 8 <= size <= 128 and size & (size - 1) == 0
    rng = np.random.default_rng(rows)
    for sizes in (np.bincount(rng.integers(0, groups, rows), minlength=groups), np.eye(groups, dtype=int)[0] * rows):
        blocks = jax.device_get(blocked.cut(jnp.asarray(sizes, jnp.int32), rows, size))
        count, owner = int(blocks.count), np.repeat(np.arange(groups), sizes)
        assert count <= len(blocks.group)
        covered = [np.arange(a, min(a + size, b)) for a, b in zip(blocks.start[:count], blocks.stop[:count])]
        np.testing.assert_array_equal(np.concatenate(covered), np.arange(rows))
        for rows_of, group in zip(covered, blocks.group[:count]):
            assert set(owner[rows_of]) == {group}


def test_refuses_what_does_not_fit():
    x, w, sizes = make((2, 2), 0)
    with pytest.raises(ValueError, match="unknown"):
        api.grouped_matmul(x, w, sizes, backend="megablox")
    with pytest.raises(ValueError, match="do not fit"):
        api.grouped_matmul(x, w, sizes[:1])
    with pytest.raises(ValueError, match="do not fit"):
        api.grouped_matmul(x[:, :3], w, sizes)
