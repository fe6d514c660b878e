"""Our generation against transformers.generate: prompts read and tokens written a second, at several batch sizes.

    pip install 'jaxtrain[parity]'
    python benchmarks/generate.py [--checkpoint DIR_OR_GGUF] [--batch 1 8 32] [--rounds 5] [--json FILE]

Both peers hold the same weights in float32: those of --checkpoint, or random ones in the sizes of SmolLM2-135M.  Each
runs in a process of its own, and they take turns within one run, so that a noisy machine slows both: quote the ratios.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

# SmolLM2-135M.
SHAPE = dict(vocab_size=49152, num_layers=30, d_model=576, num_heads=9, num_kv_heads=3, d_ff=1536, max_positions=2048)


def synthetic_prompts(batch: int, length: int, vocab: int, turn: int) -> list[list[int]]:
    """The same for every peer, and new ones in every turn."""
    import numpy as np

    return np.random.default_rng([batch, turn]).integers(0, vocab, (batch, length)).tolist()


def bandwidth() -> float:
    """Bytes a second that one matrix times a vector reads, of 256 MB: the floor of a decoding step."""
    import jax
    import jax.numpy as jnp

    matrix, vector = jnp.ones((1024, 65536), jnp.float32), jnp.ones((1, 1024), jnp.float32)
    product = jax.jit(lambda x, w: x @ w)
    product(vector, matrix).block_until_ready()
    seconds = []
    for _ in range(7):
        began = time.perf_counter()
        product(vector, matrix).block_until_ready()
        seconds.append(time.perf_counter() - began)
    return matrix.nbytes / min(seconds)


def ours(args, report):
    """A function from (batch, new tokens, turn) to seconds, and the bytes that a step reads at each batch size."""
    from jaxtrain.main import set_environment

    set_environment()
    import jax

    from jaxtrain.generate.engine import Engine, sequence_keys
    from jaxtrain.generate.requests import bucket
    from jaxtrain.generate.sampling import Sampling
    from jaxtrain.interop.importing import load_pretrained
    from jaxtrain.models.cache import cache_bytes, init_cache

    model, params, _ = load_pretrained(args.folder, dtype="float32")
    rate = bandwidth()
    report("about", f"jaxtrain on {jax.devices()[0]}, {model.num_params():,} parameters, JAX {jax.__version__}")
    engines = {b: Engine(model, Sampling(temperature=0.0), slots=b, int8=args.int8) for b in args.batch}
    prepared = engines[args.batch[0]].prepare(params)
    matrices = sum(x.nbytes for x in jax.tree.leaves({k: v for k, v in prepared.items() if k != "embed"}))
    # A tied table is read whole as the head; as a lookup only by row.
    matrices += 0 if "lm_head" in prepared else prepared["embed"]["embedding"].nbytes
    length = bucket(args.prompt_tokens + args.new_tokens - 1, model.config.max_positions)
    caches = {
        b: cache_bytes(jax.eval_shape(lambda b=b: init_cache(model.config, b, length)).layers) for b in args.batch
    }
    report("bytes", {"bandwidth": rate, **{b: matrices + caches[b] for b in args.batch}})

    def run(batch: int, new_tokens: int, turn: int) -> float:
        prompts = synthetic_prompts(batch, args.prompt_tokens, model.config.vocab_size, turn)
        began = time.perf_counter()
        engines[batch].generate(prepared, prompts, max_new_tokens=new_tokens, keys=sequence_keys(range(batch)))
        return time.perf_counter() - began

    return run


def theirs(args, report):
    """The same with transformers: greedy, a dynamic cache, its default attention."""
    import torch
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(os.cpu_count())
    transformers.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(args.folder, dtype=torch.float32).to(device).eval()
    model.generation_config.eos_token_id = None  # nothing ends a text early, here or there
    count = sum(p.numel() for p in model.parameters())
    report(
        "about", f"transformers {transformers.__version__} on {device}, {count:,} parameters, torch {torch.__version__}"
    )

    def run(batch: int, new_tokens: int, turn: int) -> float:
        prompts = synthetic_prompts(batch, args.prompt_tokens, model.config.vocab_size, turn)
        began = time.perf_counter()
        ids = torch.tensor(prompts, device=device)
        with torch.no_grad():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=0,
            )
        assert out.shape[1] == args.prompt_tokens + new_tokens
        out.cpu()
        return time.perf_counter() - began

    return run


def serve(build, args, pipe) -> None:
    """A peer's process."""
    run = build(args, lambda kind, value: pipe.send((kind, value)))
    pipe.send(("ready", None))
    while (asked := pipe.recv()) is not None:
        cpu = time.process_time()
        seconds = run(*asked)
        pipe.send(("seconds", (seconds, time.process_time() - cpu)))


