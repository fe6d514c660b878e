"""The constructors of rules: each against the product it stands for, and each the inverse of itself."""

from __future__ import annotations

import numpy as np
import pytest

from jaxtrain.interop.weights import (
    conv1d,
    fused,
    fused_vector,
    half_split_order,
    linear,
    rotary,
    table,
    vector,
)

D, N, H, F = 6, 2, 4, 10
RNG = np.random.default_rng(0)
RULES = {
    "vector": (vector("t", "o"), [(N, H)], [(N * H,)]),
    "table": (table("t", "o"), [(F, D)], [(F, D)]),
    "linear": (linear("t", "o"), [(D, N, H)], [(N * H, D)]),
    "linear of two inputs": (linear("t", "o", inputs=2), [(N, H, D)], [(D, N * H)]),
    "conv1d": (conv1d("t", "o"), [(D, N, H)], [(D, N * H)]),
    "conv1d of two inputs": (conv1d("t", "o", inputs=2), [(N, H, D)], [(N * H, D)]),
    "fused": (fused("t", ("a", "b"), (N * H, F)), [(D, N, H), (D, F)], [(N * H + F, D)]),
    "fused conv1d": (fused("t", ("a", "b"), (N * H, F), transposed=False), [(D, N, H), (D, F)], [(D, N * H + F)]),
    "fused vector": (fused_vector("t", ("a", "b"), (N * H, F)), [(N, H), (F,)], [(N * H + F,)]),
    "rotary": (rotary(linear("t", "o")), [(D, N, H)], [(N * H, D)]),
    "rotary in part": (rotary(linear("t", "o"), rotary_dim=2, start=1), [(D, N, H)], [(N * H, D)]),
    "rotary fused": (rotary(fused("t", ("a", "b"), (N * H, F)), which=(1,)), [(D, N, H), (D, F)], [(N * H + F, D)]),
}


@pytest.mark.parametrize("name", RULES)
def test_a_rule_is_its_own_inverse(name):
    rule, ours, theirs = RULES[name]
    tensors = [RNG.normal(size=shape) for shape in theirs]
    arrays = rule.to_ours(tensors, ours)
    assert [array.shape for array in arrays] == ours
    back = rule.to_theirs(arrays)
    assert [array.shape for array in back] == theirs
    for found, tensor in zip(back, tensors, strict=True):
        np.testing.assert_array_equal(found, tensor)


def test_linear_is_torchs_product():
    x, weight = RNG.normal(size=(3, D)), RNG.normal(size=(N * H, D))
    (kernel,) = linear("t", "o").to_ours([weight], [(D, N, H)])
    np.testing.assert_allclose(np.einsum("bd,dnh->bnh", x, kernel).reshape(3, -1), x @ weight.T)
    y, weight = RNG.normal(size=(3, N, H)), RNG.normal(size=(D, N * H))
    (kernel,) = linear("t", "o", inputs=2).to_ours([weight], [(N, H, D)])
    np.testing.assert_allclose(np.einsum("bnh,nhd->bd", y, kernel), y.reshape(3, -1) @ weight.T)


def test_fused_parts_are_the_columns_of_the_product():
    x, weight, bias = RNG.normal(size=(3, D)), RNG.normal(size=(N * H + F, D)), RNG.normal(size=(N * H + F,))
    first, second = fused("t", ("a", "b"), (N * H, F)).to_ours([weight], [(D, N, H), (D, F)])
    first_bias, second_bias = fused_vector("t", ("a", "b"), (N * H, F)).to_ours([bias], [(N, H), (F,)])
    whole = x @ weight.T + bias
    np.testing.assert_allclose(np.einsum("bd,dnh->bnh", x, first) + first_bias, whole[:, : N * H].reshape(3, N, H))
    np.testing.assert_allclose(x @ second + second_bias, whole[:, N * H :])


def turned(x, pairs, angles):
    """``x`` with each pair of entries turned by its angle."""
    x = x.copy()
    for (i, j), angle in zip(pairs, angles, strict=True):
        a, b = x[..., i].copy(), x[..., j].copy()
        x[..., i], x[..., j] = a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)
    return x


@pytest.mark.parametrize(("size", "rotary_dim", "start"), [(8, 0, 0), (8, 4, 0), (8, 4, 4), (10, 6, 2)])
def test_rotary_makes_neighbouring_pairs_half_split_ones(size, rotary_dim, start):
    """Scores of turned queries and keys are the same, whichever entries make a pair."""
    R = rotary_dim or size
    angles = RNG.normal(size=R // 2)
    q, k = RNG.normal(size=(2, 5, size))
    near = [(start + 2 * i, start + 2 * i + 1) for i in range(R // 2)]
    split = [(start + i, start + i + R // 2) for i in range(R // 2)]
    wanted = turned(q, near, angles) @ turned(k, near, 2 * angles).T
    order = half_split_order(size, rotary_dim, start)
    found = turned(q[..., order], split, angles) @ turned(k[..., order], split, 2 * angles).T
    np.testing.assert_allclose(found, wanted)


def test_slices_name_every_layer_and_expert():
    rule = linear("l.{layer}.e.{expert}", "o", layers=2, first_layer=3, experts=2)
    assert rule.stacked == (2, 2)
    assert list(rule.slices()) == [
        ((0, 0), ("l.3.e.0",)),
        ((0, 1), ("l.3.e.1",)),
        ((1, 0), ("l.4.e.0",)),
        ((1, 1), ("l.4.e.1",)),
    ]
    assert list(linear("t", "o").slices()) == [((), ("t",))]
    assert list(linear("e.{expert}", "o", experts=1).slices()) == [((0,), ("e.0",))]


def test_a_name_and_its_count_go_together():
    for where in ({}, {"layers": 2, "experts": 2}):
        with pytest.raises(AssertionError, match="do not go together"):
            linear("l.{layer}", "o", **where)
