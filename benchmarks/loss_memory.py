"""Memory and arithmetic of the loss at a vocabulary of 128,256, compiled for TPU v5e on a machine without one.

    pip install 'jaxtrain[tpu]'
    python benchmarks/loss_memory.py [--json FILE]

The mean log-probability of 8,192 tokens a chip (width 4,096, bfloat16) and its gradients by hidden states and output
matrix: from whole logits ("dense") and from a part of the vocabulary at a time ("chunked").  Nothing runs: the figures
are the compiler's, so they do not depend on the machine.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TOKENS, WIDTH, VOCAB = 8192, 4096, 128_256
# name -> (axes of the mesh, the type of the matrix among the parameters)
CASES: dict[str, tuple[dict[str, int], str]] = {
    "one chip": ({}, "bfloat16"),
    "one chip, float32 parameters": ({}, "float32"),
    "tensor=4": ({"tensor": 4}, "bfloat16"),
    "fsdp=4": ({"fsdp": 4}, "bfloat16"),
}


def chips() -> list[Any]:
    """The four chips of a v5e host, as the compiler describes them."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from jaxtrain.plan.chips import parse_topology
    from jaxtrain.plan.compile import missing, topology_devices

    where = parse_topology("v5e:2x2")
    if reason := missing(where):
        raise SystemExit(reason)
    return topology_devices(where)


def compile_loss(devices: list[Any], axes: dict[str, int], dtype: str, backend: str):
    """The compiled program ``hidden, matrix, targets -> loss, (d hidden, d matrix)``."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from jaxtrain.kernels.cross_entropy.api import cross_entropy
    from jaxtrain.sharding import AXES, DEFAULT_RULES

    sizes = [axes.get(axis, 1) for axis in AXES]
    grid = np.array(devices[: math.prod(sizes)]).reshape(sizes)
    mesh = Mesh(grid, AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES))

    def array(shape, dtype, *names):
        sharding = NamedSharding(mesh, PartitionSpec(*DEFAULT_RULES.spec(names)))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    rows = math.prod(axes.get(axis, 1) for axis in ("data", "fsdp", "expert"))
    hidden = array((rows, TOKENS, WIDTH), jnp.bfloat16, "batch", "sequence", None)
    matrix = array((VOCAB, WIDTH), jnp.dtype(dtype), "vocab", "embed")
    targets = array((rows, TOKENS), jnp.int32, "batch", "sequence")

    def loss(hidden, matrix, targets):
        return -jnp.mean(cross_entropy(hidden, matrix, targets, table=True, backend=backend).logps)

    with jax.set_mesh(mesh):
        gradients = jax.jit(jax.value_and_grad(loss, (0, 1)), out_shardings=(None, (hidden.sharding, matrix.sharding)))
        return gradients.lower(hidden, matrix, targets).compile()


def measure(devices: list[Any], name: str) -> Iterator[dict]:
    """A row for each backend; the later ones with the ratio to the first's memory."""
    from jaxtrain.plan.hlo import walk

    axes, dtype = CASES[name]
    dense = None
    for backend, products in (("dense", 3), ("chunked", 4)):
        compiled = compile_loss(devices, axes, dtype, backend)
        memory = compiled.memory_analysis()
        flops = walk(compiled.as_text()).totals().flops
        # A product of all tokens with the matrix, on each of its chips; with the logits computed again, four.
        explained = products * 2 * TOKENS * WIDTH * VOCAB / axes.get("tensor", 1)
        dense = dense or memory.temp_size_in_bytes
        yield {
            "benchmark": "loss_memory",
            "case": name,
            "backend": backend,
            "temp_bytes": memory.temp_size_in_bytes,
            "dense_over_this": dense / memory.temp_size_in_bytes,
            "argument_bytes": memory.argument_size_in_bytes,
            "output_bytes": memory.output_size_in_bytes,
            "flops": flops,
            "explained_flops": explained,
            "flops_over_explained": flops / explained,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=CASES, help="one case alone")
    parser.add_argument("--json", type=Path, help="append the rows to this file")
    args = parser.parse_args()
    devices = chips()
    for name in CASES:
        if args.only not in (None, name):
            continue
        for row in measure(devices, name):
            print("  ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), flush=True)
            if args.json:
                with args.json.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
