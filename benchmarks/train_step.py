"""Our train step against transformers on torch, the loop's overhead, and the time to a first step.

    pip install 'jaxtrain[parity]'
    python benchmarks/train_step.py [--rounds 10] [--json FILE]

A Llama of 5M parameters (d 256, 4 layers, vocabulary 4,096) reads batches of 8 × 256 tokens in float32 and makes one
AdamW update with clipping.  Each peer runs in a process of its own, and they take turns within one run, so that a
noisy machine slows both: quote the ratio, not the seconds.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SHAPE = dict(vocab=4096, d_model=256, layers=4, heads=4, d_ff=688, batch=8, length=256)
LOOP_STEPS = 60


def synthetic_batch(step: int):
    """ids ``[B, T + 1]``: the same for every peer."""
    import numpy as np

    rng = np.random.default_rng(step)
    return rng.integers(0, SHAPE["vocab"], (SHAPE["batch"], SHAPE["length"] + 1)).astype(np.int32)


def tokens(step: int):
    import numpy as np

    from jaxtrain.types import Tokens

    ids = synthetic_batch(step)
    shape = (SHAPE["batch"], SHAPE["length"])
    return Tokens(
        ids=ids[:, :-1],
        targets=ids[:, 1:],
        weights=np.ones(shape, np.float32),
        positions=np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape),
        segments=np.ones(shape, np.int32),
    )


def jaxtrain_parts():
    """The jitted step, a state and the placing function, built as a stage builds them."""
    from jaxtrain.main import set_environment

    set_environment()
    import jax

    from jaxtrain.models import DecoderConfig, build_model
    from jaxtrain.objectives import LM
    from jaxtrain.optim import AdamW, Constant
    from jaxtrain.sharding import MeshConfig, make_mesh, put_batch
    from jaxtrain.train.state import abstract_state, init_state
    from jaxtrain.train.step import make_train_step

    config = DecoderConfig(
        vocab_size=SHAPE["vocab"],
        num_layers=SHAPE["layers"],
        d_model=SHAPE["d_model"],
        num_heads=SHAPE["heads"],
        num_kv_heads=SHAPE["heads"],
        d_ff=SHAPE["d_ff"],
        max_positions=SHAPE["length"],
        tie_embeddings=False,
        scan_unroll=SHAPE["layers"],
    )
    model, mesh = build_model(config), make_mesh(MeshConfig())
    optimizer = AdamW(schedule=Constant(peak=1e-4), weight_decay=0.1)
    tx = optimizer.build(1000, model.shapes(), model.axes)
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(model, tx, mesh))
    step = make_train_step(
        model.apply,
        LM(),
        tx,
        clip_norm=1.0,
        learning_rate=lambda n: optimizer.learning_rate(n, 1000),
        mesh=mesh,
        shardings=shardings,
    )
    return step, init_state(model, tx, mesh, 0), lambda batch: put_batch(batch, mesh), model


def jaxtrain_step(report):
    """A function that makes update n and waits for it."""
    step, state, place, model = jaxtrain_parts()
    import jax  # after what jaxtrain_parts sets: JAX reads its environment when it is imported

    report(f"jaxtrain, {model.num_params():,} parameters, JAX {jax.__version__}")

    def update(number: int) -> float:
        nonlocal state
        state, metrics = step(state, place(tokens(number)))
        return float(metrics["loss"])

    return update


def torch_step(report):
    """The same with transformers' Llama in eager torch: its default attention, its fused-by-foreach AdamW."""
    import torch
    import transformers

    torch.set_num_threads(os.cpu_count())
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=SHAPE["vocab"],
        hidden_size=SHAPE["d_model"],
        num_hidden_layers=SHAPE["layers"],
        num_attention_heads=SHAPE["heads"],
        num_key_value_heads=SHAPE["heads"],
        intermediate_size=SHAPE["d_ff"],
        max_position_embeddings=SHAPE["length"],
        tie_word_embeddings=False,
        use_cache=False,
    )
    model = transformers.LlamaForCausalLM(config).train()
    count = sum(p.numel() for p in model.parameters())
    report(f"transformers {transformers.__version__}, {count:,} parameters, torch {torch.__version__}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1)

    def update(number: int) -> float:
        ids = torch.from_numpy(synthetic_batch(number)).long()
        # The model shifts labels by itself; the last id is only ever a target.
        loss = model(input_ids=ids[:, :-1], labels=ids[:, :-1], shift_labels=ids[:, 1:].contiguous()).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return update


def serve(build, pipe) -> None:
    """A peer's process: makes the updates it is asked for, one message each."""
    update = build(lambda text: pipe.send(("about", text)))
    for number in range(3):
        update(number)
    pipe.send(("ready", None))
    number = 3
    while (count := pipe.recv()) > 0:
        began = time.perf_counter()
        for _ in range(count):
            loss = update(number)
            number += 1
        pipe.send(("seconds", ((time.perf_counter() - began) / count, loss)))


def compare(rounds: int, per_round: int) -> dict:
    """Median seconds a step of each peer, and the median of the round-by-round ratio."""
    context = multiprocessing.get_context("spawn")
    peers = {}
    for name, build in (("jaxtrain", jaxtrain_step), ("torch", torch_step)):
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(build, theirs), daemon=True)
        process.start()
        theirs.close()
        while (message := ours.recv())[0] != "ready":
            print(f"# {message[1]}")
        peers[name] = (ours, process)
    times: dict[str, list[float]] = {name: [] for name in peers}
    for turn in range(rounds):
        for name in list(peers) if turn % 2 else list(peers)[::-1]:
            pipe, _ = peers[name]
            pipe.send(per_round)
            times[name].append(pipe.recv()[1][0])
    for pipe, process in peers.values():
        pipe.send(0)
        process.join()
    ratios = [theirs / ours for ours, theirs in zip(times["jaxtrain"], times["torch"], strict=True)]
    rate = SHAPE["batch"] * SHAPE["length"]
    return {
        "benchmark": "step_vs_torch",
        "jaxtrain_seconds": statistics.median(times["jaxtrain"]),
        "torch_seconds": statistics.median(times["torch"]),
        "jaxtrain_tokens_per_second": rate / statistics.median(times["jaxtrain"]),
        "torch_tokens_per_second": rate / statistics.median(times["torch"]),
        "speedup": statistics.median(ratios),
        "speedup_min": min(ratios),
        "speedup_max": max(ratios),
    }


