"""Plans by the real TPU compiler, for chips that this machine does not have.

What this leaves out is running the programs, and so every second that is predicted.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxtrain.plan import gpus
from jaxtrain.plan.chips import parse_topology
from jaxtrain.plan.compile import missing, refused_bytes

COMPILE = Path(__file__).with_name("compile_tpu.py")
HAVE = importlib.util.find_spec("libtpu") is not None
needs_compiler = pytest.mark.skipif(not HAVE, reason="no TPU compiler: pip install 'jaxtrain[tpu]'")


def planned(file, topology, stage, *bindings):
    """What ``compile_tpu.py`` says."""
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    env["PYTHONPATH"] = os.pathsep.join(path for path in [str(COMPILE.parents[2]), *sys.path] if path)
    argv = [sys.executable, str(COMPILE), str(file), topology, stage, *bindings]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@needs_compiler
@pytest.mark.slow
def test_the_compiled_step_does_what_is_counted_by_hand(recipe_file):
    (part,) = planned(recipe_file, "v5p:2x2x1", "lm")["parts"]
    assert part["fits"] is True
    products, kernels = part["by_hand"]
    walked, _, _, kernel, _ = part["walked"]
    assert part["unknown"] == []
    assert kernel == pytest.approx(kernels, rel=0.01)
    assert walked == pytest.approx(products, rel=0.01)
    # 38 MiB, of which what no plan counts (tiles' padding, loop state) is a larger share than of a real model's.
    assert part["bytes_by_hand"] == pytest.approx(part["bytes"], rel=0.08)
    assert {axis for row in part["collectives"] for axis in row["axes"]} == {"fsdp"}


@needs_compiler
@pytest.mark.slow
def test_slices_are_joined_by_the_data_axis(recipe_file):
    (part,) = planned(recipe_file, "2*v5e:2x2", "lm", "MeshConfig.data = 2")["parts"]
    assert part["fits"] is True
    over = {tuple(row["axes"]): row["seconds"] / row["count"] / row["bytes"] for row in part["collectives"]}
    assert over["data",] > 5 * over["fsdp",]  # the slow network's seconds a byte


@needs_compiler
@pytest.mark.slow
def test_a_refusal_is_an_answer(recipe_file):
    large = ("DecoderConfig.d_model = 16384", "DecoderConfig.num_layers = 2", "DecoderConfig.d_ff = 65536")
    (part,) = planned(recipe_file, "v5e:2x2", "lm", *large, "Stage.batch_size = 4")["parts"]
    assert part["fits"] is False
    assert part["bytes"] > 15.75 * 2**30


def test_the_extra_is_named_where_there_is_no_compiler(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install 'jaxtrain[tpu]'" in missing(parse_topology("v5e:2x2"))
    assert "pip install 'jaxtrain[cuda]'" in missing(parse_topology("h100:8"))


def test_gpus_fill_hosts():
    with pytest.raises(ValueError, match="12 GPUs do not fill hosts of 8"):
        gpus.topology_devices(parse_topology("h100:12"))


@pytest.mark.slow
@pytest.mark.skipif(not gpus.installed(), reason="no compiler for GPUs: pip install 'jaxtrain[cuda]'")
@pytest.mark.parametrize("topology", ["a100:8", "h100:8", "2*h200:8"])
def test_what_xla_makes_of_a_step_on_gpus(recipe_file, topology):
    split = ("MeshConfig.data = 2", "MeshConfig.fsdp = -1")
    (part,) = planned(recipe_file, topology, "lm", *split)["parts"]
    products, kernels = part["by_hand"]
    walked, _, _, kernel, _ = part["walked"]
    assert (part["fits"], part["unknown"]) == (True, [])
    assert walked == pytest.approx(products, rel=0.01)
    assert kernel == pytest.approx(kernels)  # by hand, too: these declare nothing
    # Kernels' scratch memory, of up to 32 MiB, is more than this model's own.
    assert 0.9 * part["bytes_by_hand"] < part["bytes"] < part["bytes_by_hand"] + 40 * 2**20
    assert {axis for row in part["collectives"] for axis in row["axes"]} == {"data", "fsdp"}


@pytest.mark.parametrize(
    ("message", "size"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (300.06G) "
            "exceeds available HBM (15.75G).",
            300.06 * 2**30,
        ),
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
            "Used 20.45G of 15.75G hbm. Exceeded hbm capacity by 4.70G.",
            20.45 * 2**30,
        ),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 20M of 16M vmem.", None),
        ("INVALID_ARGUMENT: hbm", None),
    ],
)
def test_refusals_say_how_much(message, size):
    found = refused_bytes(message)
    assert found == (None if size is None else pytest.approx(size, rel=1e-6))
