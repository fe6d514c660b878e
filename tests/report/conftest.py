"""A made-up run directory with every file a real one has: six stages, curves with noise, spikes and NaN."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest

STAGES = ("pretrain", "midtrain", "sft", "reward", "dpo", "ppo")
PARENTS = {
    "pretrain": [],
    "midtrain": ["pretrain"],
    "sft": ["pretrain", "midtrain"],
    "reward": ["pretrain", "midtrain", "sft"],
    "dpo": ["pretrain", "midtrain", "sft"],
    "ppo": ["pretrain", "midtrain", "sft", "reward"],
}
HASHES = {name: f"{i + 1:02d}" * 20 for i, name in enumerate(STAGES)}
SECONDS = {"pretrain": 212.4, "midtrain": 95.1, "sft": 61.7, "reward": 40.2, "dpo": 48.9, "ppo": 88.0}
PROMPTS = (
    "Summarise what the function `os.path.join(path, *paths)` does.",
    "The quick brown fox",
    "def add(a, b):\n\treturn",
)
EVIL = "<script>alert('owned')</script><img src=x onerror=alert(1)> & \"quotes\"\x00\x1b[31m \ud800"
SUMMARY = [
    ("pretrain", "bits per byte, prose", 8.01, 2.31, "lower"),
    ("midtrain", "bits per byte, code", 3.92, 2.44, "lower"),
    ("midtrain", "bits per byte, prose", 2.31, 2.47, "none"),
    ("sft", "completion loss", 4.11, 2.02, "lower"),
    ("reward", "pair accuracy", 0.49, 0.93, "higher"),
    ("dpo", "pair accuracy", 0.5, 0.81, "higher"),
    ("dpo", "reward margin", 0.0, 1.37, "higher"),
    ("ppo", "mean reward", 0.62, 0.55, "higher"),
    ("ppo", "KL from the reference", 0.0, 3.4, "none"),
]


def write_json(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def curve(stage: str, step: int, steps: int, rng: random.Random) -> dict[str, float]:
    done = step / steps
    fall = math.exp(-6 * done)
    row = {
        "grad_norm": 0.6 + 3 * fall + 0.1 * rng.random(),
        "learning_rate": 3e-4 * min(1, step / 20) * (1 - done),
        "tokens_per_second": 11000 + 800 * rng.random(),
        "weight": 4096.0,
        "skipped": 0.0,
        "streak": 0.0,
    }
    if stage in ("pretrain", "midtrain", "sft"):
        row |= {"loss": 2.4 + 5.2 * fall + 0.15 * rng.gauss(0, 1), "accuracy": 0.45 - 0.4 * fall}
    if stage == "dpo":
        gap = 1.4 * (1 - fall)
        row |= {
            "loss": math.log(2) - 0.3 * (1 - fall) + 0.04 * rng.gauss(0, 1),
            "rewards/chosen": gap / 3 + 0.1 * rng.gauss(0, 1),
            "rewards/rejected": -2 * gap / 3 + 0.1 * rng.gauss(0, 1),
            "rewards/margins": gap,
            "rewards/accuracies": min(1.0, 0.5 + 0.35 * (1 - fall) + 0.05 * rng.gauss(0, 1)),
        }
    if stage == "reward":
        row |= {"loss": 0.7 - 0.5 * (1 - fall), "accuracy": 0.5 + 0.43 * (1 - fall), "margin": 2 * (1 - fall)}
    if stage == "ppo":
        row |= {
            "loss": 0.02 * rng.gauss(0, 1),
            "objective/scores": -0.2 + 0.8 * (1 - fall) + 0.1 * rng.gauss(0, 1),
            "objective/kl": 3.4 * (1 - fall) + 0.2 * rng.random(),
            "objective/rlhf_reward": -0.2 + 0.5 * (1 - fall),
            "objective/entropy": 40 - 10 * done,
            "objective/kl_coef": 0.05,
            "critic/loss": fall,
            "completions/mean_length": 24 - 8 * done,
        }
    return row


def metrics(stage: str) -> str:
    rng = random.Random(stage)
    steps = {"pretrain": 600, "ppo": 40}.get(stage, 150)
    lines = []
    for step in range(1, steps + 1):
        row = {"step": step, **curve(stage, step, steps, rng), "seconds": step * 0.3}
        if stage == "pretrain" and step in (300, 301):
            row["loss"] = None  # what the log writes for NaN
        if stage == "pretrain" and step in (410, 411):
            row["loss"] = 90.0  # a spike that must not flatten the curve
        lines.append(row)
        if stage != "ppo" and step % (steps // 5) == 0 and step < steps:
            lines.append({"step": step, "eval/loss": row["loss"] and row["loss"] + 0.1, "seconds": step * 0.3})
    return "".join(json.dumps(line) + "\n" for line in lines)


def samples(stage: str) -> dict:
    wide = STAGES.index(stage) if stage in STAGES else -1
    text = {
        "untrained": "zq Ġ##ed of of  vir@@ \n\n::::: lam bda the the",
        "pretrain": "is a module that provides the following functions and the functions of the module.",
        "midtrain": "return os.path.join(path, *paths)\n\n\ndef walk(top, topdown=True):\n    yield top",
        "sft": "Join one or more path segments intelligently.",
        "dpo": "Join one or more path components.",
        "ppo": "Join path components, discarding any that precede an absolute one.",
    }[stage]
    tokens = [
        ["the", 0.31 - 0.02 * wide],
        [" a", 0.2],
        ["\n", 0.11],
        ["▁jumps", 0.08 + 0.05 * wide],
        ["<em>", 0.01],
    ]
    return {
        "stage": stage,
        "samples": [{"prompt": prompt, "completion": text} for prompt in PROMPTS],
        "next_tokens": [{"prompt": prompt, "tokens": tokens} for prompt in PROMPTS[1:]],
    }


@pytest.fixture
def make_run(tmp_path):
    """A function that writes the run and returns its directory."""

    def make() -> Path:
        root = tmp_path / "my run"
        for stage in STAGES:
            folder = root / "stages" / stage
            folder.mkdir(parents=True)
            (folder / "metrics.jsonl").write_text(metrics(stage), encoding="utf-8")
            result = {
                "stage": stage,
                "hash": HASHES[stage],
                "parents": [{"stage": parent, "hash": HASHES[parent]} for parent in PARENTS[stage]],
                "steps": 150,
                "seconds": SECONDS[stage],
                "tokens_per_second": 11432.7,
                "parameters": 3_214_592,
                "environment": {"machine": "x86_64, 2 cores", "jax": "0.10.2", "jaxtrain": "0.1.0"},
                "evaluation": [
                    {"metric": metric, "before": before, "after": after, "better": better}
                    for name, metric, before, after, better in SUMMARY
                    if name == stage
                ],
            }
            write_json(folder / "result.json", result)
        for stage in ("untrained", "pretrain", "midtrain", "sft", "dpo", "ppo"):
            write_json(root / "stages" / stage / "samples.json", samples(stage))
        write_json(root / "stages" / "reward" / "samples.json", {"stage": "reward", "samples": [], "next_tokens": []})
        summary = [
            {"stage": s, "metric": m, "before": b, "after": a, "better": g, "seconds": SECONDS[s]}
            for s, m, b, a, g in SUMMARY
        ]
        write_json(root / "summary.json", summary)
        (root / "config.gin").write_text(
            "Recipe.stages = [@pretrain/Stage(), @sft/Stage()]\npretrain/Stage.objective = @LM()\n"
            "DPO.beta = 0.1\n" + "".join(f"AdamW.option_{i} = {i}\n" for i in range(20)),
            encoding="utf-8",
        )
        return root

    return make
