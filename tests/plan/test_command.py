"""``jaxtrain plan`` without the compiler, as its user meets it."""

from __future__ import annotations

import json
import time

import pytest

from jaxtrain.main import USER_MISTAKE

KEYS = {
    *("fits", "hbm_bytes_per_chip", "compiler_bytes_per_chip", "flops_per_step", "seconds_per_step", "mfu"),
    *("tokens_per_second_per_chip", "collectives"),
}


def test_every_stage_is_planned(jaxtrain, recipe_file):
    done = jaxtrain("plan", recipe_file, "--topology", "v5e:2x4", "--no_compile")
    assert done.code == 0, done.err
    for name in ("lm", "sft", "reward", "dpo", "ppo"):
        assert f"{name} on 1 x v5e:2x4 (8 chips of 15.75 GiB usable): fits" in done.out
    assert "rollout" in done.out and "kv cache" in done.out and "all-gather" in done.out


def test_json_is_one_object(jaxtrain, recipe_file):
    argv = ("--topology", "v5e:2x4", "--no_compile", "--json", "--stage", "lm", "--price", "2.5")
    done = jaxtrain("plan", recipe_file, *argv)
    found = json.loads(done.out)
    assert set(found) >= KEYS
    assert found["fits"] is True and found["compiler_bytes_per_chip"] is None
    assert found["stage"] == "lm" and len(found["stages"]) == 1
    # 16 x 512 tokens a step, 1,000 steps, 8 chips.
    assert found["tokens_per_step"] == 8192
    assert found["tokens_per_second_per_chip"] == pytest.approx(8192 / found["seconds_per_step"] / 8)
    assert found["days"] == pytest.approx(1000 * found["seconds_per_step"] / 86_400)
    assert found["price"] == pytest.approx(1000 * found["seconds_per_step"] / 3600 * 8 * 2.5)
    assert 0 < found["mfu"] < found["mfu_non_causal"] < 1


def test_what_does_not_fit_says_what_would(jaxtrain, recipe_file):
    # 3e9 parameters and 16 bytes of each on 8 chips are 6 GiB a chip; activations do the rest.
    large = [
        *("DecoderConfig.d_model = 4096", "DecoderConfig.num_layers = 16", "DecoderConfig.d_ff = 11008"),
        *("DecoderConfig.max_positions = 8192", "TextDataset.seq_len = 8192", "DecoderConfig.remat = 'none'"),
    ]
    bindings = [word for one in large for word in ("--gin", one)]
    done = jaxtrain("plan", recipe_file, "--topology", "v5e:2x4", "--no_compile", "--stage", "lm", *bindings)
    assert done.code == 1
    assert "DOES NOT FIT" in done.out
    lines = [line.strip() for line in done.err.splitlines()]
    assert "the cheapest first" in lines[0]
    seconds = [float(line.split(", ")[1].split()[0]) for line in lines if line.endswith("s a step:")]
    assert len(seconds) > 1 and seconds == sorted(seconds)
    # The first one does it, as it is printed.
    first = lines[2 : next((i for i, line in enumerate(lines) if i > 2 and line.endswith("s a step:")), len(lines))]
    first = [line for line in first if not line.startswith("#")]
    assert first and all(" = " in line for line in first)
    mended = [*bindings, *(word for line in first for word in ("--gin", line))]
    done = jaxtrain("plan", recipe_file, "--topology", "v5e:2x4", "--no_compile", "--stage", "lm", *mended)
    assert done.code == 0, done.out


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (("--topology", "v5z:4"), "kinds are v4"),
        (("--topology", "v5e:2x4", "--stage", "nope"), "the stages are lm, sft"),
        (("--topology", "v5e:2x4", "--gin", "MeshConfig.fsdp = 4"), "4 devices, but v5e:2x4 has 8"),
        (("--topology", "v5e:4x8"), "batch_size=16 is not divisible by the 32 devices"),
    ],
)
def test_mistakes_are_explained(jaxtrain, recipe_file, argv, complaint):
    done = jaxtrain("plan", recipe_file, "--no_compile", *argv)
    assert done.code == USER_MISTAKE
    assert complaint in done.err


@pytest.mark.parametrize(
    ("name", "topology", "bindings"),
    [
        ("llama3_8b_pretrain", "v5p:4x4x4", ()),
        ("llama3_8b_pretrain", "h100:64", ()),
        ("llama3_70b_pretrain", "v5p:4x8x8", ()),
    ],
)
def test_shipped_recipes_fit_and_are_planned_within_ten_seconds(jaxtrain, name, topology, bindings):
    began = time.perf_counter()
    argv = [word for one in bindings for word in ("--gin", one)]
    done = jaxtrain("plan", f"recipes/{name}.gin", "--topology", topology, "--no_compile", "--json", *argv)
    assert done.code == 0, done.err
    found = json.loads(done.out)
    parameters = {"llama3_8b_pretrain": 8.03e9, "llama3_70b_pretrain": 70.55e9}[name]
    tokens = found["tokens_per_step"]
    # 6 N D, attention and recomputation on top (2001.08361).
    assert 1.2 < found["flops_per_step"] / (6 * parameters * tokens) < 1.6
    assert found["steps"] * tokens == pytest.approx(15e12, rel=1e-3)
    assert time.perf_counter() - began < 10