def compare(args) -> Iterator[dict]:
    """A row for every batch size: medians over rounds, and medians of the round-by-round ratios."""
    context = multiprocessing.get_context("spawn")
    peers, facts = {}, {}
    for name, build in (("jaxtrain", ours), ("transformers", theirs)):
        here, there = context.Pipe()
        process = context.Process(target=serve, args=(build, args, there), daemon=True)
        process.start()
        there.close()
        while (message := here.recv())[0] != "ready":
            if message[0] == "bytes":
                facts = message[1]
            else:
                print(f"# {message[1]}", flush=True)
        peers[name] = (here, process)

    def ask(name: str, *asked: int) -> tuple[float, float]:
        """Wall seconds, and those of all cores together."""
        peers[name][0].send(asked)
        return peers[name][0].recv()[1]

    for batch in args.batch:
        for name in peers:  # compiles, and warms up
            for new_tokens in (1, args.new_tokens):
                ask(name, batch, new_tokens, args.rounds)
        prefill: dict[str, list[float]] = {name: [] for name in peers}
        step: dict[str, list[float]] = {name: [] for name in peers}
        cores: dict[str, list[float]] = {name: [] for name in peers}
        for turn in range(args.rounds):
            for name in list(peers) if turn % 2 else list(peers)[::-1]:
                first, whole = ask(name, batch, 1, turn), ask(name, batch, args.new_tokens, turn)
                prefill[name].append(first[0])
                # What all tokens take beyond what the first takes is decoding.
                wall, cpu = ((b - a) / (args.new_tokens - 1) for a, b in zip(first, whole, strict=True))
                step[name].append(wall)
                cores[name].append(cpu)
        middle = {
            kind: {name: statistics.median(values) for name, values in times.items()}
            for kind, times in (("prefill", prefill), ("step", step))
        }
        ratio = {
            kind: [b / a for a, b in zip(times["jaxtrain"], times["transformers"], strict=True)]
            for kind, times in (("prefill", prefill), ("step", step))
        }
        yield {
            "benchmark": "generate",
            "batch": batch,
            "prefill_tokens_per_second": batch * args.prompt_tokens / middle["prefill"]["jaxtrain"],
            "prefill_tokens_per_second_transformers": batch * args.prompt_tokens / middle["prefill"]["transformers"],
            "prefill_speedup": statistics.median(ratio["prefill"]),
            "decode_tokens_per_second": batch / middle["step"]["jaxtrain"],
            "decode_tokens_per_second_transformers": batch / middle["step"]["transformers"],
            "decode_speedup": statistics.median(ratio["step"]),
            "decode_speedup_min": min(ratio["step"]),
            "decode_speedup_max": max(ratio["step"]),
            "step_cpu_ms": 1e3 * statistics.median(cores["jaxtrain"]),
            "step_cpu_ms_transformers": 1e3 * statistics.median(cores["transformers"]),
            "step_ms": 1e3 * middle["step"]["jaxtrain"],
            "step_megabytes": facts[batch] / 1e6,
            "bandwidth_gb_per_second": facts["bandwidth"] / 1e9,
            "floor_ms": 1e3 * facts[batch] / facts["bandwidth"],
        }
    for pipe, process in peers.values():
        pipe.send(None)
        process.join()


def weights(args, folder: Path) -> Path:
    """A Hugging Face folder that both peers read."""
    if args.checkpoint is not None and (args.checkpoint / "config.json").is_file():
        return args.checkpoint
    from jaxtrain.interop.exporting import export_model

    made = folder / "imported"
    if args.checkpoint is not None and (args.checkpoint / "checkpoints").is_dir():
        made = args.checkpoint
    elif args.checkpoint is not None:
        from jaxtrain.interop.importing import import_model

        import_model(args.checkpoint, made, dtype="float32")
    else:
        return random_weights(folder)
    export_model(made, folder / "huggingface", dtype="float32")
    return folder / "huggingface"


def random_weights(folder: Path) -> Path:
    """A Llama of SHAPE, written by transformers."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=SHAPE["vocab_size"],
        hidden_size=SHAPE["d_model"],
        num_hidden_layers=SHAPE["num_layers"],
        num_attention_heads=SHAPE["num_heads"],
        num_key_value_heads=SHAPE["num_kv_heads"],
        intermediate_size=SHAPE["d_ff"],
        max_position_embeddings=SHAPE["max_positions"],
        rope_theta=100000.0,
        tie_word_embeddings=True,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "huggingface")
    return folder / "huggingface"


HEAD = "batch | prefill tokens/s: ours, theirs, ratio | decode tokens/s: ours, theirs, ratio | step ms, floor ms"


def line(row: dict) -> str:
    """What matters most of a row, under HEAD."""
    return (
        f"{row['batch']:5d} | {row['prefill_tokens_per_second']:8,.0f} "
        f"{row['prefill_tokens_per_second_transformers']:8,.0f} {row['prefill_speedup']:6.2f} | "
        f"{row['decode_tokens_per_second']:8,.1f} {row['decode_tokens_per_second_transformers']:8,.1f} "
        f"{row['decode_speedup']:6.2f} ({row['decode_speedup_min']:.2f} to {row['decode_speedup_max']:.2f}) | "
        f"{row['step_ms']:7.1f} {row['floor_ms']:7.1f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="Hugging Face folder, .gguf, or imported folder")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32], help="batch sizes (default: 1 8 32)")
    parser.add_argument("--prompt_tokens", type=int, default=128, help="a prompt (default: 128)")
    parser.add_argument("--new_tokens", type=int, default=64, help="written after each (default: 64)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each peer at each size (default: 5)")
    parser.add_argument("--int8", action="store_true", help="ours with matrices in 8 bits")
    parser.add_argument("--json", type=Path, help="append the rows to this file")
    args = parser.parse_args()
    if args.new_tokens < 2:
        parser.error("--new_tokens must be at least 2: one is read off the prompt")
    with tempfile.TemporaryDirectory() as folder:
        args.folder = weights(args, Path(folder))
        for number, row in enumerate(compare(args)):
            print(line(row) if number else f"{HEAD}\n{line(row)}", flush=True)
            if args.json:
                with args.json.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
