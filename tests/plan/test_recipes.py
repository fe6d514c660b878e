"""The shipped recipes for slices, planned without the compiler, chips, weights or data.

What this leaves out is the compiler's answer: benchmarks/plan_recipes.py asks it.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import jax
import pytest

from jaxtrain import gin_edge
from jaxtrain.config import CONFIGURABLES, PPOStage, Recipe
from jaxtrain.generate.engine import Engine
from jaxtrain.generate.prepare import abstract_prepared
from jaxtrain.generate.programs import abstract_slots
from jaxtrain.generate.sampling import Sampling
from jaxtrain.main import USER_MISTAKE
from jaxtrain.models import build_model
from jaxtrain.plan.chips import parse_topology
from jaxtrain.plan.programs import abstract_mesh, programs
from jaxtrain.sharding import make_mesh
from jaxtrain.train.state import init_params

ROOT = Path(__file__).parents[2]


def benchmark(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CASES = benchmark("plan_recipes").CASES


@pytest.mark.parametrize("case", CASES)
def test_every_case_fits_by_hand(case, jaxtrain, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where there is nothing
    file, topology, bindings = CASES[case]
    argv = [word for one in bindings for word in ("--gin", one)]
    done = jaxtrain("plan", f"recipes/{file}.gin", "--topology", topology, "--no_compile", "--json", *argv)
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["fits"] and 0.3 < found["mfu"] < 1
    # As the header says: command, slice, and where its figures are.
    header = (ROOT / "configs" / "recipes" / f"{file}.gin").read_text(encoding="utf-8").split("\n\n")[0]
    assert f"jaxtrain plan recipes/{file}.gin --topology {topology}" in header or bindings


def test_every_recipe_for_slices_is_a_case():
    shipped = {path.stem for path in (ROOT / "configs" / "recipes").glob("*.gin") if "--topology" in path.read_text()}
    assert shipped == {file for file, _, _ in CASES.values()}


@pytest.mark.parametrize(
    ("file", "parameters"),
    [
        # Published: 8.03e9, 70.6e9, 8.19e9 and 1.72e9 (the models' cards on huggingface.co); DeepSeek-V2-Lite 15.7e9.
        ("llama3_8b_pretrain", 8.03e9),
        ("llama3_70b_pretrain", 70.6e9),
        ("qwen3_8b_sft", 8.19e9),
        ("qwen3_1_7b_ppo", 1.72e9),
        ("deepseek_v2_lite_pretrain", 15.7e9),
    ],
)
def test_sizes_are_the_published_ones(file, parameters):
    recipe = gin_edge.load(Recipe, CONFIGURABLES, [f"recipes/{file}.gin"], ()).config
    assert build_model(recipe.stages[0].model).num_params() == pytest.approx(parameters, rel=0.003)


@pytest.mark.parametrize("file", ["qwen3_8b_sft", "qwen3_1_7b_ppo", "llama3_8b_long"])
def test_running_still_wants_the_folders(file, jaxtrain, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for argv in (("run", f"recipes/{file}.gin"), ("train", "--gin_file", f"recipes/{file}.gin", "--dry_run")):
        done = jaxtrain(*argv, "--out", tmp_path / "out")
        assert done.code == USER_MISTAKE
        assert "qwen3_" in done.err or "llama3_8b" in done.err
        assert not (tmp_path / "out").exists()


def test_the_rollout_is_planned_as_it_runs():
    recipe = gin_edge.load(Recipe, CONFIGURABLES, ["recipes/qwen3_1_7b_ppo.gin"], ()).config
    (stage,) = recipe.stages
    assert isinstance(stage, PPOStage)
    own = programs(stage, recipe, abstract_mesh(stage.mesh, parse_topology("v5p:2x2x4")))
    read, write = own[:2]
    # Prompts of 1,024 positions: one for each of 16 devices is more than the engine's bound, so no more at a time.
    assert (read.rows, read.length, read.calls) == (16, 1024, 32)
    assert (write.rows, write.new_tokens, write.calls) == (512, 1024, 1)
    # Layer by layer, in the compute type, on every device.
    kernel = write.args[0]["layers"][0]["mlp"]["gate"]["kernel"]
    assert kernel.dtype == "bfloat16" and kernel.sharding.shard_shape(kernel.shape) == (2048, 6144)
    # The cache of 32 rows a device: 2,048 positions of 8 heads of 128.
    key = jax.tree.leaves(write.args[1].cache.layers[0])[0]
    assert key.sharding.shard_shape(key.shape) == (32, 8, 2048, 128)
    names = [program.name for program in own]
    assert names[2:] == [
        *("score: policy", "score: reference", "score: critic", "score: reward model"),
        *("train: policy", "train: critic"),
    ]
    assert all(program.jitted is not None for program in own)


def test_what_the_sampler_holds_is_planned_as_it_is_held(recipe):
    """Shapes, types and places of prepared parameters and slots, on eight devices."""
    (stage,) = recipe("PPOStage.mesh = @MeshConfig()", "MeshConfig.fsdp = 4", "MeshConfig.tensor = 2").stages[-1:]
    mesh = make_mesh(stage.mesh)
    model = build_model(stage.model)
    sampling = Sampling(stop_ids=(0,))
    engine = Engine(model, sampling, slots=8, mesh=mesh)
    real = engine.prepare(init_params(model, mesh, 0)), engine.new_slots(8, 48)
    planned = abstract_prepared(model, mesh), abstract_slots(model, sampling, mesh, 8, 48)
    assert jax.tree.structure(real) == jax.tree.structure(planned)
    for x, y in zip(jax.tree.leaves(real), jax.tree.leaves(planned), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        # Nothing is nowhere: `seen`, without a penalty.
        assert not x.size or x.sharding.is_equivalent_to(y.sharding, x.ndim), (x.shape, x.sharding, y.sharding)


def test_published_rows_count_flops_as_their_sources_do():
    """Model FLOPs of a row over its step time are the TFLOP/s that its source gives."""
    published = benchmark("plan_published")
    for name, row in published.ROWS.items():
        assert row.source.startswith("https://")
        if not (row.tflops and row.seconds):
            continue
        found = published.plan(name, compiler=False)
        assert found["our_flops_over_theirs"] == pytest.approx(1, abs=2e-3), name
        assert found["measured_tokens_per_second_per_chip"] == pytest.approx(row.tokens_per_second, rel=1e-3)
