"""Seconds and peak memory of ``jaxtrain import`` and ``jaxtrain export``, beside transformers' from_pretrained.

    pip install 'jaxtrain[gguf,parity]'
    python benchmarks/import_export.py [--smollm2 FILE.gguf] [--layers 24] [--json FILE]

A Llama of 2B parameters in bfloat16 is made up in a temporary folder (4 GB, four shards).  Every part runs in a process
of its own and reports the most memory that process ever had resident (VmHWM), so Linux alone.  ``memory_over_model`` is
that peak, less what the process had when its imports were done, over the bytes of the parameters: 1.0 would hold the
model and nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SHARD = 1e9
# Llama 3.2's shapes, somewhat wider: 2.0B parameters with 24 layers and untied embeddings.
WIDTH, HEADS, KV_HEADS, MLP, VOCAB = 2048, 32, 8, 8192, 128_256


def resident(name: str) -> float:
    """VmRSS or VmHWM of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return float(line.split()[1]) * 1024
    raise RuntimeError(f"no {name} in /proc/self/status")


def synthetic(folder: Path, layers: int) -> None:
    """A Hugging Face folder of random bfloat16 weights."""
    import jax
    import ml_dtypes
    import numpy as np

    from jaxtrain.interop.families.llama import FAMILY
    from jaxtrain.interop.importing import expected_tensors, leaves_of
    from jaxtrain.interop.safetensors import SafetensorsWriter
    from jaxtrain.models import LlamaConfig, build_model

    config = LlamaConfig(
        vocab_size=VOCAB,
        num_layers=layers,
        d_model=WIDTH,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        d_ff=MLP,
        max_positions=4096,
        tie_embeddings=False,
        param_dtype="bfloat16",
    )
    model = build_model(config)
    rng = np.random.default_rng(0)
    kind = np.dtype(ml_dtypes.bfloat16)
    shapes = expected_tensors(leaves_of(model.shapes()), FAMILY.weights(config))
    writer = SafetensorsWriter(folder, [(n, kind, s) for n, s in shapes.items()], max_shard_bytes=SHARD)
    noise = (rng.standard_normal(2**20, np.float32) * 0.02).astype(kind)
    for name, shape in shapes.items():
        writer.write(name, np.resize(np.roll(noise, int(rng.integers(2**20))), shape))
    writer.finish()
    fields = {**FAMILY.write_config(config), "model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps({**fields, "dtype": "bfloat16"}))
    print(f"# synthetic: {model.num_params():,} parameters, JAX {jax.__version__}", flush=True)


def jaxtrain_import(source: str, out: str) -> dict:
    from jaxtrain.main import set_environment

    set_environment()
    import jax

    from jaxtrain.interop.importing import import_model

    jax.devices()
    before, began = resident("VmRSS"), time.perf_counter()
    done = import_model(source, out)
    size = done.parameters * {"float32": 4, "bfloat16": 2}[done.dtype]
    return {"seconds": time.perf_counter() - began, "before": before, "bytes": size}


def jaxtrain_export(source: str, out: str) -> dict:
    from jaxtrain.main import set_environment

    set_environment()
    import jax

    from jaxtrain.interop.exporting import export_model

    jax.devices()
    before, began = resident("VmRSS"), time.perf_counter()
    done = export_model(source, out, max_shard_bytes=SHARD)
    size = done.parameters * {"float32": 4, "bfloat16": 2}[done.dtype]
    return {"seconds": time.perf_counter() - began, "before": before, "bytes": size}


def _from_pretrained(source: str):
    import torch
    from transformers import AutoModelForCausalLM

    path = Path(source)
    where = (path.parent, {"gguf_file": path.name}) if path.is_file() else (path, {})
    before, began = resident("VmRSS"), time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(where[0], dtype="auto", **where[1])
    with torch.no_grad():  # what was mapped is not read until it is used
        for tensor in model.state_dict().values():
            tensor.sum()
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.parameters())
    return model, {"seconds": time.perf_counter() - began, "before": before, "bytes": size}


def transformers_load(source: str, out: str) -> dict:
    return _from_pretrained(source)[1]


def transformers_load_save(source: str, out: str) -> dict:
    model, row = _from_pretrained(source)
    began = time.perf_counter()
    model.save_pretrained(out, max_shard_size="1GB")
    return {**row, "seconds": row["seconds"] + time.perf_counter() - began}


PARTS = {part.__name__: part for part in (jaxtrain_import, jaxtrain_export, transformers_load, transformers_load_save)}


def child(name: str, source: str, out: str) -> None:
    row = PARTS[name](source, out)
    print(json.dumps({**row, "peak": resident("VmHWM")}))


def measure(model: str, name: str, source: Path, out: Path, file: Path | None) -> None:
    command = [sys.executable, __file__, "--child", name, str(source), str(out)]
    root = str(Path(__file__).resolve().parent.parent)
    env = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        print(f"# {model} {name}: not measured: {done.stderr.strip().splitlines()[-1]}", flush=True)
        return
    found = json.loads(done.stdout.splitlines()[-1])
    row = {
        "benchmark": name,
        "model": model,
        "seconds": round(found["seconds"], 2),
        "model_MB": round(found["bytes"] / 1e6),
        "peak_MB": round(found["peak"] / 1e6),
        "memory_over_model": round((found["peak"] - found["before"]) / found["bytes"], 3),
    }
    print("  ".join(f"{key}={value}" for key, value in row.items()), flush=True)
    if file:
        with file.open("a") as stream:
            stream.write(json.dumps(row) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smollm2", type=Path, metavar="FILE", help="a SmolLM2 GGUF file to measure too")
    parser.add_argument("--layers", type=int, default=24, help="of the synthetic model; 24 make 2B (default)")
    parser.add_argument("--folder", type=Path, help="for the temporary files, 20 GB (default: the system's)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append every row as JSON")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(*args.child)
        return
    work = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        models = {}
        if args.smollm2:
            models["SmolLM2"] = args.smollm2
        models["synthetic"] = work / "synthetic"
        models["synthetic"].mkdir()
        synthetic(models["synthetic"], args.layers)
        for model, source in models.items():
            measure(model, "jaxtrain_import", source, work / f"{model}-in", args.json)
            measure(model, "jaxtrain_export", work / f"{model}-in", work / f"{model}-out", args.json)
            measure(model, "transformers_load", source, work, args.json)
            measure(model, "transformers_load_save", source, work / f"{model}-theirs", args.json)
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
