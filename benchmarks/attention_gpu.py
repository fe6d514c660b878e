"""Flash attention on a GPU: ours (Pallas), cuDNN's, and XLA's, forward and backward.

    python benchmarks/attention_gpu.py [--lengths 2048,8192] [--rounds 5] [--json FILE]
    python benchmarks/attention_gpu.py --check

bfloat16, 16,384 tokens a batch (or one row of more) and a width of 2,048 as heads of 64 or 128; causal, whole or packed
of eight documents of one length.  TFLOP/s count what the mask leaves: 4 H a visible pair forward and 10 H backward, for
every peer alike.  cuDNN gets the packed documents as rows of a batch, which is the best that it can be given.
Correctness comes first: the kernels against the reference on this device, float32 and bfloat16; --check stops there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from functools import partial

DOCUMENTS, TOKENS, WIDTH = 8, 16384, 2048
LENGTHS = (2048, 4096, 8192, 16384, 32768)


def packed(length: int, documents: int):
    """Segments and positions, int32 ``[1, length]``."""
    import jax.numpy as jnp

    index = jnp.arange(length, dtype=jnp.int32)[None]
    size = length // documents
    return index // size + 1, index % size


def spec_and_marks(segments, positions, head: int, **options):
    from jaxtrain.kernels.attention.masks import Spec, make_marks

    softcap, causal = options.pop("softcap", 0.0), options.get("causal", True)
    marks, low, high = make_marks(positions, positions, segments, segments, causal=causal, **options)
    return Spec(scale=head**-0.5, softcap=softcap, low=low, high=high, in_order=causal), marks


def value_and_grads(attend):
    """A function of q, k, v, d_out that gives out, dq, dk, dv."""
    import jax

    def run(q, k, v, d_out):
        out, pull = jax.vjp(attend, q, k, v)
        return out, *pull(d_out)

    return jax.jit(run)


def check(report) -> bool:
    """Are values and gradients those of the reference?  Errors are relative to the largest entry."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxtrain.kernels.attention import cudnn, gpu, reference
    from jaxtrain.kernels.attention.flash import flash
    from jaxtrain.kernels.attention.masks import visible

    jax.config.update("jax_default_matmul_precision", "highest")
    rng, good = np.random.default_rng(0), True
    for size, dtype, options in (
        ((64, 64), "float32", {}),
        ((64, 64), "bfloat16", {}),
        ((80, 80), "bfloat16", {"window": 100}),
        ((96, 64), "bfloat16", {"causal": False}),
        ((128, 128), "float32", {"softcap": 5.0}),
        ((128, 128), "bfloat16", {}),
        ((192, 128), "bfloat16", {"softcap": 5.0}),
        ((256, 256), "float32", {}),
        ((256, 256), "bfloat16", {}),
    ):
        for documents, length in ((1, 512), (5, 1000)):
            H, V = size
            segments, positions = packed(length, documents)
            spec, marks = spec_and_marks(segments, positions, H, **options)
            shapes = ((1, 8, length, H), (1, 2, length, H), (1, 2, length, V), (1, 8, length, V))
            arrays = [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]
            wanted = value_and_grads(
                lambda *x, s=spec, m=marks: reference.attention(*x, visible(m), scale=s.scale, softcap=s.softcap)[0]
            )(
                *(x.astype(jnp.float32) for x in arrays),
            )
            attends = {
                "gpu": (gpu, lambda *x, s=spec, m=marks: flash(gpu, s, *x, m)[0]),
                "cudnn": (cudnn, lambda *x, s=spec, m=marks: cudnn.attention(s, *x, m)),
            }
            for name, (backend, attend) in attends.items():
                if backend.refusal(spec, *arrays[:3]):
                    continue
                errors = [
                    float(np.abs(np.asarray(a, np.float32) - b).max() / np.abs(b).max())
                    for a, b in zip(value_and_grads(attend)(*arrays), map(np.asarray, wanted), strict=True)
                ]
                # Two roundings to bfloat16's eight bits.
                right = max(errors) < (2e-5 if dtype == "float32" else 2**-7)
                good &= right
                shown = " ".join(f"{x:.1e}" for x in errors)
                verdict = "ok" if right else "WRONG"
                report(f"check {name} {dtype} {size} {options} {documents=} out, dq, dk, dv: {shown} {verdict}")
    jax.config.update("jax_default_matmul_precision", None)
    return good


