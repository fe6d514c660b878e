"""The GPU kernels through NVIDIA's compiler, without a GPU: wherever JAX's CUDA plugin is installed.

    pip install jax-cuda12-plugin jax-cuda12-pjrt nvidia-cuda-nvcc-cu12      # of the version of JAX

The compiler refuses what does not fit into a chip's shared memory.
"""

from __future__ import annotations

import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies

from jaxtrain.kernels.attention import gpu
from jaxtrain.kernels.attention.flash import flash
from jaxtrain.kernels.attention.masks import Marks, Spec

PLUGIN = any(
    importlib.util.find_spec("jax_plugins") and importlib.util.find_spec(f"jax_plugins.xla_cuda{version}")
    for version in (12, 13)
)

# Compute capability, cores, bytes of shared memory a core and a block at most.
CHIPS = {
    "NVIDIA A10": ((8, 6), 72, 102400, 101376),
    "NVIDIA A100-SXM4-80GB": ((8, 0), 108, 167936, 166912),
    "NVIDIA H100 80GB HBM3": ((9, 0), 132, 233472, 232448),
}
CONFIG = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 core_count: {cores} fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_core: {core} shared_memory_per_block_optin: {block}
  memory_bandwidth: 2000000000000 l2_cache_size: 41943040 clock_rate_ghz: 1.4 device_memory_size: 25769803776
  cuda_compute_capability {{ major: {major} minor: {minor} }}
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} runtime_version {{ major: 12 minor: 8 }}
device_description_str: "{kind}"
"""


@pytest.mark.slow
@pytest.mark.skipif(not PLUGIN, reason="JAX's CUDA plugin is not installed")
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
@pytest.mark.parametrize(
    ("size", "dtype"),
    [((64, 64), jnp.bfloat16), ((128, 128), jnp.bfloat16), ((256, 256), jnp.bfloat16), ((192, 128), jnp.float32)],
    ids=str,
)
@pytest.mark.parametrize("kind", CHIPS)
def test_compiles(kind, size, dtype):
    (major, minor), cores, core, block = CHIPS[kind]
    config = CONFIG.format(kind=kind, major=major, minor=minor, cores=cores, core=core, block=block)
    chip = topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=config)
    mesh = jax.sharding.Mesh(chip.devices, ("data",))
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
