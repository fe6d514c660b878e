"""Flash attention on TPUs: tiles, blocks of memory, and the calls of the kernels in ``tpu_kernels``.

Letters: B rows, N query heads, K key heads, T queries, S keys, H size of queries and keys, V of values.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxtrain.kernels.attention.masks import Marks, Spec
from jaxtrain.kernels.attention.ranges import key_ranges, pad_marks, query_ranges
from jaxtrain.kernels.attention.tpu_kernels import LANES, Shape, dkv_kernel, dq_kernel, forward_kernel
from jaxtrain.kernels.target import target

# Bytes of what a kernel loops over that stand in VMEM at a time (twice: the next are fetched meanwhile).
CHUNK_BYTES = 2 * 2**20


@dataclasses.dataclass(frozen=True)
class Chip:
    """tiles: queries and keys of a tile, by the schedules that ``benchmarks/attention_schedule.py`` reads.
    vmem: bytes that a kernel may take.  fused: of them, for the dq of a group of heads."""

    tiles: tuple[int, int]
    vmem: int
    fused: int


CHIPS = {
    "TPU v4": Chip(tiles=(512, 512), vmem=14 * 2**20, fused=0),
    "TPU v5 lite": Chip(tiles=(512, 512), vmem=64 * 2**20, fused=30 * 2**20),
    "TPU v5": Chip(tiles=(512, 512), vmem=64 * 2**20, fused=30 * 2**20),
    "TPU v6 lite": Chip(tiles=(512, 512), vmem=64 * 2**20, fused=30 * 2**20),
    "TPU7x": Chip(tiles=(512, 512), vmem=48 * 2**20, fused=24 * 2**20),
}


def chip() -> Chip:
    """The chip traced for; on another platform, where kernels are interpreted, the newest."""
    return CHIPS.get(target()[1], CHIPS["TPU7x"])


def refusal(spec: Spec, q, k, v) -> str | None:
    """Why these arrays cannot be attended to here, or None."""
    if target()[0] not in ("tpu", "cpu"):
        return f"the TPU kernels run on TPUs (interpreted on CPUs), not on {target()[0]}"
    if q.dtype not in (jnp.float32, jnp.bfloat16) or not q.dtype == k.dtype == v.dtype:
        return f"the TPU kernels take q, k, v of one type, float32 or bfloat16, not {q.dtype}, {k.dtype}, {v.dtype}"
    if spec.scale == 0:
        return "the TPU kernels divide by the scale, which is 0"
    return None


def forward(spec: Spec, q_BNTH, k_BKSH, v_BKSV, marks: Marks) -> tuple[jax.Array, jax.Array]:
    """See ``flash``."""
    call = _Queries.of(spec, q_BNTH, k_BKSH, v_BKSV)
    queries, keys, f32 = call.shape.queries, call.shape.keys, jnp.float32
    q, k, v = _pad(q_BNTH, call.T), _pad(k_BKSH, call.S), _pad(v_BKSV, call.S)
    (B, N, _, H), V = q.shape, v.shape[-1]
    out, lse = call.run(
        partial(forward_kernel, spec=spec, shape=call.shape),
        marks,
        [(q, call.held), (k, call.looped), (v, call.looped)],
        out=[((B, N, call.T, V), q.dtype, call.held), ((B, N, 1, call.T), f32, call.held_row)],
        scratch=[
            ((H, queries), q.dtype),
            ((2, keys, queries), f32),
            ((V, queries), f32),
            *[((1, queries), f32)] * 2,
            *[((2, 1, queries), f32)] * 2,
        ],
        products=H + V,
        name="flash_forward",
    )
    T = q_BNTH.shape[2]
    return out[:, :, :T], lse[:, :, 0, :T]


def backward(spec: Spec, q_BNTH, k_BKSH, v_BKSV, marks: Marks, lse_BNT, delta_BNT, d_out_BNTV):
    """See ``flash``: one kernel where the dq of a group of heads, or of a part of one, fits into VMEM, and else two,
    which compute seven products for five."""
    (B, N, T, H), K = q_BNTH.shape, k_BKSH.shape[1]
    parts = group_parts(N // K, T, H, q_BNTH.dtype.itemsize)
    args = (spec, q_BNTH, k_BKSH, v_BKSV, marks, lse_BNT, delta_BNT, d_out_BNTV)
    if parts is None:
        return (_dq(*args), *_dkv(*args))
    dq, dk, dv = _dkv(*args, parts=parts)
    if parts > 1:
        apart = (x.reshape(B, K, parts, *x.shape[2:]) for x in (dk, dv))
        dk, dv = (jnp.sum(x, axis=2, dtype=jnp.float32).astype(x.dtype) for x in apart)
    return dq, dk, dv


def group_parts(group: int, T: int, H: int, itemsize: int) -> int | None:
    """In how many parts the backward kernel takes a group of query heads, so that dq ``[heads, H, T]`` stays in VMEM:
    its sums in float32, and what is handed over, of ``itemsize`` bytes.  None where not even one head's does."""
    room = chip().fused // (H * (T + LANES) * (4 + itemsize))
    return next((parts for parts in range(1, group + 1) if group % parts == 0 and group // parts <= room), None)


def _dq(spec: Spec, q_BNTH, k_BKSH, v_BKSV, marks, lse_BNT, delta_BNT, d_out_BNTV) -> jax.Array:
    call = _Queries.of(spec, q_BNTH, k_BKSH, v_BKSV)
    queries, keys, f32 = call.shape.queries, call.shape.keys, jnp.float32
    q, k, v, d_out = (
        _pad(x, n) for x, n in ((q_BNTH, call.T), (k_BKSH, call.S), (v_BKSV, call.S), (d_out_BNTV, call.T))
    )
    lse, delta = (_pad(x[:, :, None], call.T, axis=3) for x in (lse_BNT, delta_BNT))
    H, V = q.shape[-1], v.shape[-1]
    (dq,) = call.run(
        partial(dq_kernel, spec=spec, shape=call.shape),
        marks,
        [
            *((q, call.held), (k, call.looped), (v, call.looped), (d_out, call.held)),
            *((lse, call.held_row), (delta, call.held_row)),
        ],
        out=[(q.shape, q.dtype, call.held)],
        scratch=[
            ((H, queries), q.dtype),
            ((V, queries), d_out.dtype),
            *[((2, keys, queries), f32)] * 2,
            ((H, queries), f32),
        ],
        products=2 * H + V,
        name="flash_dq",
    )
    return dq[:, :, : q_BNTH.shape[2]]


def _dkv(spec: Spec, q_BNTH, k_BKSH, v_BKSV, marks, lse_BNT, delta_BNT, d_out_BNTV, *, parts: int | None = None):
    """dk and dv; with the number of parts of a group of heads dq too, and each part's dk and dv,
    ``[B, K * parts, S, *]``."""
    call, fused = _Keys.of(spec, q_BNTH, k_BKSH, v_BKSV), parts is not None
    call = dataclasses.replace(call, K=call.K * (parts or 1))
    queries, keys, f32 = call.shape.queries, call.shape.keys, jnp.float32
    q, k, v, d_out = (
        _pad(x, n) for x, n in ((q_BNTH, call.T), (k_BKSH, call.S), (v_BKSV, call.S), (d_out_BNTV, call.T))
    )
    lse, delta = (_pad(x[:, :, None], call.T, axis=3) for x in (lse_BNT, delta_BNT))
    (B, N, _, H), V = q.shape, v.shape[-1]
    dk, dv, *dq = call.run(
        partial(dkv_kernel, spec=spec, shape=call.shape, chunks=call.chunks),
        marks,
        [
            *((q, call.looped), (k, call.held), (v, call.held), (d_out, call.looped)),
            *((lse, call.looped_row), (delta, call.looped_row)),
        ],
        out=[((B, call.K, *x.shape[2:]), x.dtype, call.held) for x in (k, v)]
        + ([((B, N, H, call.T), q.dtype, call.whole)] if fused else []),
        scratch=[*[((2, keys, queries), f32)] * 2, ((keys, H), f32), ((keys, V), f32)]
        + ([((N // call.K, H, call.T), f32)] if fused else []),
        products=(3 if fused else 2) * H + 2 * V,
        name="flash_backward" if fused else "flash_dkv",
        in_order=fused,
    )
    T, S = q_BNTH.shape[2], k_BKSH.shape[2]
    dq = [x.swapaxes(2, 3)[:, :, :T] for x in dq]
    return *dq, dk[:, :, :S], dv[:, :, :S]


@dataclasses.dataclass(frozen=True)
class _Call:
    """A kernel's grid: rows x heads x blocks that are held x chunks that are looped over.

    T, S: lengths after padding to whole tiles and chunks.  square: whether they were equal before.
    """

    spec: Spec
    shape: Shape
    B: int
    N: int
    K: int
    T: int
    S: int
    square: bool
    pairs: float

    @classmethod
    def of(cls, spec: Spec, q_BNTH, k_BKSH, v_BKSV):
        (B, N, T, H), (K, S), V = q_BNTH.shape, k_BKSH.shape[1:3], v_BKSV.shape[-1]
        wanted = spec.tiles or chip().tiles
        queries, keys = _even(T, wanted[0]), _even(S, wanted[1])
        length, tile = (S, keys) if cls is _Queries else (T, queries)
        # Rows of a block are padded to whole lanes.
        size = LANES * (math.ceil(H / LANES) + math.ceil(V / LANES)) * q_BNTH.dtype.itemsize
        count = math.ceil(length / tile)
        tiles = math.ceil(count / math.ceil(count / max(1, CHUNK_BYTES // (tile * size))))
        units = (queries, keys * tiles) if cls is _Queries else (queries * tiles, keys)
        padded = (_up(n, unit) for n, unit in zip((T, S), units, strict=True))
        return cls(spec, Shape(queries, keys, tiles), B, N, K, *padded, T == S, B * N * T * S * spec.share)

    def run(self, kernel, marks: Marks, arrays, *, out, scratch, products: int, name: str, in_order: bool = False):
        """Calls the kernel.

        arrays: what it reads, each with its function from shape to BlockSpec.  out: (shape, type, function).
        products: how many numbers are multiplied and added for each pair of query and key.
        in_order: whether the blocks that are held have something in common, and so an order.
        """
        q_unit, k_unit = self.units()
        q_marks, k_marks = pad_marks(marks, q_unit, k_unit)
        ranges = self.ranges(q_marks, k_marks)
        specs = [place(x.shape) for x, place in arrays]
        read = [x for x, _ in arrays]
        return pl.pallas_call(
            kernel,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=1,
                grid=self.grid(),
                in_specs=[*specs, *self.mark_specs()],
                out_specs=[place(shape) for shape, _, place in out],
                scratch_shapes=[pltpu.VMEM(shape, dtype) for shape, dtype in scratch],
            ),
            out_shape=[jax.ShapeDtypeStruct(shape, dtype) for shape, dtype, _ in out],
            cost_estimate=pl.CostEstimate(
                flops=int(2 * products * self.pairs),
                transcendentals=int(self.pairs),
                bytes_accessed=sum(x.size * x.dtype.itemsize for x in read)
                + sum(math.prod(shape) * jnp.dtype(dtype).itemsize for shape, dtype, _ in out),
            ),
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary" if in_order else "parallel", "arbitrary"),
                vmem_limit_bytes=chip().vmem,
                disable_bounds_checks=True,
            ),
            interpret=target()[0] != "tpu",
            name=name,
        )(ranges.reshape(-1), *read, q_marks, k_marks)


class _Queries(_Call):
    """Blocks of queries are held, chunks of keys looped over."""

    def units(self):
        return self.shape.queries, self.shape.keys * self.shape.tiles

    def ranges(self, q_marks, k_marks):
        return key_ranges(self.spec, q_marks, k_marks, self.shape.queries, self.shape.keys, square=self.square)

    def grid(self):
        return self.B, self.N, self.T // self.shape.queries, self.S // self.units()[1]

    def _chunk(self, b, i, c, ranges):
        return _nearest(ranges, b * (self.T // self.shape.queries) + i, c, self.shape.tiles)

    def held(self, shape):
        return pl.BlockSpec((1, 1, self.shape.queries, shape[-1]), lambda b, n, i, c, _: (b, n, i, 0))

    def held_row(self, shape):
        return pl.BlockSpec((1, 1, 1, self.shape.queries), lambda b, n, i, c, _: (b, n, 0, i))

    def looped(self, shape):
        group, block = self.N // self.K, (1, 1, self.units()[1], shape[-1])
        return pl.BlockSpec(block, lambda b, n, i, c, r: (b, n // group, self._chunk(b, i, c, r), 0))

    def mark_specs(self):
        return [
            pl.BlockSpec((1, 3, self.shape.queries), lambda b, n, i, c, _: (b, 0, i)),
            pl.BlockSpec((1, 2, self.units()[1]), lambda b, n, i, c, r: (b, 0, self._chunk(b, i, c, r))),
        ]


class _Keys(_Call):
    """Blocks of keys are held; chunks of queries are looped over, those of one head after the other."""

    @property
    def chunks(self) -> int:
        return self.T // self.units()[0]

    def units(self):
        return self.shape.queries * self.shape.tiles, self.shape.keys

    def ranges(self, q_marks, k_marks):
        return query_ranges(self.spec, q_marks, k_marks, self.shape.queries, self.shape.keys, square=self.square)

    def grid(self):
        return self.B, self.K, self.S // self.shape.keys, self.N // self.K * self.chunks

    def _chunk(self, b, j, turn, ranges):
        return _nearest(ranges, b * (self.S // self.shape.keys) + j, turn % self.chunks, self.shape.tiles)

    def _head(self, n, turn):
        return n * (self.N // self.K) + turn // self.chunks

    def held(self, shape):
        # Several parts of a group read the same keys, and have gradients each.
        parts = self.K // shape[1]
        return pl.BlockSpec((1, 1, self.shape.keys, shape[-1]), lambda b, n, j, c, _: (b, n // parts, j, 0))

    def looped(self, shape):
        block = (1, 1, self.units()[0], shape[-1])
        return pl.BlockSpec(block, lambda b, n, j, c, r: (b, self._head(n, c), self._chunk(b, j, c, r), 0))

    def looped_row(self, shape):
        block = (1, 1, 1, self.units()[0])
        return pl.BlockSpec(block, lambda b, n, j, c, r: (b, self._head(n, c), 0, self._chunk(b, j, c, r)))

    def whole(self, shape):
        # Once, not twice: it is written when the next group begins, and nothing waits for it.
        block = (1, self.N // self.K, *shape[2:])
        return pl.BlockSpec(block, lambda b, n, j, c, _: (b, n, 0, 0), pipeline_mode=pl.Buffered(1))

    def mark_specs(self):
        return [
            pl.BlockSpec((1, 3, self.units()[0]), lambda b, n, j, c, r: (b, 0, self._chunk(b, j, c, r))),
            pl.BlockSpec((1, 2, self.shape.keys), lambda b, n, j, c, _: (b, 0, j)),
        ]


def _nearest(ranges, block, chunk, tiles: int):
    """The chunk, or the nearest that has anything to see: one that is skipped is not fetched."""
    first, last = ranges[block * 4] // tiles, jnp.maximum(ranges[block * 4 + 3] - 1, 0) // tiles
    return jnp.clip(chunk, jnp.minimum(first, last), last)


def _even(length: int, most: int) -> int:
    """The size of equal tiles of at most ``most``, in whole lanes."""
    return _up(math.ceil(length / math.ceil(length / most)), LANES)


def _up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


def _pad(x, length: int, axis: int = 2):
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, length - x.shape[axis])
    return jnp.pad(x, widths)