def peers(head: int, length: int, documents: int):
    """Name -> attention of ``[B, N, T, H]``; None where it cannot run."""
    import jax

    from jaxtrain.kernels.attention import cudnn, gpu
    from jaxtrain.kernels.attention.flash import flash

    segments, positions = packed(length, documents)
    rows = max(1, TOKENS // length)
    segments, positions = (x.repeat(rows, axis=0) for x in (segments, positions))
    spec, marks = spec_and_marks(segments, positions, head)

    def ours(q, k, v):
        return flash(gpu, spec, q, k, v, marks)[0]

    def theirs(implementation, q, k, v):
        def rows_of_documents(x):  # [B, N, T, H] to [B * documents, T / documents, N, H]
            return x.swapaxes(1, 2).reshape(-1, length // documents, *x.shape[1::2])

        out = jax.nn.dot_product_attention(
            *map(rows_of_documents, (q, k, v)), is_causal=True, implementation=implementation
        )
        return out.reshape(rows, length, *out.shape[2:]).swapaxes(1, 2)

    shape = jax.ShapeDtypeStruct((rows, WIDTH // head, length, head), "bfloat16")
    reason = cudnn.refusal(spec, shape, shape, shape)
    return shape, {
        "ours": ours,
        "cudnn": None if reason else partial(theirs, "cudnn"),
        "xla": partial(theirs, "xla"),
    }


def seconds(run, *arrays, rounds: int) -> float:
    """The median over rounds of a call's time, calls queued one after another for about a tenth of a second."""
    import jax

    jax.block_until_ready(run(*arrays))
    start = time.perf_counter()
    jax.block_until_ready(run(*arrays))
    calls = max(1, round(0.1 / (time.perf_counter() - start)))
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(calls):
            last = run(*arrays)
        jax.block_until_ready(last)
        found.append((time.perf_counter() - start) / calls)
    return statistics.median(found)


def measure(attend, shape, rounds: int) -> tuple[float, float] | None:
    """Seconds forward and backward; None where the memory does not suffice.

    The backward pass is timed with the forward pass before it, which is taken off.
    """
    import jax

    q, k, v, d_out = (jax.random.normal(jax.random.key(i), shape.shape, shape.dtype) for i in range(4))
    try:
        forward = seconds(jax.jit(attend), q, k, v, rounds=rounds)
        both = seconds(value_and_grads(attend), q, k, v, d_out, rounds=rounds)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None
    return forward, both - forward


def rows(lengths, rounds: int):
    """One dict for each mask, head size, length and pass: TFLOP/s of each peer, and ours over cuDNN's."""
    for documents in (1, DOCUMENTS):
        for head in (64, 128):
            for length in lengths:
                shape, attends = peers(head, length, documents)
                size = length // documents
                pairs = shape.shape[0] * documents * size * (size + 1) // 2
                times = {name: attend and measure(attend, shape, rounds) for name, attend in attends.items()}
                for which, (name, products) in enumerate((("forward", 4), ("backward", 10))):
                    flops = products * head * pairs * shape.shape[1]
                    rates = {peer: found and flops / found[which] / 1e12 for peer, found in times.items()}
                    yield {
                        "mask": "causal" if documents == 1 else f"packed{documents}",
                        "head_dim": head,
                        "length": length,
                        "pass": name,
                        **rates,
                        "ratio_to_cudnn": rates["cudnn"] and rates["ours"] and rates["ours"] / rates["cudnn"],
                    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)), help="comma-separated, multiples of 8")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--check", action="store_true", help="correctness alone")
    parser.add_argument("--json", help="write the rows to this file")
    options = parser.parse_args()
    import jax

    device = jax.devices()[0]
    if device.platform != "gpu":
        print(f"no GPU: JAX {jax.__version__} sees {device.device_kind} ({device.platform})", file=sys.stderr)
        return 2
    print(f"# {device.device_kind}, JAX {jax.__version__}", flush=True)
    if not check(partial(print, flush=True)):
        print("values or gradients are wrong: nothing is timed", file=sys.stderr)
        return 1
    if options.check:
        return 0
    found = []
    for row in rows([int(length) for length in options.lengths.split(",")], options.rounds):
        found.append(row)
        shown = {name: "-" if x is None else f"{x:.3g}" if isinstance(x, float) else x for name, x in row.items()}
        print("  ".join(f"{name}={x}" for name, x in shown.items()), flush=True)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(found, file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
