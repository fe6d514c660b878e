"""Flash attention on TPUs: tiles, blocks of memory, and the calls of the kernels in ``tpu_kernels``.

Letters: B rows, N query heads, K key heads, T queries, S keys (after padding to whole tiles), H size of queries and
keys, V of values.
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxtrain.kernels.attention.gpu_ranges import key_ranges, pad_marks, query_ranges
from jaxtrain.kernels.attention.masks import Marks, Spec
from jaxtrain.kernels.attention.tpu_kernels import LANES, Shape, dkv_kernel, dq_kernel, forward_kernel
from jaxtrain.kernels.target import target

# Bytes of keys and values (or of queries and what goes with them) that stand in VMEM at a time, twice for double buffering.
CHUNK_BYTES = 2 * 2**20
VMEM_LIMIT = 64 * 2**20

GENERATIONS = {
    "TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e", "TPU7x": "tpu7x",
}  # fmt: skip
# Of VMEM, for the dq of a group of heads.
FUSED_BYTES = {"v4": 4 * 2**20, "v5e": 20 * 2**20, "v5p": 20 * 2**20, "v6e": 20 * 2**20, "tpu7x": 20 * 2**20}


def forward(spec: Spec, q_BNTH, k_BKSH, v_BKSV, marks: Marks):
    B, N, T, H = q_BNTH.shape
    K, S, V = k_BKSH.shape[1], k_BKSH.shape[2], v_BKSV.shape[-1]
    shape, q_len, k_len = _cut(spec, T, S, H, V, q_BNTH.dtype, looped="keys")
    q, k, v = _pad(q_BNTH, q_len), _pad(k_BKSH, k_len), _pad(v_BKSV, k_len)
    q_marks, k_marks = pad_marks(marks, shape.queries, shape.keys * shape.tiles)
    ranges = key_ranges(spec, q_marks, k_marks, shape.queries, shape.keys, square=T == S)
    chunk, chunks, Q = shape.keys * shape.tiles, k_len // (shape.keys * shape.tiles), shape.queries
    at_q = lambda b, n, i, c, _: (b, n, i, 0)  # noqa: E731
    at_k = lambda b, n, i, c, r: (b, n * K // N, _chunk(r, b, i, c, q_len // Q, shape.tiles), 0)  # noqa: E731
    f32 = jnp.float32
    out, lse = pl.pallas_call(
        partial(forward_kernel, spec=spec, shape=shape),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, N, q_len // Q, chunks),
            in_specs=[
                pl.BlockSpec((1, 1, Q, H), at_q),
                pl.BlockSpec((1, 1, chunk, H), at_k),
                pl.BlockSpec((1, 1, chunk, V), at_k),
                pl.BlockSpec((1, 3, Q), lambda b, n, i, c, _: (b, 0, i)),
                pl.BlockSpec((1, 2, chunk), lambda b, n, i, c, r: (b, 0, at_k(b, n, i, c, r)[2])),
            ],
            out_specs=[
                pl.BlockSpec((1, 1, Q, V), at_q),
                pl.BlockSpec((1, 1, 1, Q), lambda b, n, i, c, _: (b, n, 0, i)),
            ],
            scratch_shapes=[
                pltpu.VMEM((H, Q), q.dtype),
                pltpu.VMEM((2, shape.keys, Q), f32),
                pltpu.VMEM((V, Q), f32),
                pltpu.VMEM((1, Q), f32),
                pltpu.VMEM((1, Q), f32),
                pltpu.VMEM((2, 1, Q), f32),
                pltpu.VMEM((2, 1, Q), f32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((B, N, q_len, V), q.dtype),
            jax.ShapeDtypeStruct((B, N, 1, q_len), f32),
        ],
        cost_estimate=_cost(spec, B * N, T, S, 2 * (H + V), 1, (q, k, v, q[..., :V])),
        name="flash_forward",
        **_settings(),
    )(ranges.reshape(-1), q, k, v, q_marks, k_marks)
    return out[:, :, :T], lse[:, :, 0, :T]


def backward(spec: Spec, q_BNTH, k_BKSH, v_BKSV, marks: Marks, lse_BNT, delta_BNT, d_out_BNTV):
    args = (q_BNTH, k_BKSH, v_BKSV, marks, lse_BNT, delta_BNT, d_out_BNTV)
    _, N, T, H = q_BNTH.shape
    # What the one kernel adds up for a group of heads, or two kernels where it does not fit.
    if N // k_BKSH.shape[1] * H * (T + LANES) * 4 <= FUSED_BYTES[generation()]:
        return _dkv(spec, *args, fused=True)
    return (_dq(spec, *args), *_dkv(spec, *args, fused=False))


def _dq(spec, q_BNTH, k_BKSH, v_BKSV, marks, lse_BNT, delta_BNT, d_out_BNTV):
    B, N, T, H = q_BNTH.shape
    K, S, V = k_BKSH.shape[1], k_BKSH.shape[2], v_BKSV.shape[-1]
    shape, q_len, k_len = _cut(spec, T, S, H, V, q_BNTH.dtype, looped="keys")
    q, k, v, d_out = _pad(q_BNTH, q_len), _pad(k_BKSH, k_len), _pad(v_BKSV, k_len), _pad(d_out_BNTV, q_len)
    lse, delta = (_pad(x[:, :, None], q_len, axis=3) for x in (lse_BNT, delta_BNT))
    q_marks, k_marks = pad_marks(marks, shape.queries, shape.keys * shape.tiles)
    ranges = key_ranges(spec, q_marks, k_marks, shape.queries, shape.keys, square=T == S)
    chunk, chunks, Q = shape.keys * shape.tiles, k_len // (shape.keys * shape.tiles), shape.queries
    at_q = lambda b, n, i, c, _: (b, n, i, 0)  # noqa: E731
    row_q = lambda b, n, i, c, _: (b, n, 0, i)  # noqa: E731
    at_k = lambda b, n, i, c, r: (b, n * K // N, _chunk(r, b, i, c, q_len // Q, shape.tiles), 0)  # noqa: E731
    dq = pl.pallas_call(
        partial(dq_kernel, spec=spec, shape=shape),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, N, q_len // Q, chunks),
            in_specs=[
                pl.BlockSpec((1, 1, Q, H), at_q),
                pl.BlockSpec((1, 1, chunk, H), at_k),
                pl.BlockSpec((1, 1, chunk, V), at_k),
                pl.BlockSpec((1, 1, Q, V), at_q),
                pl.BlockSpec((1, 1, 1, Q), row_q),
                pl.BlockSpec((1, 1, 1, Q), row_q),
                pl.BlockSpec((1, 3, Q), lambda b, n, i, c, _: (b, 0, i)),
                pl.BlockSpec((1, 2, chunk), lambda b, n, i, c, r: (b, 0, at_k(b, n, i, c, r)[2])),
            ],
            out_specs=pl.BlockSpec((1, 1, Q, H), at_q),
            scratch_shapes=[
                pltpu.VMEM((H, Q), q.dtype),
                pltpu.VMEM((V, Q), d_out.dtype),
                pltpu.VMEM((2, shape.keys, Q), jnp.float32),
                pltpu.VMEM((2, shape.keys, Q), jnp.float32),
                pltpu.VMEM((H, Q), jnp.float32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        cost_estimate=_cost(spec, B * N, T, S, 2 * (2 * H + V), 1, (q, k, v, d_out, q)),
        name="flash_dq",
        **_settings(),
    )(ranges.reshape(-1), q, k, v, d_out, lse, delta, q_marks, k_marks)
    return dq[:, :, :T]


def _dkv(spec, q_BNTH, k_BKSH, v_BKSV, marks, lse_BNT, delta_BNT, d_out_BNTV, *, fused: bool):
    """dk and dv; after dq where ``fused``."""
    B, N, T, H = q_BNTH.shape
    K, S, V = k_BKSH.shape[1], k_BKSH.shape[2], v_BKSV.shape[-1]
    shape, q_len, k_len = _cut(spec, T, S, H, V, q_BNTH.dtype, looped="queries")
    q, k, v, d_out = _pad(q_BNTH, q_len), _pad(k_BKSH, k_len), _pad(v_BKSV, k_len), _pad(d_out_BNTV, q_len)
    lse, delta = (_pad(x[:, :, None], q_len, axis=3) for x in (lse_BNT, delta_BNT))
    chunk = shape.queries * shape.tiles
    chunks = q_len // chunk
    q_marks, k_marks = pad_marks(marks, chunk, shape.keys)
    ranges = query_ranges(spec, q_marks, k_marks, shape.queries, shape.keys, square=T == S)
    blocks, G = k_len // shape.keys, N // K

    def at_q(b, n, j, c, r):
        return b, n * G + c // chunks, _chunk(r, b, j, c % chunks, blocks, shape.tiles), 0

    def row_q(b, n, j, c, r):
        return b, n * G + c // chunks, 0, at_q(b, n, j, c, r)[2]

    at_k = lambda b, n, j, c, _: (b, n, j, 0)  # noqa: E731
    dq_out = [jax.ShapeDtypeStruct((B, N, H, q_len), jnp.float32)] if fused else []
    whole = pl.BlockSpec((1, G, H, q_len), lambda b, n, j, c, _: (b, n, 0, 0), pipeline_mode=pl.Buffered(1))
    dk, dv, *dq = pl.pallas_call(
        partial(dkv_kernel, spec=spec, shape=shape, chunks=chunks),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, K, blocks, G * chunks),
            in_specs=[
                pl.BlockSpec((1, 1, chunk, H), at_q),
                pl.BlockSpec((1, 1, shape.keys, H), at_k),
                pl.BlockSpec((1, 1, shape.keys, V), at_k),
                pl.BlockSpec((1, 1, chunk, V), at_q),
                pl.BlockSpec((1, 1, 1, chunk), row_q),
                pl.BlockSpec((1, 1, 1, chunk), row_q),
                pl.BlockSpec((1, 3, chunk), lambda b, n, j, c, r: (b, 0, at_q(b, n, j, c, r)[2])),
                pl.BlockSpec((1, 2, shape.keys), lambda b, n, j, c, _: (b, 0, j)),
            ],
            out_specs=[
                pl.BlockSpec((1, 1, shape.keys, H), at_k),
                pl.BlockSpec((1, 1, shape.keys, V), at_k),
                *([whole] if fused else []),
            ],
            scratch_shapes=[
                pltpu.VMEM((2, shape.keys, shape.queries), jnp.float32),
                pltpu.VMEM((2, shape.keys, shape.queries), jnp.float32),
                pltpu.VMEM((shape.keys, H), jnp.float32),
                pltpu.VMEM((shape.keys, V), jnp.float32),
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype), *dq_out],
        cost_estimate=_cost(
            spec, B * N, T, S, 2 * ((3 if fused else 2) * H + 2 * V), 1, (q, k, v, d_out, k, v, *dq_out)
        ),
        name="flash_backward" if fused else "flash_dkv",
        **_settings(across_blocks=fused),
    )(ranges.reshape(-1), q, k, v, d_out, lse, delta, q_marks, k_marks)
    dq = [(x.swapaxes(2, 3)[:, :, :T] * spec.scale).astype(q.dtype) for x in dq]
    return *dq, dk[:, :, :S], dv[:, :, :S]


def _chunk(ranges, b, i, c, blocks: int, tiles: int):
    """Chunk c of the looped side, or the nearest that has anything to see: a chunk that is skipped is not fetched."""
    at = (b * blocks + i) * 4
    first, last = ranges[at] // tiles, jnp.maximum(ranges[at + 3] - 1, 0) // tiles
    return jnp.maximum(jnp.minimum(c, last), jnp.minimum(first, last))


def _cut(spec: Spec, T: int, S: int, H: int, V: int, dtype, *, looped: str) -> tuple[Shape, int, int]:
    """Tiles and chunks, and the lengths of queries and keys after padding to whole ones."""
    wanted = spec.tiles or (512, 512)
    queries, keys = _even(T, wanted[0]), _even(S, wanted[1])
    length, tile = (S, keys) if looped == "keys" else (T, queries)
    padded = LANES * (math.ceil(H / LANES) + math.ceil(V / LANES))
    most = max(1, CHUNK_BYTES // (tile * padded * jnp.dtype(dtype).itemsize))
    count = math.ceil(length / tile)
    tiles = math.ceil(count / math.ceil(count / most))
    q_unit, k_unit = (queries, keys * tiles) if looped == "keys" else (queries * tiles, keys)
    return Shape(queries, keys, tiles), _up(T, q_unit), _up(S, k_unit)


def _even(length: int, most: int) -> int:
    """The size of equal tiles of at most ``most``, in whole lanes."""
    return _up(math.ceil(length / math.ceil(length / most)), LANES)


def _up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


def _pad(x, length: int, axis: int = 2):
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, length - x.shape[axis])
    return jnp.pad(x, widths)


def _cost(spec: Spec, heads: int, T: int, S: int, flops: int, exponentials: int, arrays) -> pl.CostEstimate:
    pairs = heads * T * S * spec.share
    return pl.CostEstimate(
        flops=int(pairs * flops),
        transcendentals=int(pairs * exponentials),
        bytes_accessed=sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays),
    )


def generation() -> str:
    """Which TPU is traced for; where none is, the newest."""
    return GENERATIONS.get(target()[1], "tpu7x")


def _settings(across_blocks: bool = False) -> dict:
    """across_blocks: whether the blocks that are held share something and so have an order."""
    interpret = target()[0] != "tpu"
    return {
        "interpret": interpret,
        "compiler_params": pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary" if across_blocks else "parallel", "arbitrary"),
            vmem_limit_bytes=VMEM_LIMIT,
            disable_bounds_checks=True,
        ),
    }


def refusal(spec: Spec, q, k, v) -> str | None:
    """Why these arrays cannot be attended to here, or None."""
    if q.dtype not in (jnp.float32, jnp.bfloat16):
        return f"the TPU kernels take float32 and bfloat16, not {q.dtype}"
    if not q.dtype == k.dtype == v.dtype:
        return f"the TPU kernels want one type, found {q.dtype}, {k.dtype} and {v.dtype}"
    if spec.scale == 0:
        return "the TPU kernels divide by the scale, which is 0"
    return None
