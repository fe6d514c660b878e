"""The reference attention against a loop written from its definition, in float64."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.kernels.attention import api, reference


def by_hand(q, k, v, q_positions, k_positions, q_segments, k_segments, *, causal, scale):
    """One query at a time, float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    B, T, N, _ = q.shape
    group = N // k.shape[2]
    out = np.zeros(q.shape)
    for b in range(B):
        for t in range(T):
            seen = (k_segments[b] == q_segments[b, t]) & (k_segments[b] > 0)
            if causal:
                seen &= k_positions[b] <= q_positions[b, t]
            for n in range(N if seen.any() else 0):
                logits = scale * (k[b, seen, n // group] @ q[b, t, n])
                weights = np.exp(logits - logits.max())
                out[b, t, n] = weights / weights.sum() @ v[b, seen, n // group]
    return out


@dataclasses.dataclass(frozen=True)
class Case:
    T: int
    S: int
    N: int = 4
    K: int = 2
    H: int = 6
    causal: bool = True
    scale: float | None = None


CASES = {
    "odd": Case(T=7, S=7),
    "one-token": Case(T=1, S=1),
    "multi-query": Case(T=5, S=5, N=3, K=1),
    "no-groups": Case(T=9, S=9, N=3, K=3, H=2),
    "decode": Case(T=1, S=13),
    "chunk": Case(T=3, S=11),
    "bidirectional": Case(T=6, S=6, causal=False),
    "own-scale": Case(T=6, S=6, scale=0.3),
}


def inputs(case, seed=0):
    """Rows with two segments and padding at both ends, so that some queries see nothing."""
    rng = np.random.default_rng(seed)
    B = 3
    q, k, v = (rng.normal(size=(B, n, h, case.H)).astype(np.float32) for n, h in
               ((case.T, case.N), (case.S, case.K), (case.S, case.K)))  # fmt: skip
    k_segments = np.array([np.sort(rng.integers(0, 3, case.S)) for _ in range(B)], np.int32)
    k_segments[0] = 1
    k_positions = np.zeros((B, case.S), np.int32)
    for b in range(B):
        for segment in (1, 2):
            where = k_segments[b] == segment
            k_positions[b, where] = np.arange(where.sum())
    q_segments, q_positions = k_segments[:, case.S - case.T :], k_positions[:, case.S - case.T :]
    if case.T > 1:
        q_segments = q_segments.copy()
        q_segments[1, 0], q_segments[2, -1] = 0, 7  # padding, and a segment that no key has
    return (q, k, v), {
        "q_positions": q_positions,
        "k_positions": k_positions,
        "q_segments": q_segments,
        "k_segments": k_segments,
    }


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_matches_the_definition(case):
    arrays, masks = inputs(case)
    out = api.attention(*arrays, **masks, causal=case.causal, scale=case.scale)
    scale = case.H**-0.5 if case.scale is None else case.scale
    expected = by_hand(*arrays, **masks, causal=case.causal, scale=scale)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)


def test_gradients_match_differences_of_the_definition():
    case = CASES["odd"]
    arrays, masks = inputs(case)
    rng = np.random.default_rng(1)
    weights = rng.normal(size=arrays[0].shape)
    grads = jax.grad(lambda qkv: jnp.sum(weights * api.attention(*qkv, **masks)))(arrays)

    def total(qkv):
        return np.sum(weights * by_hand(*qkv, **masks, causal=True, scale=case.H**-0.5))

    for which in range(3):
        direction = rng.normal(size=arrays[which].shape)
        shifted = [
            total([x + (sign * 1e-5 * direction if i == which else 0) for i, x in enumerate(arrays)])
            for sign in (1, -1)
        ]
        difference = (shifted[0] - shifted[1]) / 2e-5
        assert np.sum(grads[which] * direction) == pytest.approx(difference, rel=1e-4)


@pytest.mark.smoke
def test_a_row_that_sees_nothing_is_zero_and_gives_no_gradient():
    (q, k, v), masks = inputs(CASES["odd"])
    masks["q_segments"] = np.where(np.arange(7) < 3, 0, masks["q_segments"])
    blind = ~np.any(reference.attention_mask(*masks.values(), causal=True), axis=-1)
    assert blind[:, :3].all() and not blind.all()

    def blind_sum(qkv):
        out = api.attention(*qkv, **masks)
        return jnp.sum(jnp.where(blind[:, :, None, None], out, 0.0)), out

    grads, out = jax.grad(blind_sum, has_aux=True)((q, k, v))
    assert np.all(np.asarray(out)[blind] == 0)
    assert all(np.all(np.asarray(grad) == 0) for grad in grads)
    whole = jax.grad(lambda qkv: jnp.sum(api.attention(*qkv, **masks) ** 2))((q, k, v))
    assert all(np.all(np.isfinite(grad)) for grad in whole)
    assert np.all(np.asarray(whole[0])[blind] == 0)


def test_what_is_masked_may_hold_anything_finite():
    (q, k, v), masks = inputs(CASES["odd"])
    hidden = masks["k_segments"] == 0
    out = api.attention(q, k, v, **masks)
    k, v = (np.where(hidden[:, :, None, None], np.float32(1e6), x) for x in (k, v))
    np.testing.assert_array_equal(api.attention(q, k, v, **masks), out)


def test_bfloat16_keeps_its_type_and_softmax_its_precision():
    arrays, masks = inputs(CASES["odd"])
    low = [jnp.asarray(x, jnp.bfloat16) for x in arrays]
    out = api.attention(*low, **masks)
    assert out.dtype == jnp.bfloat16
    expected = by_hand(*[np.asarray(x, np.float32) for x in low], **masks, causal=True, scale=6**-0.5)
    np.testing.assert_allclose(np.asarray(out, np.float32), expected, atol=2e-2)


def test_shapes_that_do_not_fit_are_named():
    (q, k, v), masks = inputs(CASES["odd"])
    for arguments, changes, message in [
        ((q, k, v), {"backend": "flash"}, "attention backend 'flash' is unknown"),
        ((q, k[:, :, :1], v), {}, r"q \(3, 7, 4, 6\), k \(3, 7, 1, 6\) and v \(3, 7, 2, 6\) do not fit"),
        ((q[:, :, :3], k, v), {}, "N a multiple of K"),
        (
            (q, k, v),
            {"k_segments": masks["k_segments"][:, :3]},
            r"k_segments has shape \(3, 3\), expected \(3, 7\)",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            api.attention(*arguments, **masks | changes)


@pytest.mark.parametrize("length", [128, 256, 512])
def test_blocks_of_an_ordered_sequence_change_nothing(length):
    """Packed rows with padding on either side: value and gradient equal those of the whole matrix."""
    rng = np.random.default_rng(length)
    B, N, K, H = 2, 4, 2, 8
    q, k, v, g = (rng.normal(size=(B, length, heads, H)).astype(np.float32) for heads in (N, K, K, N))
    segments = np.sort(rng.integers(1, 6, (B, length)), axis=1).astype(np.int32)
    segments[0, -length // 5 :], segments[1, : length // 5] = 0, 0
    starts = np.array([[np.argmax(row == s) for s in row] for row in segments])
    positions = (np.arange(length) - starts).astype(np.int32)

    def run(in_order):
        def loss(q, k, v):
            out = api.attention(
                q,
                k,
                v,
                q_positions=positions,
                k_positions=positions,
                q_segments=segments,
                k_segments=segments,
                in_order=in_order,
            )
            return jnp.sum(out * g), out

        grads, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)
        return out, *grads

    assert api._causal_blocks(length) == length // 64
    for found, wanted in zip(run(True), run(False), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5)
        assert np.isfinite(found).all()


def test_lengths_that_do_not_cut_evenly_stay_whole():
    assert [api._causal_blocks(n) for n in (1, 64, 96, 127, 130, 192)] == [1, 1, 1, 1, 2, 2]
