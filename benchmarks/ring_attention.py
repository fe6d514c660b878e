"""What ring attention sends over the interconnect, read from the program that the TPU compiler schedules.

    python benchmarks/ring_attention.py [--context 8] [--tokens 8192] [--backend tpu] [--json FILE]

Compiles one layer's attention, forward and backward, for a v5p 4x4x4 slice, which takes libtpu (pip install 'jax[tpu]')
and no TPU.  Prints every collective-permute of one pass over the ring: how often it runs, its bytes, whether it is
asynchronous, and which work the compiler has placed between its start and its end; then the sums beside theory's.
"""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

# What takes time: a conditional holds the kernels of one pair of chunks.
WORK = ("conditional", "while", "custom-call", "fusion")


def compiled(args: argparse.Namespace) -> dict[str, str]:
    """The scheduled programs by pass."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from jaxtrain.kernels.attention import api
    from jaxtrain.kernels.attention.masks import Marks, Spec
    from jaxtrain.kernels.attention.on_mesh import Layout, OnMesh
    from jaxtrain.kernels.attention.ring import Ring
    from jaxtrain.plan.chips import parse_topology
    from jaxtrain.plan.compile import missing, topology_devices
    from jaxtrain.sharding import DEFAULT_RULES, MeshConfig, make_mesh

    if args.backend not in api.FLASH:
        raise SystemExit(f"--backend {args.backend}: one of {tuple(api.FLASH)}")
    where = parse_topology(args.topology)
    if reason := missing(where):
        raise SystemExit(reason)
    mesh = make_mesh(MeshConfig(data=-1, context=args.context), topology_devices(where))
    B, T = mesh.shape["data"], args.tokens * args.context

    def array(dtype, *shape, sequence: int):
        spec = PartitionSpec("data", *[None] * (sequence - 1), "context")
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    q, k = (array(jnp.bfloat16, B, heads, T, args.head_dim, sequence=2) for heads in (args.heads, args.kv_heads))
    lse, ids = array(jnp.float32, B, args.heads, T, sequence=2), array(jnp.int32, B, T, sequence=1)
    marks = Marks(q_segments=ids, q_low=ids, q_high=ids, k_segments=ids, k_positions=ids)
    spec = Spec(scale=args.head_dim**-0.5, share=0.5)
    with jax.set_mesh(mesh):
        ring = OnMesh(Ring(api.FLASH[args.backend], ("context",), zigzag=True), Layout.of(DEFAULT_RULES))
        passes = {
            "forward": jax.jit(lambda *x: ring.forward(spec, *x)).lower(q, k, k, marks),
            "backward": jax.jit(lambda *x: ring.backward(spec, *x)).lower(q, k, k, marks, lse, lse, q),
        }
        return {name: lowered.compile().as_text() for name, lowered in passes.items()}


def transfers(text: str) -> Iterator[dict]:
    """Every collective-permute of the entry, and of the ring's loop, in the order of the schedule."""
    from jaxtrain.plan.hlo_loops import turns_of
    from jaxtrain.plan.hlo_text import pairs_of, parse

    assert "is_scheduled=true" in text
    module = parse(text)
    runs = {module.entry: 1}
    for body in module.computations.values():
        runs |= {x.called("body"): turns_of(module, body, x) for x in body.instructions if x.op == "while"}
    for name, body in module.computations.items():
        ends = {x.operands[0]: i for i, x in enumerate(body.instructions) if x.op == "collective-permute-done"}
        for start, x in enumerate(body.instructions):
            if x.op not in ("collective-permute", "collective-permute-start"):
                continue
            between = body.instructions[start + 1 : ends.get(x.name, start)]
            yield {
                "where": "once" if name == module.entry else "loop",
                "to": "next" if _is_ring(pairs_of(x.attributes)) else "deal",
                "type": f"{x.shape.dtype}{list(x.shape.dims)}",
                "runs": runs[name],
                "bytes": int(x.shape.bytes),
                "asynchronous": x.op == "collective-permute-start",
                "meanwhile": {op: n for op, n in Counter(y.op for y in between).items() if op in WORK},
            }


def _is_ring(pairs) -> bool:
    """Whether every device sends to its neighbour: the same step, save where the ring closes."""
    steps = Counter(int(target) - int(source) for source, target in pairs)
    return set(steps) <= {1, min(steps)} and steps[1] > steps[min(steps)]


def theory(args: argparse.Namespace) -> dict[tuple[str, str], int]:
    """Bytes that a device sends, by (pass, what for), as the head of ``kernels/attention/ring.py`` counts them."""
    n = args.context
    token = args.head_dim * args.tokens
    q, keys = 2 * args.heads * token, 2 * 2 * args.kv_heads * token
    number, marks = 4 * args.heads * args.tokens, 3 * 4 * args.tokens
    return {
        ("forward", "next"): (n - 1) * keys,
        ("forward", "deal"): q + keys + marks + q + number,  # to the zigzag; out and lse back
        ("backward", "next"): (n - 1) * (keys + 2 * keys),  # k and v; dk and dv in float32
        ("backward", "deal"): 2 * q + keys + marks + 2 * number + q + keys,  # q, d_out, ...; dq, dk and dv back
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topology", default="v5p:4x4x4", help="a slice of TPUs, as libtpu names it")
    parser.add_argument(
        "--context", type=int, default=8, help="devices of a ring, more than 2; the rest hold other rows"
    )
    parser.add_argument("--tokens", type=int, default=8192, help="of a device")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv_heads", type=int, default=8)
    parser.add_argument("--head_dim", type=int, default=128)
    parser.add_argument("--backend", default="tpu", help="whose kernels the ring calls")
    parser.add_argument("--json", type=Path, help="a file to write the rows to, as a list")
    args = parser.parse_args()
    if args.context < 3:
        parser.error(f"--context {args.context}: a ring without a loop; at least 3")
    wanted, rows = theory(args), []
    for name, text in compiled(args).items():
        found = list(transfers(text))
        print(f"# {name}")
        for x in found:
            meanwhile = ", ".join(f"{count} {op}" for op, count in x["meanwhile"].items()) or "nothing"
            kind = "asynchronous" if x["asynchronous"] else "SYNCHRONOUS"
            print(f"{x['to']:5} {x['where']:5} {x['runs']:3} x {x['bytes']:>11,} B  {x['type']:24} {kind}  {meanwhile}")
        for to in ("next", "deal"):
            sent = sum(x["runs"] * x["bytes"] for x in found if x["to"] == to)
            # In the deal some devices keep a part of what they have; these are the bytes of one that does not.
            print(f"{to:5} total {sent:,} B, theory {wanted[name, to]:,} B: {sent / wanted[name, to]:.4f}")
            rows.append({"pass": name, "to": to, "bytes": sent, "theory": wanted[name, to]})
        rows += [{"pass": name, **x} for x in found]
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
