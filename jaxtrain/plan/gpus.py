"""GPUs that this machine does not have, described to XLA's compiler, which JAX's CUDA plugin brings along."""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import Any

from jaxtrain.plan.chips import CHIPS, Slice

PLUGINS = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """What the compiler is told of one GPU, by NVIDIA's tuning guides (docs.nvidia.com/cuda/ampere-tuning-guide and
    hopper-tuning-guide) and data sheets, as XLA's own descriptions have it (openxla/xla,
    xla/backends/gpu/target_config/specs).

    kind: ``device_kind``.  capability: major and minor.  cores: streaming multiprocessors, each with ``units`` float32
    units and ``shared`` bytes of shared memory, of which a block gets ``block`` at most.  l2: bytes.  rate: bytes a
    second.
    """

    kind: str
    capability: tuple[int, int]
    cores: int
    units: int
    shared: int
    block: int
    l2: int
    clock_ghz: float
    memory: int
    rate: float

    def config(self) -> str:
        """A ``GpuTargetConfigProto`` as text."""
        limits = "threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048"
        grid = "block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535"
        return f"""
gpu_device_info {{
  {limits} {grid} core_count: {self.cores} fpus_per_core: {self.units}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_core: {self.shared} shared_memory_per_block_optin: {self.block}
  memory_bandwidth: {self.rate:.0f} l2_cache_size: {self.l2} clock_rate_ghz: {self.clock_ghz}
  device_memory_size: {self.memory}
  cuda_compute_capability {{ major: {self.capability[0]} minor: {self.capability[1]} }}
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} runtime_version {{ major: 12 minor: 8 }}
device_description_str: "{self.kind}"
"""


_HOPPER = dict(capability=(9, 0), cores=132, units=128, shared=233472, block=232448, l2=50 * 2**20, clock_ghz=1.98)
TARGETS = {
    "a100": Target(
        kind="NVIDIA A100-SXM4-80GB",
        capability=(8, 0),
        cores=108,
        units=64,
        shared=167936,
        block=166912,
        l2=40 * 2**20,
        clock_ghz=1.41,
        memory=85_100_068_864,
        rate=CHIPS["a100"].hbm_rate,
    ),
    "h100": Target(kind="NVIDIA H100 80GB HBM3", memory=84_942_979_072, rate=CHIPS["h100"].hbm_rate, **_HOPPER),
    "h200": Target(kind="NVIDIA H200", memory=151_397_597_184, rate=CHIPS["h200"].hbm_rate, **_HOPPER),
}


def installed() -> bool:
    """Whether JAX's CUDA plugin is."""
    return importlib.util.find_spec("jax_plugins") is not None and any(map(importlib.util.find_spec, PLUGINS))


def described(target: Target, topology: str) -> list[Any]:
    """Devices of ``topology``, SLICESxHOSTSxGPUS; no GPU is needed."""
    from jax.experimental import topologies

    return list(topologies.get_topology_desc(platform="cuda", topology=topology, target_config=target.config()).devices)


def topology_devices(where: Slice) -> list[Any]:
    """A slice's GPUs, host by host.  Raises ValueError where they do not fill hosts."""
    count, each = where.shape[0], min(where.shape[0], where.chip.chips_per_host)
    if count % each:
        raise ValueError(f"{where.name}: {count} GPUs do not fill hosts of {each}; plan for a multiple of {each}")
    return described(TARGETS[where.chip.name], f"{where.slices}x{count // each}x{each}")
