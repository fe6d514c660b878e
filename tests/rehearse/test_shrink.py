"""What a recipe becomes in miniature: every shipped one, and every family of decoders."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path

import pytest
from jax.sharding import AbstractMesh

from jaxtrain.config import PPOStage, trained_models
from jaxtrain.models import (
    DecoderConfig,
    DeepseekV3Config,
    Gemma2Config,
    Gemma3Config,
    GlmConfig,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen3Config,
    Qwen3MoeConfig,
    Rope,
    build_model,
)
from jaxtrain.optim import Linear, WarmupStableDecay
from jaxtrain.plan.variants import rows_ways
from jaxtrain.rehearse.loading import load
from jaxtrain.rehearse.models import Sizes, shrink_model
from jaxtrain.rehearse.shrink import shrink, shrink_mesh, shrink_schedule
from jaxtrain.sharding import AXES, DEFAULT_RULES, MeshConfig, param_shardings

RECIPES = Path(__file__).resolve().parents[2] / "configs" / "recipes"
# Included by others; no recipe by itself.
PARTS = ("own_base.gin",)
MOST_PARAMETERS = 5_000_000  # of a model that trains a few steps in a second on two cores


def bindings(file: Path) -> list[str]:
    """What the file leaves to its user: folders that are not here, and patterns that match nothing."""
    text, asked = file.read_text(), []
    for name in ("BASE", "SFT", "REWARD"):
        if f"%{name}" in text and not re.search(rf"^{name} =", text, re.MULTILINE):
            asked.append(f"{name} = 'there/is/none'")
    for field in ("JsonLines.pattern", "TextFiles.pattern"):
        kind = field.split(".")[0]
        if f"@{kind}()" in text and not re.search(rf"^(\w+/)*{field}", text, re.MULTILINE):
            asked.append(f"{field} = 'there/is/none/*'")
    if file.name.startswith("own_") and "SavedTokenizer" in text:
        asked += ["SavedTokenizer.directory = 'there/is/none'", "Stage.init = 'there/is/none'"]
    return asked


def files() -> list[Path]:
    return sorted(file for file in RECIPES.glob("*.gin") if file.name not in PARTS)


def test_there_are_recipes():
    assert len(files()) >= 7


@pytest.mark.parametrize("file", files(), ids=lambda file: file.stem)
def test_every_shipped_recipe_shrinks_to_what_eight_devices_hold(file):
    full = load(str(file), bindings(file)).recipe
    small = shrink(full, 8, here=lambda source: False)
    own = {stage.name: stage for stage in small.recipe.stages}
    assert set(own) == {stage.name for stage in full.stages} | set(small.stand_ins.values())
    for stage in full.stages:
        mini = own[stage.name]
        for axis in AXES:
            assert (getattr(stage.mesh, axis) == 1) == (getattr(mini.mesh, axis) == 1)
        assert (mini.mesh.zero, mini.mesh.zero_data) == (stage.mesh.zero, stage.mesh.zero_data)
        assert type(mini.optimizer) is type(stage.optimizer) and type(mini) is type(stage)
        assert (mini.accumulate > 1) == (stage.accumulate > 1)
        assert mini.objective == stage.objective
        assert 1 <= mini.steps <= 4 or stage.steps == 0
        rows = [mini.ppo.minibatch_size] if isinstance(mini, PPOStage) else [mini.batch_size]
        assert [r % (mini.accumulate * rows_ways(mini.mesh)) for r in rows] == [0]
        for name, model in trained_models(mini).items():
            check_same_choices(getattr(stage, name), model)
            check_fits(model, mini.mesh)
    assert not any(Path(parent).is_dir() or parent not in own for s in small.recipe.stages for parent in s.parents())
    assert small.changes and all(" -> " in line for line in small.changes)


def check_same_choices(full, mini):
    """All that is no size is as it was."""
    assert type(mini) is type(full)
    for name in (
        "tie_embeddings",
        "qk_norm",
        "remat",
        "remat_save",
        "remat_offload",
        "heads",
        "compute_dtype",
        "dropout",
    ):
        assert getattr(mini, name) == getattr(full, name), name
    assert mini.param_dtype == full.param_dtype
    assert mini.num_heads // mini.num_kv_heads == full.num_heads // full.num_kv_heads
    assert (mini.num_kv_heads == 1) == (full.num_kv_heads == 1)
    for field in dataclasses.fields(Rope):
        if field.name not in ("original_max_positions", "short_factor", "long_factor"):
            assert getattr(mini.rope, field.name) == getattr(full.rope, field.name)
    kinds = [tuple(dict.fromkeys(type(layer.mlp) for layer in config.spec().layers())) for config in (full, mini)]
    assert kinds[0] == kinds[1]


def check_fits(model, mesh):
    """Few parameters, and every one divides by its axes."""
    built = build_model(model)
    assert built.num_params() <= MOST_PARAMETERS
    sizes = mesh.sizes(math.prod(size for axis in AXES if (size := getattr(mesh, axis)) > 0))
    param_shardings(built.axes, built.shapes(), AbstractMesh(tuple(sizes.values()), AXES), DEFAULT_RULES)


BIG = dict(
    vocab_size=128256, num_layers=48, d_model=4096, num_heads=32, num_kv_heads=8, d_ff=14336, max_positions=131072
)
MLA = dict(latent_size=512, plain_dim=128, rope_dim=64, value_dim=128, query_rank=1536, expert_d_ff=2048)
LONG = Rope(
    scaling="longrope",
    factor=32.0,
    original_max_positions=4096,
    short_factor=tuple(1 + i / 100 for i in range(64)),
    long_factor=tuple(2.0 + i for i in range(64)),
)
FAMILIES = {
    "decoder": DecoderConfig(**BIG),
    "llama-unrolled": LlamaConfig(**BIG, scan_unroll=4, remat="full", remat_save=("query",), attention="tpu"),
    "llama-yarn": LlamaConfig(**BIG, rope=Rope(scaling="yarn", factor=4.0, original_max_positions=32768)),
    "gpt2": GPT2Config(**BIG | {"num_kv_heads": 32}),
    "glm-half-turned": GlmConfig(**BIG | {"num_kv_heads": 2}),
    "gemma2": Gemma2Config(**BIG, head_dim=256, window=4096),
    "gemma3-26-layers": Gemma3Config(**BIG | {"num_layers": 26, "num_heads": 4, "num_kv_heads": 1}, window=512),
    "olmo2": Olmo2Config(**BIG | {"num_kv_heads": 32}),
    "phi3-longrope": Phi3Config(**BIG, window=2048, rope=LONG),
    "qwen3-window": Qwen3Config(**BIG, window=4096, full_layers=28),
    "mixtral": MixtralConfig(**BIG, num_experts=8, top_k=2),
    "qwen3-moe": Qwen3MoeConfig(**BIG, num_experts=128, top_k=8, expert_d_ff=768, dense_layers=(0, 1, 2)),
    "deepseek-v3": DeepseekV3Config(
        **BIG | {"num_kv_heads": 32}, **MLA, num_experts=256, top_k=8, groups=8, top_groups=4, num_dense_layers=3
    ),
    "deepseek-mtp": DeepseekV3Config(
        **BIG | {"num_kv_heads": 32}, **MLA | {"query_rank": 0}, num_experts=64, top_k=6, shared_experts=2, mtp_layers=1
    ),
}
MESHES = {
    "fsdp4-tensor2": MeshConfig(fsdp=4, tensor=2),
    "data2-fsdp2-context2": MeshConfig(data=2, fsdp=2, context=2, zero_data=True),
    "expert8": MeshConfig(expert=8),
    "data3-fsdp2": MeshConfig(data=3, fsdp=2),
}


def sizes_of(mesh: MeshConfig, longest: int = 131072) -> Sizes:
    axes = {axis: getattr(mesh, axis) for axis in AXES}
    named = {name: axes[name] for name in ("tensor", "expert", "stage")}
    return Sizes(unit=math.prod(axes.values()), **named, longest=longest)


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)
def test_every_family_keeps_its_choices_and_divides(config, mesh):
    if mesh.tensor > 1 and config.num_kv_heads == 1:
        pytest.skip("one head of keys does not divide over tensor at full size either")
    mini = shrink_model(config, sizes_of(mesh), padded=False)
    check_same_choices(config, mini)
    check_fits(mini, mesh)
    assert mini.num_layers <= 8 and mini.d_model <= 384 and mini.max_positions <= 512


def test_layers_keep_their_kinds():
    sizes = sizes_of(MeshConfig(fsdp=8))

    def mini(name):
        return shrink_model(FAMILIES[name], sizes, padded=False)

    assert mini("gemma3-26-layers").kinds() == ("local",) * 5 + ("global", "local")  # a period, and one that is left
    assert mini("gemma2").kinds() == ("local", "global")
    assert (mini("qwen3-window").num_layers, mini("qwen3-window").full_layers) == (2, 1)
    assert [count for _, count, _ in mini("qwen3-moe").runs().values()] == [1, 2]
    assert (mini("deepseek-v3").num_dense_layers, mini("deepseek-v3").num_layers) == (1, 3)
    assert (mini("llama-unrolled").num_layers, mini("llama-unrolled").scan_unroll) == (4, 2)
    assert mini("llama-unrolled").attention == "auto"
    assert mini("deepseek-mtp").mtp_layers == 1 and mini("deepseek-mtp").query_rank == 0


def test_windows_stay_shorter_than_rows_and_stretched_contexts_longer():
    sizes = sizes_of(MeshConfig(fsdp=8))
    row = sizes.length(131072)
    for name in ("gemma2", "gemma3-26-layers", "phi3-longrope", "qwen3-window"):
        assert 0 < shrink_model(FAMILIES[name], sizes, padded=False).window < row
    for name in ("llama-yarn", "phi3-longrope"):
        assert 0 < shrink_model(FAMILIES[name], sizes, padded=False).rope.original_max_positions < row
    # One that no row is longer than has no effect in miniature either.
    short = sizes_of(MeshConfig(fsdp=8), longest=2048)
    assert shrink_model(FAMILIES["gemma2"], short, padded=False).window >= short.length(2048)


def test_a_token_still_sees_a_part_of_the_experts():
    for expert in (1, 2, 4, 8):
        sizes = sizes_of(MeshConfig(expert=expert))
        for name in ("mixtral", "qwen3-moe", "deepseek-v3", "deepseek-mtp"):
            mini = shrink_model(FAMILIES[name], sizes, padded=False)
            assert mini.num_experts % expert == 0 and 1 < mini.top_k < mini.num_experts
        grouped = shrink_model(FAMILIES["deepseek-v3"], sizes, padded=False)
        assert 1 <= grouped.top_groups < grouped.groups


def test_pipelines_keep_their_stages_and_rounds():
    config = LlamaConfig(**BIG, pipeline_microbatches=32, pipeline_rounds=4)
    mini = shrink_model(config, sizes_of(MeshConfig(stage=4, fsdp=2)), padded=False)
    assert (mini.pipeline_rounds, mini.num_layers, mini.pipeline_microbatches) == (2, 8, 8)
    gemma = shrink_model(FAMILIES["gemma3-26-layers"], sizes_of(MeshConfig(stage=2)), padded=False)
    assert gemma.num_layers == 12  # a period a stage


def test_a_padded_vocabulary_stays_padded():
    sizes = sizes_of(MeshConfig(fsdp=8))
    sizes_padded = [shrink_model(FAMILIES["decoder"], sizes, padded=padded).vocab_size for padded in (False, True)]
    assert sizes_padded == [512, 520]


@pytest.mark.parametrize(
    ("mesh", "devices", "expected"),
    [
        (MeshConfig(data=4, fsdp=64), 8, {"data": 2, "fsdp": 4}),
        (MeshConfig(data=4, fsdp=64), 4, {"data": 2, "fsdp": 2}),
        (MeshConfig(data=4, fsdp=64), 16, {"data": 2, "fsdp": 8}),
        (MeshConfig(fsdp=-1, tensor=4), 8, {"fsdp": 4, "tensor": 2}),
        (MeshConfig(data=-1), 8, {"data": 8}),
        (MeshConfig(data=2, tensor=2), 8, {"data": 2, "tensor": 2}),
        (MeshConfig(data=3, fsdp=32), 8, {"data": 2, "fsdp": 4}),
        (MeshConfig(data=3), 8, {"data": 3}),
        (MeshConfig(), 8, {}),
        (MeshConfig(data=8, fsdp=8, tensor=8, zero=1, zero_data=True), 8, {"data": 2, "fsdp": 2, "tensor": 2}),
    ],
)
def test_a_mesh_keeps_its_axes(mesh, devices, expected):
    found = shrink_mesh(mesh, devices, "s")
    assert {axis: getattr(found, axis) for axis in AXES} == dict.fromkeys(AXES, 1) | expected
    assert (found.zero, found.zero_data) == (mesh.zero, mesh.zero_data)


def test_too_few_devices_for_the_axes_are_refused():
    mesh = MeshConfig(data=4, fsdp=8, tensor=8, context=2)
    with pytest.raises(ValueError, match=r"stage pretrain: .* 4 axes .*data, fsdp, tensor, context.*--devices 16"):
        shrink_mesh(mesh, 8, "pretrain")
    assert math.prod(shrink_mesh(mesh, 16, "pretrain").sizes(16).values()) == 16


@pytest.mark.parametrize(
    ("schedule", "steps", "warmup"),
    [
        (Linear(peak=1.0, warmup_steps=2000), 1_000_000, 1),
        (Linear(peak=1.0, warmup_steps=500), 1000, 2),
        (Linear(peak=1.0), 1000, 0),
        (WarmupStableDecay(peak=1.0, warmup_steps=40, decay_fraction=0.95), 1000, 0),  # no room for one
        (WarmupStableDecay(peak=1.0, warmup_steps=40), 1000, 1),
    ],
)
def test_a_schedule_fits_the_few_steps(schedule, steps, warmup):
    small = shrink_schedule(schedule, steps, 4)
    assert small.warmup_steps == warmup
    small.build(4)
