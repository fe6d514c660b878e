"""The GPU kernels, interpreted on a CPU, against the reference; and lowered for GPUs that this machine does not have.

What this leaves out is speed, and that the hardware computes what the interpreter does: the last test runs the kernels
wherever there is a GPU.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.kernels.attention import gpu, reference
from jaxtrain.kernels.attention.flash import flash, for_backward
from jaxtrain.kernels.attention.masks import Marks, Spec, make_marks, visible
from jaxtrain.kernels.attention.ranges import key_ranges, pad_marks, query_ranges

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "attention_gpu.py"


class Small:
    """The backend with small blocks, all sides different somewhere."""

    tiles = gpu.Tiles(forward=gpu.Tile(32, 16, 4), dq=gpu.Tile(16, 32, 4), dkv=gpu.Tile(16, 32, 4))
    forward = staticmethod(partial(gpu.forward, tiles=tiles))
    backward = staticmethod(partial(gpu.backward, tiles=tiles))


@dataclasses.dataclass(frozen=True)
class Case:
    mask: str
    size: tuple[int, int]
    length: tuple[int, int]
    heads: tuple[int, int]
    segments: str
    softcap: float
    scale: float | None = None


# Every value of every option, each beside several of every other: the periods have no common divisor but 2.
MASKS = ("causal", "bidirectional", "window", "prefix", "window of both sides")
SIZES = ((64, 64), (80, 80), (96, 64), (128, 128), (256, 256), (24, 40))
LENGTHS = ((64, 64), (50, 50), (33, 70), (70, 33))
HEADS = ((2, 2), (4, 2), (3, 1))
CASES = [
    Case(
        mask=MASKS[i % 5],
        size=SIZES[i % 6],
        length=LENGTHS[i % 4],
        heads=HEADS[i % 3],
        segments=("packed", "one", "shuffled")[(i // 2) % 3],
        softcap=(0.0, 1.5)[(i // 3) % 2],
        scale=0.3 if i == 5 else None,
    )
    for i in range(12)
]


def make(case: Case, dtype=jnp.float32, seed: int = 0):
    """q, k, v, the spec and the marks, with padding and with queries that see nothing."""
    rng = np.random.default_rng(seed)
    (T, S), (N, K), (H, V), B = case.length, case.heads, case.size, 2
    q, k, v = (jnp.asarray(rng.normal(size=s), dtype) for s in ((B, N, T, H), (B, K, S, H), (B, K, S, V)))
    length = max(T, S)
    segments = np.sort(rng.integers(1, 4, (B, length)), axis=1)
    if case.segments == "one":
        segments[:] = 1
    if case.segments == "shuffled":
        segments = rng.permuted(segments, axis=1)
    segments[0, -length // 5 :] = 0
    segments[1, 3] = 9  # alone with itself, and in the middle of another
    positions = np.zeros_like(segments)
    for row in range(B):
        for segment in np.unique(segments[row]):
            where = segments[row] == segment
            positions[row, where] = np.arange(where.sum())
    segments, positions = segments.astype(np.int32), positions.astype(np.int32)
    marks, low, high = make_marks(
        *(jnp.asarray(x) for x in (positions[:, length - T :], positions[:, length - S :])),
        *(jnp.asarray(x) for x in (segments[:, length - T :], segments[:, length - S :])),
        causal=case.mask in ("causal", "window", "prefix"),
        window=11 if "window" in case.mask else 0,
        q_prefix=jnp.full((B, T), 7, jnp.int32) if case.mask == "prefix" else None,
    )
    spec = Spec(
        scale=case.scale or H**-0.5,
        softcap=case.softcap,
        low=low,
        high=high,
        in_order=case.mask in ("causal", "window") and T == S,
    )
    return q, k, v, spec, marks


def value_and_grads(attend, q, k, v, seed: int = 1):
    """Output, log-sum-exp, and the gradients of a random weighing of both."""
    rng = np.random.default_rng(seed)
    on_out = jnp.asarray(rng.normal(size=(*q.shape[:3], v.shape[3])), jnp.float32)
    on_lse = jnp.asarray(rng.normal(size=q.shape[:3]), jnp.float32)

    def loss(q, k, v):
        out, lse = attend(q, k, v)
        return jnp.sum(out * on_out) + jnp.sum(jnp.where(jnp.isneginf(lse), 0.0, lse) * on_lse), (out, lse)

    (_, values), grads = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(q, k, v)
    return dict(zip(("out", "lse", "dq", "dk", "dv"), (*values, *grads), strict=True))


def by_reference(spec: Spec, marks: Marks, q, k, v):
    return reference.attention(q, k, v, visible(marks), scale=spec.scale, softcap=spec.softcap)


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[pytest.mark.slow] if i % 2 else []) for i, case in enumerate(CASES)],
    ids=lambda c: f"{c.mask}-{c.size}-{c.length}-{c.segments}",
)
def test_value_and_gradient_match_the_reference(case):
    q, k, v, spec, marks = make(case)
    mine = value_and_grads(lambda *x: flash(Small, spec, *x, marks), q, k, v)
    wanted = value_and_grads(lambda *x: by_reference(spec, marks, *x), q, k, v)
    for name, value in wanted.items():
        np.testing.assert_allclose(mine[name], value, rtol=1e-5, atol=1e-5, err_msg=name)
    blind = ~np.asarray(visible(marks)).any(-1)
    assert blind.any(), "no query of this case sees nothing"
    for name in ("out", "dq"):
        assert not np.asarray(mine[name])[np.broadcast_to(blind[:, None], q.shape[:3])].any()


# The kernels round P and dS to bfloat16 for the matrix units, whereas XLA on a CPU multiplies the reference's in
# float32: one more rounding of the size of that of the result, independent of it.
BACKWARD = 2**0.5


def rms(x, wanted) -> float:
    return float(np.sqrt(np.mean((np.asarray(x, np.float64) - np.asarray(wanted, np.float64)) ** 2)))


@pytest.mark.parametrize("number", [0, 9])
def test_bfloat16_is_no_worse_than_the_reference_in_bfloat16(number):
    case = dataclasses.replace(CASES[number], segments="packed")
    q, k, v, spec, marks = make(case, jnp.bfloat16)
    mine = value_and_grads(lambda *x: flash(Small, spec, *x, marks), q, k, v)
    theirs = value_and_grads(lambda *x: by_reference(spec, marks, *x), q, k, v)
    wide = [x.astype(jnp.float32) for x in (q, k, v)]
    exact = value_and_grads(lambda *x: by_reference(spec, marks, *x), *wide)
    for name, limit in (("out", 1.0), ("dq", BACKWARD), ("dk", BACKWARD), ("dv", BACKWARD)):
        assert mine[name].dtype == jnp.bfloat16
        assert 0 < rms(mine[name], exact[name]) <= limit * rms(theirs[name], exact[name]), name


def test_backward_of_parts_of_the_keys_adds_up():
    """What attention over a ring of devices does: ``lse`` and ``delta`` of the whole, keys in two parts."""
    q, k, v, spec, marks = make(Case("causal", (16, 16), (48, 48), (2, 1), "packed", 0.0))
    spec = dataclasses.replace(spec, in_order=False)
    d_out = jnp.asarray(np.random.default_rng(2).normal(size=q.shape), jnp.float32)
    wanted, pull = jax.vjp(lambda *x: by_reference(spec, marks, *x), q, k, v)
    dq, dk, dv = pull((d_out, jnp.zeros_like(wanted[1])))
    lse, delta = for_backward(*wanted, d_out, jnp.zeros_like(wanted[1]))
    parts = []
    for keys in (slice(0, 24), slice(24, 48)):
        part = Marks(
            q_segments=marks.q_segments,
            q_low=marks.q_low,
            q_high=marks.q_high,
            k_segments=marks.k_segments[:, keys],
            k_positions=marks.k_positions[:, keys],
        )
        run = jax.jit(partial(Small.backward, spec))
        parts.append(run(q, k[:, :, keys], v[:, :, keys], part, lse, delta, d_out))
    np.testing.assert_allclose(parts[0][0] + parts[1][0], dq, atol=1e-5)
    np.testing.assert_allclose(np.concatenate([parts[0][1], parts[1][1]], 2), dk, atol=1e-5)
    np.testing.assert_allclose(np.concatenate([parts[0][2], parts[1][2]], 2), dv, atol=1e-5)


def test_blocks_that_the_mask_rules_out_are_not_read():
    """NaN in the first document reaches no query of the second: a kernel that only masked would multiply it by 0."""
    B, T, H = 1, 64, 16
    segments = jnp.repeat(jnp.asarray([[1, 2]], jnp.int32), 32, axis=1)
    positions = jnp.tile(jnp.arange(32, dtype=jnp.int32), 2)[None]
    marks, low, high = make_marks(positions, positions, segments, segments, causal=True)
    q = jnp.asarray(np.random.default_rng(0).normal(size=(B, 1, T, H)), jnp.float32)
    poisoned = q.at[:, :, :32].set(jnp.nan)
    spec = Spec(scale=1.0, low=low, high=high)
    found = value_and_grads(lambda *x: flash(Small, spec, *x, marks), poisoned, poisoned, poisoned)
    for x in found.values():
        assert np.isfinite(x[:, :, 32:]).all() and np.isnan(x[:, :, :32]).all()


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("segments", ["packed", "one", "shuffled"])
def test_ranges_cover_what_is_visible_and_only_that(mask, segments):
    for seed, (block_q, block_k) in enumerate(((16, 8), (8, 16), (8, 8))):
        *_, spec, marks = make(Case(mask, (16, 16), (70, 70), (1, 1), segments, 0.0), seed=seed)
        q_marks, k_marks = pad_marks(marks, block_q, block_k)
        seen = np.asarray(visible(marks))
        seen = np.pad(seen, ((0, 0), (0, -70 % block_q), (0, -70 % block_k)))
        blocks = seen.reshape(2, seen.shape[1] // block_q, block_q, seen.shape[2] // block_k, block_k)
        any_BIJ, all_BIJ = blocks.any((2, 4)), blocks.all((2, 4))
        for ranges, some, all_of in (
            (key_ranges, any_BIJ, all_BIJ),
            (query_ranges, any_BIJ.swapaxes(1, 2), all_BIJ.swapaxes(1, 2)),
        ):
            run = partial(ranges, spec, block_q=block_q, block_k=block_k, square=True)
            found = np.asarray(jax.jit(run)(q_marks, k_marks))
            assert (np.diff(found, axis=-1) >= 0).all() and found.min() >= 0 and found.max() <= some.shape[2]
            j = np.arange(some.shape[2])
            first, full_from, full_to, last = (found[..., i, None] for i in range(4))
            assert not (some & ~((j >= first) & (j < last))).any()
            assert not (~all_of & (j >= full_from) & (j < full_to)).any()


def test_packed_documents_visit_no_block_in_vain():
    """Causal and packed: exactly the pairs of blocks that hold something visible, and all full ones without a mask."""
    ends = np.array([0, 40, 48, 100, 160])
    segments = np.repeat(np.arange(1, 5), np.diff(ends)).astype(np.int32)[None]
    positions = np.concatenate([np.arange(n) for n in np.diff(ends)]).astype(np.int32)[None]
    marks, low, high = make_marks(*(jnp.asarray(x) for x in (positions, positions, segments, segments)), causal=True)
    spec = Spec(scale=1.0, low=low, high=high, in_order=True)
    found = np.asarray(key_ranges(spec, *pad_marks(marks, 16, 16), 16, 16, square=True))[0]
    blocks = np.asarray(visible(marks))[0].reshape(10, 16, 10, 16)
    assert (found[:, 3] - found[:, 0]).sum() == blocks.any((1, 3)).sum()
    assert (found[:, 2] - found[:, 1]).sum() == blocks.all((1, 3)).sum() > 0


def traced_for(kind: str, platform: str = "cuda"):
    """A mesh of one device that this machine does not have."""
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=None, platform=platform)
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("data",), abstract_device=device))


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
@pytest.mark.parametrize("kind", ["NVIDIA A100-SXM4-80GB", "NVIDIA H100 80GB HBM3"])
@pytest.mark.parametrize(
    ("size", "dtype"),
    [((64, 64), jnp.bfloat16), ((80, 80), jnp.bfloat16), ((192, 128), jnp.bfloat16), ((256, 256), jnp.float32)],
    ids=str,
)
def test_lowers_for_gpus(kind, size, dtype):
    (H, V), B, N, K, T = size, 2, 4, 2, 1000
    spec = Spec(scale=1.0, low=True, high=True, in_order=True, softcap=20.0)
    like = jax.ShapeDtypeStruct
    q, k, v = like((B, N, T, H), dtype), like((B, K, T, H), dtype), like((B, K, T, V), dtype)
    marks = Marks(**{name: like((B, T), jnp.int32) for name in Marks.__dataclass_fields__})

    def run(q, k, v, marks):
        out, pull = jax.vjp(lambda *x: flash(gpu, spec, *x, marks)[0], q, k, v)
        return pull(out)

    with traced_for(kind):
        assert gpu.refusal(spec, q, k, v) is None
        text = jax.jit(run).trace(q, k, v, marks).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("__gpu$xla.gpu.triton") == 3


def test_refusals_give_the_reason():
    like = jax.ShapeDtypeStruct
    q = like((1, 1, 8, 64), jnp.bfloat16)
    spec = Spec(scale=1.0)
    assert gpu.refusal(spec, q, q, q) is None  # interpreted
    assert "one type" in gpu.refusal(spec, q, q, like(q.shape, jnp.float32))
    assert "float16" in gpu.refusal(spec, *(like(q.shape, jnp.float16),) * 3)
    assert "512" in gpu.refusal(spec, *(like((1, 1, 8, 512), jnp.bfloat16),) * 3)
    for kind in ("Tesla V100-SXM2-16GB", "Tesla T4", "AMD Instinct MI300X"):
        with traced_for(kind):
            assert kind in gpu.refusal(spec, q, q, q)
    with traced_for("TPU v5p", "tpu"):
        assert "not on tpu" in gpu.refusal(spec, q, q, q)


def benchmark(*arguments: str) -> subprocess.CompletedProcess:
    env = {name: value for name, value in os.environ.items() if name not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    return subprocess.run(
        [sys.executable, BENCHMARK, *arguments], env=env, capture_output=True, text=True, timeout=1500
    )


def test_on_the_gpu_of_this_machine():
    if not Path("/dev/nvidiactl").exists():
        pytest.skip("no NVIDIA GPU on this machine: the kernels were only interpreted and lowered")
    ran = benchmark("--check")
    if ran.returncode == 2:
        pytest.skip(ran.stderr.strip())
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_the_benchmark_says_that_there_is_no_gpu():
    if Path("/dev/nvidiactl").exists():
        pytest.skip("this machine has a GPU")
    ran = benchmark()
    assert ran.returncode == 2 and "no GPU" in ran.stderr and not ran.stdout
