"""A bias of each row's own, and the bias of cached decoding."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from jaxtrain.kernels.attention import api

B, T, S, N, K, H = 2, 3, 5, 4, 2, 6


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    shapes = {"q": (B, T, N, H), "k": (B, S, K, H), "v": (B, S, K, H), "bias": (B, N, T, S)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def attend(arrays, bias, rows=slice(None)):
    q, k, v = (arrays[name][rows] for name in "qkv")
    count = q.shape[0]
    at = {"q": np.ones((count, T), np.int32), "k": np.ones((count, S), np.int32)}
    places = {f"{side}_{what}": at[side] for side in at for what in ("positions", "segments")}
    return api.attention(q, k, v, **places, causal=False, bias=bias)


def test_a_bias_of_each_row(arrays):
    found = attend(arrays, arrays["bias"])
    for row in range(B):
        alone = attend(arrays, arrays["bias"][row], slice(row, row + 1))
        np.testing.assert_allclose(found[row], alone[0], atol=1e-6)
    # By the definition, for one query.
    logits = arrays["q"][1, 2, 3] @ arrays["k"][1, :, 3 // 2].T * H**-0.5 + arrays["bias"][1, 3, 2]
    np.testing.assert_allclose(found[1, 2, 3], jax.nn.softmax(logits) @ arrays["v"][1, :, 3 // 2], atol=1e-5)
    with pytest.raises(ValueError, match=r"bias has shape \(1, 4, 3, 5\), expected \(2, 4, 3, 5\)"):
        attend(arrays, arrays["bias"][:1])


def test_the_bias_of_decoding(arrays):
    visible = np.array([[True, True, False, True, True], [True, False, True, True, True]])
    k, v = (arrays[name].transpose(0, 2, 1, 3) for name in "kv")
    some = slice(1, 2)
    bias = arrays["bias"][:, :, some]
    found = api.decode_attention(arrays["q"][:, some], k, v, visible[:, None], bias=bias, scale=0.3)[:, 0]
    for row in range(B):
        for head in range(N):
            logits = 0.3 * arrays["q"][row, 1, head] @ k[row, head // 2].T + arrays["bias"][row, head, 1]
            weights = jax.nn.softmax(np.where(visible[row], logits, -np.inf))
            np.testing.assert_allclose(found[row, head], weights @ v[row, head // 2], atol=1e-5)
