"""The reference attention against a loop written from its definition, in float64."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.kernels.attention import api
from jaxtrain.kernels.attention.masks import make_marks, visible


def by_hand(
    q, k, v, q_positions, k_positions, q_segments, k_segments, *, scale, causal=True, window=0, softcap=0.0, bias=None
):
    """One query at a time, float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    B, T, N, _ = q.shape
    group = N // k.shape[2]
    out = np.zeros((B, T, N, v.shape[-1]))
    for b in range(B):
        for t in range(T):
            seen = (k_segments[b] == q_segments[b, t]) & (k_segments[b] > 0)
            if causal:
                seen &= k_positions[b] <= q_positions[b, t]
            if window:
                seen &= np.abs(k_positions[b] - q_positions[b, t]) < window
            for n in range(N if seen.any() else 0):
                logits = scale * (k[b, seen, n // group] @ q[b, t, n])
                if softcap:
                    logits = softcap * np.tanh(logits / softcap)
                if bias is not None:
                    logits = logits + bias[n, t, seen]
                weights = np.exp(logits - logits.max())
                out[b, t, n] = weights / weights.sum() @ v[b, seen, n // group]
    return out


def visible_mask(masks, window=0):
    return visible(make_marks(*masks.values(), causal=True, window=window)[0])


@dataclasses.dataclass(frozen=True)
class Case:
    T: int
    S: int
    N: int = 4
    K: int = 2
    H: int = 6
    V: int = 6
    causal: bool = True
    scale: float | None = None
    window: int = 0
    softcap: float = 0.0
    bias: bool = False

    def options(self):
        """Keyword arguments of the attention, less the scale."""
        found = {"causal": self.causal, "window": self.window, "softcap": self.softcap}
        bias = np.random.default_rng(2).normal(size=(self.N, self.T, self.S)).astype(np.float32)
        return found | ({"bias": bias} if self.bias else {})


CASES = {
    "odd": Case(T=7, S=7),
    "one-token": Case(T=1, S=1),
    "multi-query": Case(T=5, S=5, N=3, K=1),
    "no-groups": Case(T=9, S=9, N=3, K=3, H=2),
    "decode": Case(T=1, S=13),
    "chunk": Case(T=3, S=11),
    "bidirectional": Case(T=6, S=6, causal=False),
    "own-scale": Case(T=6, S=6, scale=0.3),
    "narrow-values": Case(T=7, S=7, V=2),
    "wide-values": Case(T=3, S=9, V=10),
    "window": Case(T=9, S=9, window=3),
    "window-of-one": Case(T=5, S=5, window=1),
    "window-bidirectional": Case(T=9, S=9, window=2, causal=False),
    "window-decode": Case(T=1, S=13, window=4),
    "softcap": Case(T=7, S=7, softcap=0.7, scale=1.0),
    "bias": Case(T=7, S=7, bias=True),
    "everything": Case(T=5, S=8, V=4, window=4, softcap=1.5, bias=True, scale=0.8, causal=False),
}


def inputs(case, seed=0):
    """Rows with two segments and padding at both ends, so that some queries see nothing."""
    rng = np.random.default_rng(seed)
    B = 3
    q, k, v = (rng.normal(size=(B, *size)).astype(np.float32) for size in
               ((case.T, case.N, case.H), (case.S, case.K, case.H), (case.S, case.K, case.V)))  # fmt: skip
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
    out = api.attention(*arrays, **masks, **case.options(), scale=case.scale)
    scale = case.H**-0.5 if case.scale is None else case.scale
    expected = by_hand(*arrays, **masks, **case.options(), scale=scale)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["odd", "everything"])
def test_gradients_match_differences_of_the_definition(name):
    case = CASES[name]
    arrays, masks = inputs(case)
    options = case.options()
    arrays = [*arrays, options.pop("bias", np.zeros((case.N, case.T, case.S), np.float32))]
    scale = case.H**-0.5 if case.scale is None else case.scale
    rng = np.random.default_rng(1)
    weights = rng.normal(size=(*arrays[0].shape[:-1], case.V))

    def mine(arrays):
        return jnp.sum(weights * api.attention(*arrays[:3], **masks, **options, bias=arrays[3], scale=scale))

    def total(arrays):
        return np.sum(weights * by_hand(*arrays[:3], **masks, **options, bias=arrays[3], scale=scale))

    grads = jax.grad(mine)(arrays)
    for which in range(4):
        direction = rng.normal(size=arrays[which].shape)
        shifted = [
            total([x + (sign * 1e-5 * direction if i == which else 0) for i, x in enumerate(arrays)])
            for sign in (1, -1)
        ]
        difference = (shifted[0] - shifted[1]) / 2e-5
        assert np.sum(grads[which] * direction) == pytest.approx(difference, rel=1e-4)


@pytest.mark.parametrize("name", ["decode", "window-decode", "decode-capped", "few"])
def test_few_queries_over_a_cache_are_attention(name):
    shapes = {"decode-capped": Case(T=1, S=9, V=4, softcap=0.9, scale=0.7), "few": Case(T=5, S=9, V=4, softcap=0.9)}
    case = shapes.get(name) or CASES[name]
    (q, k, v), masks = inputs(case)
    masks["q_segments"][1] = 0
    visible = visible_mask(masks, window=case.window)
    assert not visible[1].any() and visible.any()
    kinds = dict(scale=case.scale, softcap=case.softcap)
    found = api.decode_attention(q, k.swapaxes(1, 2), v.swapaxes(1, 2), visible, **kinds)
    wanted = api.attention(q, k, v, **masks, **kinds, window=case.window)
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    assert np.all(np.asarray(found[1]) == 0)


@pytest.mark.smoke
def test_a_row_that_sees_nothing_is_zero_and_gives_no_gradient():
    (q, k, v), masks = inputs(CASES["odd"])
    masks["q_segments"] = np.where(np.arange(7) < 3, 0, masks["q_segments"])
    blind = ~np.any(visible_mask(masks), axis=-1)
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
        ((q, k, v), {"bias": np.zeros((4, 7, 6))}, r"bias has shape \(4, 7, 6\), expected \(4, 7, 7\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            api.attention(*arguments, **masks | changes)


@pytest.mark.parametrize(("length", "window"), [(128, 0), (256, 0), (256, 50), (512, 0)])
def test_blocks_of_an_ordered_sequence_change_nothing(length, window):
    """Packed rows with padding on either side: value and gradient equal those of the whole matrix."""
    rng = np.random.default_rng(length)
    B, N, K, H = 2, 4, 2, 8
    q, k, v, g = (rng.normal(size=(B, length, heads, H)).astype(np.float32) for heads in (N, K, K, N))
    segments = np.sort(rng.integers(1, 6, (B, length)), axis=1).astype(np.int32)
    segments[0, -length // 5 :], segments[1, : length // 5] = 0, 0
    starts = np.array([[np.argmax(row == s) for s in row] for row in segments])
    positions = (np.arange(length) - starts).astype(np.int32)
    bias = rng.normal(size=(N, length, length)).astype(np.float32) if window else None

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
                window=window,
                bias=bias,
                softcap=2.0 if window else 0.0,
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
