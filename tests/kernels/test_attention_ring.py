"""A sequence split over devices: ring and all-gather against one device, in value and gradient."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import socket
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxtrain.kernels.attention import api, blocked, on_mesh, reference
from jaxtrain.kernels.attention.masks import Spec, make_marks, visible
from jaxtrain.kernels.attention.ring import Deal
from jaxtrain.sharding import DEFAULT_RULES, MeshConfig, make_mesh

jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@dataclasses.dataclass(frozen=True)
class Dense:
    """A backend that holds every logit: quick to compile, easy to read.

    strict: NaN comes of a call in which the mask leaves nothing at all.
    """

    strict: bool = False

    def forward(self, spec, q_BNTH, k_BKSH, v_BKSV, marks):
        mask = visible(marks)
        out, lse = reference.attention(q_BNTH, k_BKSH, v_BKSV, mask, scale=spec.scale, softcap=spec.softcap)
        return self.poisoned(mask, out), lse

    def backward(self, spec, q_BNTH, k_BKSH, v_BKSV, marks, lse_BNT, delta_BNT, d_out_BNTV):
        """The formulas at the head of flash.py."""
        B, N = q_BNTH.shape[:2]
        K = k_BKSH.shape[1]
        q, lse, delta, d_out = (x.reshape(B, K, N // K, *x.shape[2:]) for x in (q_BNTH, lse_BNT, delta_BNT, d_out_BNTV))
        mask = visible(marks)[:, None, None]
        logits = reference.cap(jnp.einsum("bkgth,bksh->bkgts", q, k_BKSH) * spec.scale, spec.softcap)
        p = jnp.exp(jnp.where(mask, logits, -jnp.inf) - lse[..., None])
        ds = p * (jnp.einsum("bkgtv,bksv->bkgts", d_out, v_BKSV) - delta[..., None]) * spec.scale
        if spec.softcap:
            ds *= 1 - jnp.square(logits / spec.softcap)
        ds = self.poisoned(mask, ds)
        dq = jnp.einsum("bkgts,bksh->bkgth", ds, k_BKSH).reshape(q_BNTH.shape)
        return dq, jnp.einsum("bkgts,bkgth->bksh", ds, q), jnp.einsum("bkgts,bkgtv->bksv", p, d_out)

    def poisoned(self, mask, x):
        return jnp.where(jnp.any(mask), x, jnp.nan) if self.strict else x


@dataclasses.dataclass(frozen=True)
class Case:
    T: int = 32
    S: int = 32
    N: int = 4
    K: int = 2
    window: int = 0
    causal: bool = True
    softcap: float = 0.0
    prefix: bool = False
    rows: str = "packed"


CASES = {
    "one document": Case(rows="one"),
    "packed": Case(),
    "window": Case(window=5),
    "prefix": Case(prefix=True),
    "bidirectional": Case(causal=False, softcap=0.7),
    "shuffled": Case(rows="shuffled"),
    "more keys": Case(T=13, S=29),
    "odd length": Case(T=27, S=27, window=9),
}


def make(case: Case, B: int = 2, H: int = 4, V: int = 3):
    """(spec, (q, k, v), marks): segments cross the borders of chunks, and a row has padding at its end."""
    rng = np.random.default_rng(3)
    S = case.S
    segments = np.ones((B, S), np.int32)
    if case.rows != "one":
        segments = np.sort(rng.integers(1, 4, (B, S)), axis=1).astype(np.int32)
        segments[0, -5:] = 0
    starts = np.array([[np.argmax(row == s) for s in row] for row in segments])
    positions = (np.arange(S) - starts).astype(np.int32)
    if case.rows == "shuffled":
        order = rng.permutation(S)
        segments, positions = segments[:, order], positions[:, order]
    last = slice(S - case.T, S)
    marks, low, high = make_marks(
        *map(jnp.asarray, (positions[:, last], positions, segments[:, last], segments)),
        causal=case.causal,
        window=case.window,
        q_prefix=jnp.asarray(rng.integers(0, 12, (B, case.T))) if case.prefix else None,
    )
    shapes = ((B, case.N, case.T, H), (B, case.K, S, H), (B, case.K, S, V))
    arrays = tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    in_order = case.causal and not case.prefix and case.rows != "shuffled" and case.T == S
    return Spec(scale=0.6, softcap=case.softcap, low=low, high=high, in_order=in_order), arrays, marks


def differentiated(function):
    """(q, k, v, marks) -> out, lse, dq, dk, dv for fixed gradients of both results."""

    def run(arrays, marks):
        (out, lse), pull = jax.vjp(lambda *qkv: function(*qkv, marks), *arrays)
        rng = np.random.default_rng(5)
        d_out, d_lse = (rng.normal(size=x.shape).astype(np.float32) for x in (out, lse))
        return out, lse, *pull((d_out, jnp.where(jnp.isneginf(lse), 0.0, d_lse)))

    return run


def by_reference(spec):
    def function(q, k, v, marks):
        return reference.attention(q, k, v, visible(marks), scale=spec.scale, softcap=spec.softcap)

    return differentiated(function)


def on(spec, across, backend=Dense()):
    return differentiated(partial(on_mesh.attend, backend, spec, rules=DEFAULT_RULES, across=across))


def check(found, wanted):
    for name, x, y in zip(("out", "lse", "dq", "dk", "dv"), found, wanted, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("across", ["ring", "gather"])
@pytest.mark.parametrize("name", CASES)
def test_equals_one_device(name, across):
    """A ring skips every pair of chunks of which nothing is visible, where rows are in order."""
    spec, arrays, marks = make(CASES[name])
    backend = Dense(strict=across == "ring" and name != "shuffled")
    with jax.set_mesh(make_mesh(MeshConfig(context=4))):
        found = jit(on(spec, across, backend))(arrays, marks)
    check(found, jit(by_reference(spec))(arrays, marks))


MESHES = {
    "context2": MeshConfig(context=2),
    "context3": MeshConfig(context=3),
    "context8": MeshConfig(context=8),
    "context2-tensor2-data2": MeshConfig(context=2, tensor=2, data=2),
    "context2-tensor4": MeshConfig(context=2, tensor=4),  # more than key heads
}


@pytest.mark.parametrize("across", ["ring", "gather"])
@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
def test_equals_one_device_on_any_mesh(mesh, across):
    spec, arrays, marks = make(Case())
    with jax.set_mesh(make_mesh(mesh)):
        found = jit(on(spec, across))(arrays, marks)
    check(found, jit(by_reference(spec))(arrays, marks))


@pytest.mark.parametrize("across", ["ring", "gather"])
def test_equals_one_device_with_blocks(across, monkeypatch):
    monkeypatch.setattr(blocked, "QUERIES", 3)
    monkeypatch.setattr(blocked, "KEYS", 4)
    spec, arrays, marks = make(Case(softcap=0.9))
    with jax.set_mesh(make_mesh(MeshConfig(context=4, data=2))):
        found = jit(on(spec, across, blocked))(arrays, marks)
    check(found, jit(by_reference(spec))(arrays, marks))


@pytest.mark.parametrize("n", [2, 3, 4, 7, 8])
def test_the_zigzag_deals_every_chunk_once(n):
    deal = Deal(("context",), n, 2)
    held = {d: {int(deal.chunk(d, part)) for part in range(2)} for d in range(n)}
    assert held == {d: {d, 2 * n - 1 - d} for d in range(n)}
    # The first half of every device's contiguous part is an even chunk, the second an odd one.
    assert all(deal.chunk(d, part) % 2 == part for d in range(n) for part in range(2))


def counts(case, n=4):
    """{(pass, device): how many pairs of chunks it computes}."""
    spec, arrays, marks = make(case, B=1)
    seen = []

    @dataclasses.dataclass(frozen=True)
    class Counting(Dense):
        def forward(self, *args):
            jax.debug.callback(lambda d: seen.append(("forward", int(d))), jax.lax.axis_index("context"))
            return super().forward(*args)

        def backward(self, *args):
            jax.debug.callback(lambda d: seen.append(("backward", int(d))), jax.lax.axis_index("context"))
            return super().backward(*args)

    with jax.set_mesh(make_mesh(MeshConfig(context=n))):
        jax.block_until_ready(jit(on(spec, "ring", Counting()))(arrays, marks))
    jax.effects_barrier()
    return {(kind, d): seen.count((kind, d)) for kind in ("forward", "backward") for d in range(n)}


def test_causal_work_is_the_same_on_every_device():
    """2n + 1 pairs of chunks of the 4n, forward and backward, as the head of ring.py says."""
    assert set(counts(Case(rows="one")).values()) == {9}


def test_a_window_and_segments_skip_chunks():
    """A window of 3 reaches from any of eight chunks of four tokens into the one before."""
    assert sum(counts(Case(rows="one", window=3)).values()) == 2 * (8 + 7)
    packed = sum(counts(Case()).values())
    assert 2 * 8 <= packed < 2 * 4 * 9


@pytest.mark.parametrize("across", ["ring", "gather"])
def test_what_a_device_holds(across):
    """Nothing of the length of the sequence in a ring; with either nothing of its square."""
    spec, arrays, marks = make(Case(T=512, S=512, N=2, rows="one"))
    mesh = make_mesh(MeshConfig(context=8))

    def placed(dim):
        spec = PartitionSpec(*[None] * dim, "context")
        return lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    def loss(arrays, marks):
        return jnp.sum(jnp.sin(on_mesh.attend(blocked, spec, *arrays, marks, rules=DEFAULT_RULES, across=across)[0]))

    with jax.set_mesh(mesh):
        args = jax.tree.map(placed(2), arrays), jax.tree.map(placed(1), marks)
        text = jit(jax.grad(loss)).lower(*args).compile().as_text()
    assert ("reduce-scatter" in text) == (across == "gather")
    sizes = [[int(n) for n in shape.split(",")] for shape in re.findall(r"f32\[([\d,]+)\]", text)]
    local = {"ring": 64, "gather": 512}[across]
    assert max(max(shape) for shape in sizes) == local
    assert max(np.prod(shape) for shape in sizes) <= 2 * 2 * 8 * local


def test_the_choice():
    assert [on_mesh.choose_across(n) for n in (2, 3, 4, 16)] == ["gather", "ring", "ring", "ring"]
    ids = jnp.ones((1, 4), jnp.int32)
    kinds = dict(q_positions=ids, k_positions=ids, q_segments=ids, k_segments=ids)
    with pytest.raises(ValueError, match="attention across 'rings' is unknown"):
        api.attention(*(jnp.ones((1, 4, 1, 2)),) * 3, **kinds, across="rings")


def test_auto_takes_the_ring_where_the_sequence_is_split():
    x, ids = jnp.ones((1, 32, 2, 4)), jnp.ones((1, 32), jnp.int32)

    def run(q, k, v, ids, **options):
        return api.attention(q, k, v, q_positions=ids, k_positions=ids, q_segments=ids, k_segments=ids, **options)

    def text(config, **options):
        with jax.set_mesh(make_mesh(config)):
            return jit(partial(run, **options)).lower(x, x, x, ids).compile().as_text()

    ring = text(MeshConfig(context=4))
    assert "collective-permute" in ring
    assert "collective-permute" not in text(MeshConfig(data=4))
    assert "collective-permute" not in text(MeshConfig(context=4), backend="xla")
    assert text(MeshConfig(context=4), across="gather") != ring


@pytest.mark.slow
def test_transfers_take_place_during_the_work(tmp_path):
    """As a v5p slice would run it: what goes round goes while the kernels of four pairs of chunks run."""
    pytest.importorskip("libtpu")
    root = Path(__file__).resolve().parents[2]
    command = [
        sys.executable,
        root / "benchmarks" / "ring_attention.py",
        "--backend",
        "tpu",
        "--json",
        tmp_path / "out",
    ]
    env = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads((tmp_path / "out").read_text())
    sums = [row for row in rows if "theory" in row]
    assert len(sums) == 4 and all(row["bytes"] == row["theory"] for row in sums)
    ring = [row for row in rows if row["to"] == "next" and "runs" in row]
    assert {row["where"] for row in ring} == {"loop", "once"}
    assert all(row["asynchronous"] and row["meanwhile"]["conditional"] == 4 for row in ring)


PROCESS = """
import sys
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.config.update("jax_default_matmul_precision", "highest")
jax.distributed.initialize(f"127.0.0.1:{sys.argv[1]}", num_processes=2, process_id=int(sys.argv[2]),
                           heartbeat_timeout_seconds=20)
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
import test_attention_ring as t
from jaxtrain.sharding import MeshConfig, make_mesh

