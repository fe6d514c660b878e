"""The GPU kernels through NVIDIA's compiler, without a GPU: wherever JAX's CUDA plugin is installed.

    pip install jax-cuda12-plugin jax-cuda12-pjrt nvidia-cuda-nvcc-cu12      # of the version of JAX

The compiler refuses what does not fit into a chip's shared memory.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from jaxtrain.kernels.attention import gpu
from jaxtrain.kernels.attention.flash import flash
from jaxtrain.kernels.attention.masks import Marks, Spec
from jaxtrain.plan.gpus import TARGETS, Target, described, installed

A10 = Target(
    kind="NVIDIA A10",
    capability=(8, 6),
    cores=72,
    units=128,
    shared=102400,
    block=101376,
    l2=6 * 2**20,
    clock_ghz=1.7,
    memory=24 * 10**9,
    rate=600e9,
)
CHIPS = {target.kind: target for target in (A10, *TARGETS.values())}


@pytest.mark.slow
@pytest.mark.skipif(not installed(), reason="JAX's CUDA plugin is not installed")
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
@pytest.mark.parametrize(
    ("size", "dtype"),
    [((64, 64), jnp.bfloat16), ((128, 128), jnp.bfloat16), ((256, 256), jnp.bfloat16), ((192, 128), jnp.float32)],
    ids=str,
)
@pytest.mark.parametrize("kind", CHIPS)
def test_compiles(kind, size, dtype):
    mesh = jax.sharding.Mesh(described(CHIPS[kind], "1x1x1"), ("data",))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    (H, V), B, N, K, T = size, 1, 4, 2, 4096

    def like(shape, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=whole)

    def run(q, k, v, marks):
        out, pull = jax.vjp(lambda *x: flash(gpu, spec, *x, marks)[0], q, k, v)
        return pull(out)

    spec = Spec(scale=1.0, low=True, softcap=20.0, in_order=True)
    marks = Marks(**{name: like((B, T)) for name in Marks.__dataclass_fields__})
    arrays = like((B, N, T, H), dtype), like((B, K, T, H), dtype), like((B, K, T, V), dtype)
    with jax.set_mesh(mesh):
        compiled = jax.jit(run).lower(*arrays, marks).compile()
    assert compiled.as_text().count("__gpu$xla.gpu.triton") == 3
    heads = sum(x.size * x.dtype.itemsize for x in (*arrays, *arrays))
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * heads  # nothing of T x T