def loop_overhead(rounds: int) -> dict:
    """The trainer's loop (loading, placing, metrics, TensorBoard, a checkpoint) over the bare jitted step."""
    step, state, place, _ = jaxtrain_parts()
    import jax

    from jaxtrain.checkpoint import Checkpoints
    from jaxtrain.train.loop import fit
    from jaxtrain.train.metrics import MetricLog

    batch = place(tokens(0))
    state, _ = step(state, batch)
    ratios, bare_seconds = [], []

    def bare(state) -> tuple[float, object]:
        jax.block_until_ready(state)
        began = time.perf_counter()
        for _ in range(LOOP_STEPS):
            state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))
        return time.perf_counter() - began, state

    for _ in range(rounds):
        before, state = bare(state)
        with tempfile.TemporaryDirectory() as folder:
            checkpoints = Checkpoints(Path(folder) / "checkpoints")
            with MetricLog(folder, start=0, steps=LOOP_STEPS, title="loop") as log:
                jax.block_until_ready(state)
                began = time.perf_counter()
                state = fit(
                    step=step,
                    state=state,
                    start=0,
                    steps=LOOP_STEPS,
                    load=tokens,
                    place=place,
                    checkpoints=checkpoints,
                    meta={},
                    log=log,
                )
                looped = time.perf_counter() - began
            checkpoints.close()
        after, state = bare(state)
        # Bare runs on both sides, so that a drift of the machine cancels.
        ratios.append(looped / ((before + after) / 2) - 1)
        bare_seconds.append(before / LOOP_STEPS)
    return {
        "benchmark": "loop_overhead",
        "steps": LOOP_STEPS,
        "bare_seconds": statistics.median(bare_seconds),
        "overhead": statistics.median(ratios),
        "overhead_min": min(ratios),
        "overhead_max": max(ratios),
    }


FIRST_STEP = """
import sys, time
from train_step import jaxtrain_step
update = jaxtrain_step(lambda text: None)
update(0)
print("done", flush=True)
"""


def first_step(rounds: int) -> dict:
    """Seconds from the start of a Python process to the end of its first update, compilation cache warm."""
    here = Path(__file__).resolve().parent
    seconds = []
    for number in range(rounds + 1):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", FIRST_STEP], cwd=here, check=True, stdout=subprocess.DEVNULL)
        if number:  # the first fills the cache
            seconds.append(time.perf_counter() - began)
    return {
        "benchmark": "first_step",
        "seconds": statistics.median(seconds),
        "seconds_min": min(seconds),
        "seconds_max": max(seconds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10, help="turns of each peer (default: 10)")
    parser.add_argument("--per_round", type=int, default=4, help="updates a turn (default: 4)")
    parser.add_argument("--only", choices=("step", "loop", "first"), help="one part alone")
    parser.add_argument("--json", type=Path, help="append the rows to this file")
    args = parser.parse_args()
    parts = {
        "step": lambda: compare(args.rounds, args.per_round),
        "loop": lambda: loop_overhead(max(args.rounds // 3, 1)),
        "first": lambda: first_step(max(args.rounds // 3, 1)),
    }
    for name, part in parts.items():
        if args.only in (None, name):
            row = part()
            print("  ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()))
            if args.json:
                with args.json.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