assert len(jax.devices()) == 4 and jax.process_count() == 2
mesh = make_mesh(MeshConfig(context=4))
spec, arrays, marks = t.make(t.Case())
wanted = jax.device_get(t.jit(t.by_reference(spec))(arrays, marks))
whole = NamedSharding(mesh, P())
place = lambda x: jax.make_array_from_callback(x.shape, whole, lambda at: np.asarray(x)[at])
arrays, marks = jax.tree.map(place, jax.device_get((arrays, marks)))
with jax.set_mesh(mesh):
    for across in ("ring", "gather"):
        found = jax.jit(t.on(spec, across), out_shardings=whole)(arrays, marks)
        t.check([np.asarray(x.addressable_data(0)) for x in found], wanted)
print("equal", flush=True)
"""


def test_two_processes_equal_one_device():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    here = Path(__file__).resolve().parent
    env = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "PYTHONPATH": os.pathsep.join([str(here), str(here.parents[1])]),
    }
    command = [sys.executable, "-c", textwrap.dedent(PROCESS), port]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    children = [subprocess.Popen([*command, str(i)], env=env, **pipes) for i in range(2)]
    try:
        said = [child.communicate(timeout=300)[0] for child in children]
    finally:
        for child in children:
            child.kill()
    assert all(child.returncode == 0 for child in children), said[0][-3000:] + said[1][-3000:]
    assert all("equal" in lines for lines in said)
