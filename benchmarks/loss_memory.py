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
import re
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
COMPILER = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_LOG_DIR": "disabled",
    "TPU_STDERR_LOG_LEVEL": "3",
}


def chips() -> list[Any]:
    """The four chips of a v5e host, as the compiler describes them."""
    os.environ.update({name: os.environ.get(name, value) for name, value in COMPILER.items()})
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices)
    except Exception as error:
        raise SystemExit(f"the TPU compiler does not load ({error}): pip install 'jaxtrain[tpu]'") from error


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


def matmul_flops(hlo: str) -> float:
    """Operations of all matrix products in a program's text, each as often as the loops around it turn.

    The compiler's own sum counts a loop's body once.
    """
    bodies: dict[str, list[str]] = {}
    for line in hlo.splitlines():
        if start := re.match(r"(ENTRY )?%(\S+) \(.*\{$", line):
            current = bodies.setdefault("ENTRY" if start[1] else start[2], [])
        elif line.startswith("  "):
            current.append(line)

    def lines(name: str) -> Iterator[str]:
        for line in bodies[name]:
            yield line
            for called in re.findall(r"calls=%([\w.-]+)", line):
                yield from lines(called)

    def one(name: str) -> float:
        total, shapes = 0.0, {}
        for line in bodies[name]:
            if found := re.match(r"\s+(?:ROOT )?%(\S+) = \w+\[([\d,]*)\]", line):
                shapes[found[1]] = math.prod(int(size) for size in found[2].split(",") if size)
        for line in bodies[name]:
            if found := re.match(r"\s+(?:ROOT )?%(\S+) = .* (?:convolution|dot)\(%([\w.-]+), %([\w.-]+)\)", line):
                out, left, right = (shapes[found[i]] for i in (1, 2, 3))
                total += 2 * out * math.sqrt(left * right / out)  # of [a, k] x [k, b]: 2 a b k
            elif found := re.search(r" while\(.*condition=%([\w.-]+), body=%([\w.-]+)", line):
                turns = max(int(n) for text in lines(found[1]) for n in re.findall(r"constant\((\d+)\)", text))
                total += turns * one(found[2])
            else:
                total += sum(one(called) for called in re.findall(r"calls=%([\w.-]+)", line))
        return total

    return one("ENTRY")


def measure(devices: list[Any], name: str) -> Iterator[dict]:
    """A row for each backend; the later ones with the ratio to the first's memory."""
    axes, dtype = CASES[name]
    dense = None
    for backend, products in (("dense", 3), ("chunked", 4)):
        compiled = compile_loss(devices, axes, dtype, backend)
        memory = compiled.memory_analysis()
        flops = matmul_flops(compiled.as_text())
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
