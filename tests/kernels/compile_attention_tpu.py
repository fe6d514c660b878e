"""Compiles flash attention, forward and backward, for TPUs that this machine does not have.

    python tests/kernels/compile_attention_tpu.py '{"chip": "v5e", "T": 8192, "H": 128}' ...

Prints a line of JSON for each program as it is done: the case, seconds, bytes of temporaries and of arguments, whether
the HLO holds an array of ``T x S``, and ``error`` if the compiler refuses.  A process of its own, because libtpu reads
its settings when it is loaded.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from functools import partial

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtrain.kernels.attention import api, tpu
from jaxtrain.kernels.attention.flash import flash
from jaxtrain.kernels.attention.masks import Spec, make_marks, visible_share
from jaxtrain.kernels.target import target
from jaxtrain.models.cache import write
from jaxtrain.plan.compile import ENVIRONMENT
from jaxtrain.sharding import AXES

TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
DEFAULTS = dict(B=1, N=2, K=1, S=None, V=None, dtype="bfloat16", causal=True, window=0, softcap=0.0, tiles=None)
DEFAULTS |= dict(decode=False)  # T queries over a cache of S slots, forward only
DEFAULTS |= dict(steps=0)  # of decoding, each of which writes what it has read into the cache


def compile_case(case: dict) -> dict:
    case = DEFAULTS | case
    B, N, K, T, H = (case[name] for name in "BNKTH")
    S, V, dtype = case["S"] or T, case["V"] or H, jnp.dtype(case["dtype"])
    device = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[case["chip"]]).devices[0]
    mesh = Mesh(np.array([device]).reshape((1,) * len(AXES)), AXES)

    def like(*shape, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec()))

    def run(q, k, v, d_out, *tokens):
        marks, low, high = make_marks(*tokens, causal=case["causal"], window=case["window"])
        spec = Spec(
            scale=H**-0.5,
            softcap=case["softcap"],
            low=low,
            high=high,
            in_order=case["causal"] and T == S,
            share=visible_share(T, S, causal=case["causal"], window=case["window"]),
            tiles=None if case["tiles"] is None else tuple(case["tiles"]),
        )
        (out, lse), pull = jax.vjp(lambda *qkv: flash(tpu, spec, *qkv, marks), q, k, v)
        return out, lse, *pull((d_out, jnp.ones_like(lse)))

    shapes = (B, N, T, H), (B, K, S, H), (B, K, S, V), (B, N, T, V)
    arguments = [like(*shape, dtype=dtype) for shape in shapes]
    arguments += [like(B, length) for length in (T, S, T, S)]  # positions, then segments, of queries and of keys
    if case["decode"]:
        run = api.decode_attention
        arguments = [like(B, T, N, H, dtype=dtype), *arguments[1:3], like(B, T, S, dtype=jnp.bool_)]
    if case["steps"]:
        run, arguments = partial(decode_steps, case["steps"]), [*arguments, like(B, T)]
    with jax.set_mesh(mesh):
        assert target()[0] == "tpu", target()
        compiled = jax.jit(run, donate_argnums=(1, 2) if case["steps"] else ()).lower(*arguments).compile()
    text, memory = compiled.as_text(), compiled.memory_analysis()
    return {
        "kernels": sorted(set(re.findall(r"flash_(?:forward|dq|dkv|backward)|decode_attention", text))),
        "calls": text.count('custom_call_target="tpu_custom_call"'),
        "temporaries": memory.temp_size_in_bytes,
        "arguments": memory.argument_size_in_bytes,
        "square": sorted({found for found in re.findall(r"\w+\[[\d,]+\]", text) if _has_square(found, T, S)}),
    }


def decode_steps(count: int, q, k, v, visible, positions):
    """What a sampler does in a layer, a token at a time."""

    def step(i, carry):
        q, k, v = carry
        new = q.swapaxes(1, 2)[:, : k.shape[1]]
        k, v = (write(old, new, positions + i, jnp.ones_like(positions)) for old in (k, v))
        return api.decode_attention(q, k, v, visible), k, v

    return jax.lax.fori_loop(0, count, step, (q, k, v))


def _has_square(shape: str, T: int, S: int) -> bool:
    """Whether an array in the text, such as ``f32[1,4096,4096]``, has the queries and the keys for dimensions."""
    sizes = [int(size) for size in re.search(r"\[([\d,]+)\]", shape)[1].split(",")]
    return sum(size >= min(T, S) for size in sizes) >= 2


def main(cases: list[str]) -> None:
    os.environ.update(ENVIRONMENT)
    for text in cases:
        case, start = json.loads(text), time.perf_counter()
        try:
            result = compile_case(case)
        except Exception as error:  # noqa: BLE001 - reported, and the next one is tried
            result = {"error": f"{type(error).__name__}: {error}"[:2000]}
        print(json.dumps({"case": case, "seconds": round(time.perf_counter() - start, 1), **result}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
