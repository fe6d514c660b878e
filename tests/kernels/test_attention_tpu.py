"""The TPU kernels, interpreted on a CPU, against the definition in value and gradient; the cost that they declare.

A program is compiled for shapes, types and what ``Spec`` says; masks and segments are its data.  So the grid is one of
programs, in which every two options meet, and each of them is run with every mask and every kind of rows that it can
have.  What this leaves out: that Mosaic compiles the kernels (``test_attention_tpu_compile.py``), and the hardware.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from functools import cache, partial

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.kernels.attention import api, reference, tpu
from jaxtrain.kernels.attention.flash import flash
from jaxtrain.kernels.attention.masks import Marks, Spec, make_marks, visible, visible_share

# It is compiling that takes time.
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

NAMES = ("out", "lse", "dq", "dk", "dv")
TILES = (128, 128)

# Masks of the same ``Spec.low``, ``Spec.high`` and ``Spec.in_order``.
MASKS = {
    "high": ("causal", "prefix"),
    "high, in order": ("causal",),
    "neither": ("bidirectional",),
    "both": ("window", "two-sided window", "prefix and window"),
}
ROWS = ("one", "padded", "packed", "tiny", "shuffled")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    masks: str = "high"
    lengths: tuple[int, int] = (300, 300)
    heads: tuple[int, int] = (2, 1)  # of keys, and of queries to each
    H: int = 64
    V: int = 64
    softcap: float = 0.0
    scale: float | None = None
    chunk: int | None = None  # tiles; None: all that there are
    fused: bool = True  # one kernel for the backward pass, or two
    dtype: str = "float32"

    def spec(self, mask: str) -> Spec:
        T, S = self.lengths
        return Spec(
            scale=self.scale or self.H**-0.5,
            softcap=self.softcap,
            low=self.masks.startswith("both"),
            high=self.masks != "neither",
            in_order=self.masks.endswith("in order"),
            share=visible_share(T, S, causal=is_causal(mask), window=window(mask, max(T, S))),
            tiles=TILES,
        )


VALUES = {
    "masks": tuple(MASKS),
    # Of 5 tiles, 4 need no mask where all tokens are of one segment: the kernels take these two at a time.
    "lengths": ((300, 300), (130, 650), (650, 130), (1, 7)),
    "heads": ((2, 1), (1, 3), (2, 2)),
    "H": (64, 80, 96, 128, 256),
    "V": ("equal", "smaller", "larger"),
    "softcap": (0.0, 1.5),
    "scale": (None, 0.1, -0.07),
    "chunk": (None, 1, 2),
    "fused": (True, False),
}
# A head's size enters only the blocks' shapes and how many tiles a chunk may have.
INDEPENDENT = ({"H", "masks"}, {"H", "lengths"})


def pairs(choice: dict) -> set:
    both = itertools.combinations(choice.items(), 2)
    return {(x, y) for x, y in both if {x[0], y[0]} not in INDEPENDENT}


@cache
def programs() -> list[Program]:
    """Few of them, such that any two values of two fields meet in one.  Greedy, from random tries."""
    rng, missing, found = random.Random(0), set(), []
    for values in itertools.product(*VALUES.values()):
        missing |= pairs(dict(zip(VALUES, values)))
    while missing:
        tries = [{name: rng.choice(values) for name, values in VALUES.items()} for _ in range(300)]
        best = max(tries, key=lambda choice: len(missing & pairs(choice)))
        missing -= pairs(best)
        V = int(best["H"] * {"equal": 1.0, "smaller": 0.75, "larger": 1.5}[best["V"]])
        found.append(Program(**best | {"V": V}))
    return found


def name_of(program: Program) -> str:
    return "-".join(str(value).replace(", ", "x") for value in dataclasses.astuple(program))


def is_causal(mask: str) -> bool:
    return mask not in ("bidirectional", "two-sided window")


def window(mask: str, length: int) -> int:
    """0: none.  In long rows so wide that some tiles lie within."""
    return (3 if length < 10 else 40 if length <= 300 else 400) if "window" in mask else 0


def kinds(program: Program) -> list[tuple[str, str]]:
    """The masks and rows whose programs are this one."""
    rows = [kind for kind in ROWS if kind != "shuffled" or not program.masks.endswith("in order")]
    return list(itertools.product(MASKS[program.masks], rows))


def rows_of(kind: str, B: int, length: int, rng) -> tuple[np.ndarray, np.ndarray]:
    """segments, positions, int32 ``[B, length]``."""
    if kind == "one":
        segments = np.ones((B, length), np.int32)
    elif kind == "tiny":
        segments = np.cumsum(rng.random((B, length)) < 0.4, axis=1) + 1
    else:
        segments = np.sort(rng.integers(1, 5, (B, length)), axis=1)
    starts = np.array([[np.argmax(row == segment) for segment in row] for row in segments])
    positions = np.arange(length) - starts
    if kind == "padded":
        segments[0, : length // 7], segments[:, length - length // 10 :] = 0, 0
    if kind == "shuffled":
        order = rng.permutation(length)
        segments, positions = segments[:, order], positions[:, order]
        segments[:, length // 2] = 0
    return segments.astype(np.int32), positions.astype(np.int32)


def marks_of(program: Program, mask: str, rows: str, seed: int = 0) -> Marks:
    """Queries are the last T of the longer of both, keys the first S.  Where there are segments, one query is blind."""
    rng, (T, S), B = np.random.default_rng(seed), program.lengths, 2
    length = max(T, S)
    segments, positions = rows_of(rows, B, length, rng)
    q_segments, q_positions = segments[:, length - T :].copy(), positions[:, length - T :]
    if rows != "one":
        q_segments[1, T // 2] = 777
    prefix = None
    if "prefix" in mask:
        lengths = rng.integers(0, length, (B, 1000))  # of segments
        prefix = jnp.asarray(np.take_along_axis(lengths, q_segments, axis=1), jnp.int32)
    tokens = (jnp.asarray(x) for x in (q_positions, positions[:, :S], q_segments, segments[:, :S]))
    marks, low, high = make_marks(*tokens, causal=is_causal(mask), window=window(mask, length), q_prefix=prefix)
    assert (low, high) == (program.spec(mask).low, program.spec(mask).high)
    return marks


def arrays_of(program: Program, seed: int = 1, B: int = 2):
    """q, k, v, and the gradients of out and lse."""
    rng, (T, S), (K, G) = np.random.default_rng(seed), program.lengths, program.heads
    shapes = (B, K * G, T, program.H), (B, K, S, program.H), (B, K, S, program.V), (B, K * G, T, program.V)
    q, k, v, d_out = (jnp.asarray(rng.normal(size=shape), program.dtype) for shape in shapes)
    return q, k, v, d_out, jnp.asarray(rng.normal(size=d_out.shape[:-1]), jnp.float32)


def compiled(attend, spec: Spec):
    """``NAMES`` of what attend(spec, q, k, v, marks) gives."""

    @jit
    def run(q, k, v, d_out, d_lse, marks):
        (out, lse), pull = jax.vjp(lambda *qkv: attend(spec, *qkv, marks), q, k, v)
        return dict(zip(NAMES, (out, lse, *pull((d_out, jnp.where(jnp.isneginf(lse), 0.0, d_lse)))), strict=True))

    return run


def by_kernels(spec, q, k, v, marks):
    return flash(tpu, spec, q, k, v, marks)


def by_reference(spec, q, k, v, marks):
    return reference.attention(q, k, v, visible(marks), scale=spec.scale, softcap=spec.softcap)


def by_hand(spec: Spec, q, k, v, d_out, d_lse, marks) -> dict[str, np.ndarray]:
    """``NAMES`` in float64, from the formulas at the head of flash.py."""
    q, k, v, d_out, d_lse = (np.asarray(x, np.float64) for x in (q, k, v, d_out, d_lse))
    G, mask = q.shape[1] // k.shape[1], np.asarray(visible(marks))[:, None]
    k, v = (np.repeat(x, G, axis=1) for x in (k, v))
    logits, slope = spec.scale * q @ k.swapaxes(-1, -2), 1.0
    if spec.softcap:
        tanh = np.tanh(logits / spec.softcap)
        logits, slope = spec.softcap * tanh, 1 - tanh**2
    weights = np.where(mask, np.exp(logits), 0)
    total = weights.sum(-1, keepdims=True)
    p = weights / np.where(total > 0, total, 1)
    out = p @ v
    delta = (out * d_out).sum(-1) - d_lse * (total[..., 0] > 0)
    ds = p * (d_out @ v.swapaxes(-1, -2) - delta[..., None]) * slope * spec.scale

    def grouped(x):
        return x.reshape(x.shape[0], -1, G, *x.shape[2:]).sum(2)

    with np.errstate(divide="ignore"):
        lse = np.log(total[..., 0])
    return dict(zip(NAMES, (out, lse, ds @ k, grouped(ds.swapaxes(-1, -2) @ q), grouped(p.swapaxes(-1, -2) @ d_out))))


def check_blind(found: dict, marks: Marks) -> None:
    """What sees nothing, or is seen by nothing, is exactly nothing; all else is finite."""
    mask = np.asarray(visible(marks))
    blind_BT, unseen_BS = ~mask.any(2), ~mask.any(1)
    for name, x in found.items():
        x = np.asarray(x, np.float64).swapaxes(1, 2)
        hidden = x[unseen_BS if name in ("dk", "dv") else blind_BT]
        assert (hidden == (-np.inf if name == "lse" else 0)).all(), name
        assert np.isfinite(x[~(unseen_BS if name in ("dk", "dv") else blind_BT)]).all(), name


def check(found: dict, wanted: dict, what: str = "") -> None:
    """Equal to 1e-5 of the largest number, or of 1 where all are smaller."""
    for name in NAMES:
        assert found[name].shape == wanted[name].shape and found[name].dtype == wanted[name].dtype
        largest = np.max(np.abs(wanted[name]), initial=1.0, where=np.isfinite(wanted[name]))
        np.testing.assert_allclose(found[name], wanted[name], rtol=0, atol=1e-5 * largest, err_msg=f"{name}, {what}")


@pytest.fixture
def prepare(monkeypatch):
    """Makes the backend take a program's way: how much of the looped side is in VMEM, and one or two kernels."""

    def prepare(program: Program) -> None:
        if program.chunk is not None:
            lanes = sum(-(-size // 128) * 128 for size in (program.H, program.V))
            monkeypatch.setattr(tpu, "CHUNK_BYTES", program.chunk * 128 * lanes * jnp.dtype(program.dtype).itemsize)
        chip = dataclasses.replace(tpu.chip(), fused=2**30 if program.fused else 0)
        monkeypatch.setattr(tpu, "chip", lambda: chip)

    return prepare


@pytest.mark.parametrize("program", programs(), ids=name_of)
def test_value_and_gradient_equal_the_reference(program, prepare):
    prepare(program)
    arrays = arrays_of(program)
    mine, theirs = (compiled(attend, program.spec(MASKS[program.masks][0])) for attend in (by_kernels, by_reference))
    for mask, rows in kinds(program):
        marks = marks_of(program, mask, rows)
        found = mine(*arrays, marks)
        check(found, theirs(*arrays, marks), f"{mask}, {rows}")
        check_blind(found, marks)


def test_a_group_of_heads_whose_gradient_does_not_fit_is_taken_in_parts(prepare, monkeypatch):
    program = Program(heads=(2, 4))
    prepare(program)
    T, H = program.lengths[0], program.H
    two_heads = dataclasses.replace(tpu.chip(), fused=2 * H * (T + 128) * (4 + 4))
    monkeypatch.setattr(tpu, "chip", lambda: two_heads)
    assert [tpu.group_parts(group, T, H, 4) for group in (1, 2, 3, 4, 8)] == [1, 1, 3, 2, 4]
    assert tpu.group_parts(8, 4 * T, H, 4) is None
    assert tpu.group_parts(3, T, H, 2) == 3 and tpu.group_parts(4, T, H, 2) == 2
    arrays = arrays_of(program)
    mine, theirs = (compiled(attend, program.spec(MASKS[program.masks][0])) for attend in (by_kernels, by_reference))
    for mask, rows in kinds(program):
        marks = marks_of(program, mask, rows)
        check(mine(*arrays, marks), theirs(*arrays, marks), f"{mask}, {rows}")


@jax.custom_vjp
def _rounded(logits):
    return logits


_rounded.defvjp(lambda x: (x, None), lambda _, g: (g.astype(jnp.bfloat16).astype(g.dtype),))

# How much farther from float64 than the reference a gradient may be.  The kernels' ``delta`` is of the output after it
# was rounded to bfloat16, as in every FlashAttention that does not keep it in float32; with an exact ``delta`` their
# errors are the reference's.  Where the reference also rounds ``scale * q``, it is the kernels that are nearer.
DELTA = 1.15
BFLOAT16 = [
    Program(masks="both", lengths=(650, 130), heads=(2, 2), chunk=1, dtype="bfloat16"),
    Program(masks="high, in order", heads=(1, 3), H=128, V=96, softcap=1.5, dtype="bfloat16"),
    Program(masks="neither", lengths=(130, 650), H=256, V=256, chunk=2, fused=False, dtype="bfloat16"),
    Program(masks="high", H=80, V=120, scale=0.1, fused=False, dtype="bfloat16"),
]


@pytest.mark.parametrize("program", BFLOAT16, ids=name_of)
def test_bfloat16_is_as_near_to_float64_as_the_reference(program, prepare, monkeypatch):
    """Root mean square errors of all masks and rows together.

    The reference is as on matrix units of bfloat16: there the gradient of the logits is rounded before it is multiplied
    by keys or queries, whereas a CPU multiplies in float32.
    """
    prepare(program)
    plain = reference.cap
    monkeypatch.setattr(reference, "cap", lambda logits, softcap: plain(_rounded(logits), softcap))
    arrays, spec = arrays_of(program), program.spec(MASKS[program.masks][0])
    runs = [compiled(attend, spec) for attend in (by_kernels, by_reference)]
    errors = {name: np.zeros(2) for name in NAMES}
    for mask, rows in kinds(program)[::2]:
        marks = marks_of(program, mask, rows)
        found, wanted = [run(*arrays, marks) for run in runs], by_hand(spec, *arrays, marks)
        check_blind(found[0], marks)
        for name, exact in wanted.items():
            seen = np.isfinite(exact)
            for i in range(2):
                assert found[i][name].dtype == (jnp.float32 if name == "lse" else jnp.bfloat16)
                errors[name][i] += np.mean((np.asarray(found[i][name], np.float64)[seen] - exact[seen]) ** 2)
    for name, limit in zip(NAMES, (1.0, 1.1, DELTA, DELTA, 1.001), strict=True):
        mine, theirs = np.sqrt(errors[name])
        assert 0 < mine <= limit * theirs + 1e-7, (name, mine, theirs)


def test_programs_cover_what_they_say():
    found = programs()
    assert len(found) < 30
    assert {(p.masks, p.lengths) for p in found} == set(itertools.product(MASKS, VALUES["lengths"]))
    assert {(p.H, p.chunk) for p in found} == set(itertools.product(VALUES["H"], VALUES["chunk"]))


def calls(function, *args) -> dict[str, dict]:
    """What each Pallas call in a function is given, by name."""

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "pallas_call":
                yield equation.params["name"], equation.params
            else:
                for inner in jax.extend.core.jaxprs_in_params(equation.params):
                    yield from walk(inner)

    return dict(walk(jax.make_jaxpr(function)(*args).jaxpr))


@pytest.mark.parametrize("fused", [True, False])
def test_chunks_and_kernels_are_what_a_program_says(fused, prepare):
    program = Program(lengths=(130, 650), chunk=2, fused=fused)
    prepare(program)
    marks = marks_of(program, "causal", "one")
    q, k, v, *gradients = arrays_of(program)
    attend = partial(by_kernels, program.spec("causal"), marks=marks)
    found = calls(lambda *qkv: jax.vjp(attend, *qkv)[1](tuple(gradients)), q, k, v)
    grids = {name: params["grid_mapping"].grid for name, params in found.items()}
    wanted = {"flash_forward": (2, 2, 2, 3)}  # rows, heads, blocks of 128 queries, chunks of 256 keys
    wanted |= {"flash_backward": (2, 2, 6, 1)} if fused else {"flash_dq": (2, 2, 2, 3), "flash_dkv": (2, 2, 6, 1)}
    assert grids == wanted


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("lengths", [(650, 650), (130, 650), (650, 130)], ids=str)
@pytest.mark.parametrize(("causal", "width"), [(True, 0), (False, 0), (True, 40), (False, 40), (True, 400)])
def test_declared_flops_are_those_that_the_mask_leaves(fused, lengths, causal, width, prepare):
    (T, S), B, N, H, V = lengths, 2, 4, 64, 96
    prepare(Program(fused=fused))
    ids = [jnp.arange(max(T, S), dtype=jnp.int32)[None].repeat(B, 0)[:, -T:], jnp.arange(S, dtype=jnp.int32)[None]]
    kinds = dict(q_positions=ids[0], k_positions=ids[1].repeat(B, 0), causal=causal, window=width)
    kinds |= dict(q_segments=jnp.ones((B, T), jnp.int32), k_segments=jnp.ones((B, S), jnp.int32))
    q, k, v = jnp.zeros((B, T, N, H)), jnp.zeros((B, S, 2, H)), jnp.zeros((B, S, 2, V))

    def attend(q, k, v):
        return jnp.sum(api.attention(q, k, v, **kinds, backend="tpu", tiles=TILES))

    if T > S:  # ``visible_share`` counts queries from the first key on
        kinds["q_positions"] = jnp.arange(T, dtype=jnp.int32)[None].repeat(B, 0)
    seen = visible(
        make_marks(
            *(kinds[x] for x in ("q_positions", "k_positions", "q_segments", "k_segments")), causal=causal, window=width
        )[0]
    )
    products = N * int(jnp.sum(seen)) * 2
    wanted = {"flash_forward": H + V}
    wanted |= {"flash_backward": 3 * H + 2 * V} if fused else {"flash_dq": 2 * H + V, "flash_dkv": 2 * H + 2 * V}
    found = calls(jax.grad(attend, (0, 1, 2)), q, k, v)
    assert found.keys() == wanted.keys()
    for name, params in found.items():
        cost = params["cost_estimate"]
        assert cost.flops == pytest.approx(products * wanted[name], rel=0.05), name
        assert cost.transcendentals == pytest.approx(products / 2, rel=0.05), name
        assert cost.bytes_accessed > sum(x.size * 4 for x in (q, k, v))


@pytest.mark.parametrize("mask", ["causal", "window"])
def test_sinks_and_the_log_sum_exp(mask):
    """Through ``attention``, with the gradients of q, k, v and the sinks."""
    B, T, N, K, H = 2, 150, 4, 2, 64
    rng = np.random.default_rng(0)
    segments, positions = (jnp.asarray(x) for x in rows_of("padded", B, T, rng))
    ids = dict(q_positions=positions, k_positions=positions, q_segments=segments, k_segments=segments)
    shapes = (B, T, N, H), (B, T, K, H), (B, T, K, H), (N,), (B, T, N, H), (B, T, N)
    *args, on_out, on_lse = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)

    def run(backend, tiles):
        def attend(q, k, v, sinks):
            options = dict(window=window(mask, T), in_order=True, backend=backend, tiles=tiles)
            out, lse = api.attention(q, k, v, **ids, **options, sinks=sinks, return_lse=True)
            return jnp.sum(out * on_out) + jnp.sum(jnp.where(jnp.isneginf(lse), 0.0, lse) * on_lse), (out, lse)

        grads, (out, lse) = jit(jax.grad(attend, (0, 1, 2, 3), has_aux=True))(*args)
        return (*grads, out, lse)

    for mine, theirs in zip(run("tpu", TILES), run("xla", None), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5)


def test_refusals_give_the_reason():
    q = jax.ShapeDtypeStruct((1, 1, 8, 64), jnp.bfloat16)
    half, wide = (jax.ShapeDtypeStruct(q.shape, dtype) for dtype in (jnp.float16, jnp.float32))
    assert tpu.refusal(Spec(scale=1.0), q, q, q) is None
    assert "float16" in tpu.refusal(Spec(scale=1.0), half, half, half)
    assert "one type" in tpu.refusal(Spec(scale=1.0), q, wide, wide)
    assert "scale" in tpu.refusal(Spec(scale=0.0), q, q, q)
    x, ids = jnp.zeros((1, 8, 1, 64), jnp.float16), jnp.ones((1, 8), jnp.int32)
    with pytest.raises(ValueError, match=r"attention backend 'tpu' cannot run here: .*float16"):
        api.attention(x, x, x, q_positions=ids, k_positions=ids, q_segments=ids, k_segments=ids, backend="tpu")
