"""What a TPU's compiler is told about a train step.

From v5p on chips have sparse cores beside their tensor cores, which can carry out collectives meanwhile; a tensor core
that does them itself computes nothing until they are done.  libtpu 0.0.50 uses them on TPU7x unasked, on v5p and v6e
when told to.  v5e has none; there parts of a collective are fused with products of matrices, unasked.
"""

from __future__ import annotations

import os

from jax.sharding import AbstractMesh, Mesh

# The options of MaxText's benchmarks/xla_flags_library.py ("ENABLE_SPARECORE_OFFLOADING_..."), with reduce-scatters and
# gathers over several axes of the torus at once: without the one for reduce-scatters these are all-reduces, which send
# twice as much.  They are published as run on v6e and TPU7x, that one on TPU7x alone; on v5p they compile, and we know
# of no published run.
SPARSE_CORES = {
    "xla_tpu_enable_sparse_core_collective_offload_all_gather": "true",
    "xla_tpu_enable_sparse_core_collective_offload_2d_all_gather": "true",
    "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": "true",
    "xla_tpu_enable_sparse_core_collective_offload_nd_reduce_scatter": "true",
    "xla_tpu_enable_sparse_core_collective_offload_all_reduce": "true",
    "xla_sc_disable_megacore_partitioning": "true",
    "xla_tpu_use_tc_device_shape_on_sc": "true",
}
# By what JAX calls the chip.
OPTIONS = {"TPU v5": SPARSE_CORES, "TPU v5p": SPARSE_CORES, "TPU v6 lite": SPARSE_CORES, "TPU v6e": SPARSE_CORES}


def compiler_options(mesh: Mesh | AbstractMesh) -> dict[str, str] | None:
    """For ``jax.jit``, of a program for the devices of ``mesh``; None for nothing.

    Options that the environment variable ``LIBTPU_INIT_ARGS`` names are left to it: a run without sparse cores has
    ``--xla_tpu_enable_sparse_core_collective_offload_all_gather=false`` and so on there.
    """
    if isinstance(mesh, AbstractMesh) or mesh.size == 1:
        return None
    said = {word.lstrip("-").split("=")[0] for word in os.environ.get("LIBTPU_INIT_ARGS", "").split()}
    found = {
        name: value for name, value in OPTIONS.get(mesh.devices.flat[0].device_kind, {}).items() if name not in said
    }
    return found or None
