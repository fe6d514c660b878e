"""Flash attention on NVIDIA GPUs, Ampere and newer: tile sizes, padding and the three kernels of ``gpu_kernels``.

The interface is that of ``flash``.  Pallas reaches these GPUs through Triton (CompilerParams of
``jax.experimental.pallas.triton``).  Traced for a CPU, the kernels are interpreted, which is slow and meant for tests.

Letters: B rows, T queries, S keys, N query heads, K key heads, H size of queries and keys, V of values, I blocks.
"""

from __future__ import annotations

import dataclasses
import math
import re
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from jaxtrain.kernels.attention import gpu_kernels
from jaxtrain.kernels.attention.masks import Marks, Spec
from jaxtrain.kernels.attention.ranges import key_ranges, pad_marks, query_ranges
from jaxtrain.kernels.target import target
from jaxtrain.sharding import vary_like

TYPES = (jnp.float32, jnp.bfloat16)
# Older than Ampere, which has no bfloat16 on its matrix units; and GPUs of other makers.
_TOO_OLD = re.compile(r"\b(T4|P4|P40|P100|V100\w*|K80|GTX|RTX 20\d\d|Quadro RTX|TITAN)\b")
_OTHER = re.compile(r"AMD|Radeon|Instinct|gfx\d|Intel", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Tile:
    """Sizes of a kernel's blocks, warps of 32 threads a program, and how deep loads are pipelined."""

    q: int
    k: int
    warps: int
    stages: int = 2


@dataclasses.dataclass(frozen=True)
class Tiles:
    forward: Tile
    dq: Tile
    dkv: Tile


# Chips whose programs may hold over 160 KiB of shared memory; the others of these generations hold 99 KiB.
_ROOMY = re.compile(r"\b(A100|A800|A30|H100|H200|H800|H20|GH200|B200|B300|GB200|GB300)\b")


def tiles_for(dtype, head_size: int, kind: str) -> Tiles:
    """head_size: the larger of H and V; kind: of the device.

    Chosen by what the compiler makes of them for sm_80, sm_86 and sm_90: they fit into shared memory, and no bfloat16
    kernel spills more than a few registers.
    """
    if jnp.dtype(dtype) == jnp.float32:
        tile = Tile(32, 32, 4, 1) if head_size <= 128 else Tile(16, 16, 4, 1)
        return Tiles(forward=tile, dq=tile, dkv=tile)
    if head_size <= 64:
        return Tiles(forward=Tile(128, 64, 4, 3), dq=Tile(128, 64, 8), dkv=Tile(64, 128, 8))
    if head_size <= 128:
        return Tiles(forward=Tile(128, 64, 8), dq=Tile(64, 64, 4), dkv=Tile(64, 64, 8))
    if _ROOMY.search(kind):
        return Tiles(forward=Tile(64, 32, 8), dq=Tile(64, 32, 8), dkv=Tile(32, 64, 8))
    return Tiles(forward=Tile(64, 32, 8), dq=Tile(32, 32, 4), dkv=Tile(32, 32, 4))


def refusal(spec: Spec, q, k, v) -> str | None:
    """Why the kernels cannot run on these shapes and types, for the devices traced for."""
    platform, kind = target()
    if platform not in ("gpu", "cpu"):
        return f"the GPU kernels run on GPUs (interpreted on CPUs), not on {platform}"
    if platform == "gpu" and (_TOO_OLD.search(kind) or _OTHER.search(kind)):
        return f"the GPU kernels need an NVIDIA GPU, Ampere or newer, not {kind}"
    if not (q.dtype == k.dtype == v.dtype) or q.dtype not in TYPES:
        return f"the GPU kernels take q, k, v of one type, float32 or bfloat16, not {q.dtype}, {k.dtype}, {v.dtype}"
    if max(q.shape[-1], v.shape[-1]) > 256:
        return f"the GPU kernels take heads of up to 256, not {q.shape[-1]} and values of {v.shape[-1]}"
    return None


def forward(
    spec: Spec, q_BNTH, k_BKSH, v_BKSV, marks: Marks, *, tiles: Tiles | None = None
) -> tuple[jax.Array, jax.Array]:
    """``out [B, N, T, V]`` in the type of q, ``lse`` float32 ``[B, N, T]``."""
    call = _Call.of(spec, q_BNTH, k_BKSH, v_BKSV, marks, (tiles or _tiles(q_BNTH, v_BKSV)).forward)
    q, k, v = call.queries(q_BNTH), call.keys(k_BKSH), call.keys(v_BKSV)
    out, lse = call.over_queries(
        gpu_kernels.forward,
        key_ranges,
        (q, k, v),
        (),
        [(q.shape[:3] + v.shape[3:], q.dtype), (q.shape[:3], jnp.float32)],
        products=("H", "V"),
    )
    return out[:, :, : q_BNTH.shape[2], : v_BKSV.shape[3]], lse[:, :, : q_BNTH.shape[2]]


def backward(
    spec: Spec, q_BNTH, k_BKSH, v_BKSV, marks: Marks, lse_BNT, delta_BNT, d_out_BNTV, *, tiles: Tiles | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dq, dk, dv, given ``lse`` and ``delta`` of the whole softmax."""
    tiles = tiles or _tiles(q_BNTH, v_BKSV)
    (T, H), (S, V) = q_BNTH.shape[2:], v_BKSV.shape[2:]
    lse_BNT, d_out_BNTV = lse_BNT * gpu_kernels.LOG2E, d_out_BNTV.astype(v_BKSV.dtype)

    call = _Call.of(spec, q_BNTH, k_BKSH, v_BKSV, marks, tiles.dq)
    q, k, v = call.queries(q_BNTH), call.keys(k_BKSH), call.keys(v_BKSV)
    rows = call.queries(lse_BNT), call.queries(delta_BNT), call.queries(d_out_BNTV)
    (dq,) = call.over_queries(
        gpu_kernels.dq, key_ranges, (q, k, v), rows, [(q.shape, q.dtype)], products=("H", "H", "V")
    )

    call = _Call.of(spec, q_BNTH, k_BKSH, v_BKSV, marks, tiles.dkv)
    q, k, v = call.queries(q_BNTH), call.keys(k_BKSH), call.keys(v_BKSV)
    rows = call.queries(lse_BNT), call.queries(delta_BNT), call.queries(d_out_BNTV)
    dk, dv = call.over_keys(gpu_kernels.dkv, query_ranges, (q, k, v), rows, products=("H", "H", "V", "V"))
    return dq[:, :, :T, :H], dk[:, :, :S, :H], dv[:, :, :S, :V]


def _tiles(q_BNTH, v_BKSV) -> Tiles:
    return tiles_for(q_BNTH.dtype, max(q_BNTH.shape[-1], v_BKSV.shape[-1]), target()[1])


@dataclasses.dataclass(frozen=True)
class _Call:
    """One kernel on whole blocks: lengths are padded to the tile, heads to a multiple of 16."""

    spec: Spec
    tile: Tile
    marks: Marks
    shape: tuple[int, ...]  # B, N, K, T, S, H, V before padding

    @classmethod
    def of(cls, spec: Spec, q_BNTH, k_BKSH, v_BKSV, marks: Marks, tile: Tile) -> _Call:
        B, N, T, H = q_BNTH.shape
        K, S, V = v_BKSV.shape[1:]
        # A short sequence takes a small block: 16 is the smallest that the matrix units take.
        small = dataclasses.replace(
            tile, q=min(tile.q, max(16, pl.next_power_of_2(T))), k=min(tile.k, max(16, pl.next_power_of_2(S)))
        )
        return cls(spec, small, marks, (B, N, K, T, S, H, V))

    def queries(self, x):
        return _pad(x, self.tile.q)

    def keys(self, x):
        return _pad(x, self.tile.k)

    def over_queries(self, kernel, ranges, arrays, rows, outs, *, products):
        """A program for each block of queries of each head."""
        (q, k, v), (B, N, K, T, S, *_) = arrays, self.shape
        q_marks, k_marks = pad_marks(self.marks, self.tile.q, self.tile.k)
        blocks = q.shape[2] // self.tile.q
        ranges_BI4 = ranges(self.spec, q_marks, k_marks, self.tile.q, self.tile.k, square=T == S)

        def at(i):
            # Under a causal mask the last blocks take longest: they start first.
            return blocks - 1 - i

        def held(x):
            index = (0,) * (len(x.shape) - 3)
            return pl.BlockSpec((None, None, self.tile.q, *x.shape[3:]), lambda i, n, b: (b, n, at(i), *index))

        def looped(x):
            return pl.BlockSpec((None, None, *x.shape[2:]), lambda i, n, b: (b, lax.div(n, N // K), 0, 0))

        shapes = [_like(shape, dtype, *arrays, *rows, q_marks, k_marks) for shape, dtype in outs]
        return self._run(
            partial(kernel, spec=self.spec, block_k=self.tile.k),
            (blocks, N, B),
            [
                held(q),
                looped(k),
                looped(v),
                pl.BlockSpec((None, 3, self.tile.q), lambda i, n, b: (b, 0, at(i))),
                pl.BlockSpec((None, 2, k.shape[2]), lambda i, n, b: (b, 0, 0)),
                pl.BlockSpec((None, None, 4), lambda i, n, b: (b, at(i), 0)),
                *(held(x) for x in rows),
            ],
            (q, k, v, q_marks, k_marks, ranges_BI4, *rows),
            shapes,
            [held(x) for x in shapes],
            products,
        )

    def over_keys(self, kernel, ranges, arrays, rows, *, products):
        """A program for each block of keys of each key head."""
        (q, k, v), (B, N, K, T, S, *_) = arrays, self.shape
        q_marks, k_marks = pad_marks(self.marks, self.tile.q, self.tile.k)
        ranges_BI4 = ranges(self.spec, q_marks, k_marks, self.tile.q, self.tile.k, square=T == S)

        def group(x):
            return x.reshape(B, K, N // K, *x.shape[2:])

        def looped(x):
            index = (0,) * (x.ndim - 2)
            return pl.BlockSpec((None, None, *x.shape[2:]), lambda j, n, b: (b, n, *index))

        def held(x):
            return pl.BlockSpec((None, None, self.tile.k, x.shape[3]), lambda j, n, b: (b, n, j, 0))

        q, rows = group(q), tuple(group(x) for x in rows)
        shapes = [_like(x.shape, x.dtype, q, k, v, *rows, q_marks, k_marks) for x in (k, v)]
        return self._run(
            partial(kernel, spec=self.spec, block_q=self.tile.q),
            (k.shape[2] // self.tile.k, K, B),
            [
                looped(q),
                held(k),
                held(v),
                pl.BlockSpec((None, 3, q.shape[3]), lambda j, n, b: (b, 0, 0)),
                pl.BlockSpec((None, 2, self.tile.k), lambda j, n, b: (b, 0, j)),
                pl.BlockSpec((None, None, 4), lambda j, n, b: (b, j, 0)),
                *(looped(x) for x in rows),
            ],
            (q, k, v, q_marks, k_marks, ranges_BI4, *rows),
            shapes,
            [held(x) for x in shapes],
            products,
        )

    def _run(self, kernel, grid, in_specs, inputs, out_shape, out_specs, products):
        """products: what each matrix product of a pair of blocks sums over or makes, H or V."""
        B, N, _, T, S, H, V = self.shape
        share = 0.5 if self.spec.in_order and T == S else 1.0
        each_pair = 2 * sum({"H": H, "V": V}[x] for x in products)
        return pl.pallas_call(
            kernel,
            grid=grid,
            in_specs=in_specs,
            out_specs=out_specs,
            out_shape=out_shape,
            interpret=target()[0] == "cpu",
            name=f"flash_{kernel.func.__name__}",
            compiler_params=triton.CompilerParams(num_warps=self.tile.warps, num_stages=self.tile.stages),
            cost_estimate=pl.CostEstimate(
                flops=int(B * N * T * S * share * each_pair),
                transcendentals=int(B * N * T * S * share * (2 if self.spec.softcap else 1)),
                bytes_accessed=sum(math.prod(x.shape) * x.dtype.itemsize for x in (*inputs, *out_shape)),
            ),
        )(*(vary_like(x, *inputs) for x in inputs))


def _pad(x, block: int):
    """Whole blocks along axis 2; heads (axis 3) to a multiple of 16."""
    sizes = [(0, 0), (0, 0), (0, -x.shape[2] % block), *((0, -size % 16) for size in x.shape[3:])]
    return jnp.pad(x, sizes) if any(high for _, high in sizes) else x


def _like(shape, dtype, *others) -> jax.ShapeDtypeStruct:
    """An output that varies over every axis of a ``shard_map`` that one of ``others`` varies over."""
    kind = jax.typeof(vary_like(others[0], *others)).manual_axis_type
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=kind)
