"""The real compiler's answer: a stage's programs compiled ahead of time for chips that this machine does not have."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import time
from typing import Any

import jax

from jaxtrain.models.moe import exchanged
from jaxtrain.plan import gpus, hlo
from jaxtrain.plan.chips import GIB, Slice
from jaxtrain.plan.programs import Program, mesh_sizes
from jaxtrain.sharding import slices_of, whole_mesh

# libtpu wants to know where it runs; without a TPU it has to be told, before it is loaded.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_LOG_DIR": "disabled",
    "TPU_STDERR_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def missing(where: Slice) -> str | None:
    """Why there is no compiler for these chips here; None where there is one."""
    if not where.chip.is_tpu:
        return None if gpus.installed() else "JAX's CUDA plugin is not installed: pip install 'jaxtrain[cuda]'"
    if importlib.util.find_spec("libtpu") is None:
        return "the TPU compiler is not installed: pip install 'jaxtrain[tpu]'"
    return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """What the compiler made of one program, for one device.

    bytes: what its buffer assignment allocates: arguments, outputs that take over none of them, and the one block that
        all temporaries share; of a program that it refused, what it said it would need.  fits: whether it took it.
        program: None where it did not.
    temporaries: as XLA reports them, which on v5p counts some buffers beside the block that they lie in (a
        program of 10.1 + 40.1 + 50.5 GiB by these figures was taken for v5p's 95.7, its assignment having 95.6).
    """

    bytes: int
    fits: bool
    seconds: float
    program: hlo.Program | None
    arguments: int = 0
    temporaries: int = 0


def topology_devices(where: Slice) -> list[Any]:
    """The slice's devices, as the compiler describes them.  Raises ValueError where it knows no such slice."""
    if not where.chip.is_tpu:
        return gpus.topology_devices(where)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    options = dict(where.chip.topology) | ({"num_slices": where.slices} if where.slices > 1 else {})
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=where.name, **options).devices
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"the TPU compiler knows no slice {where.name}: {str(error).splitlines()[0]}") from error
    assert len(devices) == where.devices, f"{where} has {len(devices)} devices"
    return list(devices)


def topology_mesh(config: Any, where: Slice) -> jax.sharding.Mesh:
    """The mesh over the chips of a slice, laid out over its torus as on the slice itself."""
    return whole_mesh(mesh_sizes(config, where), topology_devices(where))


def compile_program(program: Program, mesh: jax.sharding.Mesh) -> Compiled:
    """Compiles for the mesh's devices; a program that does not fit into their memory is an answer, not an error."""
    began = time.perf_counter()
    with jax.set_mesh(mesh):
        lowered = program.jitted.lower(*program.args)
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            needed = refused_bytes(str(error))
            if needed is None:
                raise
            return Compiled(bytes=needed, fits=False, seconds=time.perf_counter() - began, program=None)
    memory = compiled.memory_analysis()
    arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    return Compiled(
        bytes=memory.peak_memory_in_bytes,
        fits=True,
        seconds=time.perf_counter() - began,
        program=hlo.walk(
            compiled.as_text(),
            dict(mesh.shape),
            program.new_tokens or None,
            slices_of(mesh.devices.flat),
            routed=1 / exchanged(program.model.rules, mesh),
        ),
        arguments=arguments,
        temporaries=temporaries,
    )


def refused_bytes(message: str) -> int | None:
    """The bytes that the compiler would have needed, from its refusal; None where the message is about other things.

    Either wording is of all that the program needs: one of 10.4 GiB of arguments, 41.3 of outputs and 46.6 of
    temporaries was refused for "HLO temporaries (98.26G)".
    """
    if "RESOURCE_EXHAUSTED" not in message or "hbm" not in message.lower():
        return None
    found = re.search(r"Used ([\d.]+)([KMGT]?) of", message) or re.search(r"\(([\d.]+)([KMGT]?)\) exceeds", message)
    units = {"": 1, "K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}
    return int(float(found[1]) * units[found[2]]) if found else None
