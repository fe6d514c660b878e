"""``jaxtrain plan --search`` without the compiler."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest

from jaxtrain.plan.chips import parse_topology
from jaxtrain.plan.estimate import plan_stage
from jaxtrain.plan.search import rank, search
from jaxtrain.plan.variants import bindings, gin_lines, meshes, microbatches, on_mesh, rounds

WHERE = parse_topology("v5e:2x4")


@pytest.fixture
def stage(recipe):
    """``stage(name, *bindings)``: (the stage, its recipe)."""

    def find(name, *changes):
        found = recipe(*changes)
        return next(one for one in found.stages if one.name == name), found

    return find


@pytest.fixture(scope="module")
def of_lm(recipe):
    """What a search of the stage "lm" found."""
    found = recipe()
    return search(next(one for one in found.stages if one.name == "lm"), found, WHERE)


def test_meshes_fill_the_slice_and_differ(stage):
    lm, _ = stage("lm")
    found = list(meshes(lm, WHERE))
    assert len(set(found)) == len(found)
    assert {math.prod(mesh.sizes(8).values()) for mesh in found} == {8}
    assert {mesh.tensor for mesh in found} == {1, 2, 4}  # one dimension of the torus
    assert {mesh.context for mesh in found} == {mesh.expert for mesh in found} == {1}
    assert {(mesh.zero, mesh.zero_data) for mesh in found if mesh.fsdp == 1} == {(3, False), (3, True)}


def test_slices_are_joined_by_data(stage):
    lm, _ = stage("lm")
    assert {mesh.data % 2 for mesh in meshes(lm, parse_topology("2*v5e:2x4")) if mesh.stage == 1} == {0}


def test_long_sequences_are_split(stage):
    long = ("DecoderConfig.max_positions = 65536", "TextDataset.seq_len = 65536")
    assert {mesh.context for mesh in meshes(stage("lm", *long)[0], WHERE)} == {1, 2, 4, 8}


@pytest.mark.parametrize(
    ("rows", "ways", "counts"), [(16, 8, [1, 2]), (16, 2, [1, 2, 4, 8]), (48, 16, [1, 3]), (8, 16, [])]
)
def test_microbatches_have_a_row_for_each_device(stage, rows, ways, counts):
    lm, _ = stage("lm", f"Stage.batch_size = {rows}")
    lm = dataclasses.replace(lm, accumulate=3) if rows == 48 else lm
    assert microbatches(lm, ways) == counts


def test_what_is_ranked_is_what_is_planned(stage, of_lm):
    """A row of the search is the plan of its stage by itself, and the batch is the recipe's."""
    (lm, recipe), found = stage("lm"), of_lm
    assert found.counted > 100 and found.refused  # tensor=4 with two key heads
    seen = {(one.stage.model.remat, one.stage.accumulate) for one in found.ranked}
    assert {remat for remat, _ in seen} == {"none", "dots", "full"} and {1, 2} <= {count for _, count in seen}
    assert {one.stage.batch_size for one in found.ranked} == {lm.batch_size}
    for one in (*found.ranked[:3], *found.ranked[-3:]):
        again = plan_stage(one.stage, recipe, WHERE, compiler=False)
        assert again.hbm_bytes_per_chip == one.plan.hbm_bytes_per_chip
        assert again.seconds_per_step == pytest.approx(one.seconds)
        assert again.flops_per_step == pytest.approx(one.plan.flops_per_step)
    assert [one.stage.mesh.fsdp for one in found.ranked if one.own] == [8]


def test_fitting_comes_before_fast(of_lm):
    found = list(of_lm.ranked)
    fastest, slowest = found[0], max(found, key=lambda one: one.seconds)
    chip = dataclasses.replace(WHERE.chip, usable_bytes=fastest.bytes - 1)
    small = dataclasses.replace(
        fastest, plan=dataclasses.replace(fastest.plan, where=dataclasses.replace(WHERE, chip=chip))
    )
    assert rank([small, slowest])[0] is slowest
    assert rank([slowest, fastest])[0] is fastest


def test_the_winners_bindings_give_the_winner(jaxtrain, recipe_file, recipe):
    argv = ("plan", recipe_file, "--topology", "v5e:2x4", "--stage", "lm", "--no_compile", "--search", "--json")
    done = jaxtrain(*argv)
    assert done.code == 0, done.err
    said = json.loads(done.out)
    (found,) = said["search"]
    first = found["ranked"][0]
    assert any(row["own"] for row in found["ranked"])
    changed = recipe(*(line for line in found["bindings"] if not line.startswith("#")))
    lm = next(one for one in changed.stages if one.name == "lm")
    assert lm.mesh.sizes(8) == first["mesh"] and (lm.model.remat, lm.accumulate) == (
        first["remat"],
        first["accumulate"],
    )
    plan = plan_stage(lm, changed, WHERE, compiler=False)
    assert plan.seconds_per_step == pytest.approx(first["seconds_per_step"]) == pytest.approx(said["seconds_per_step"])
    # The other stages keep theirs.
    assert [one for one in changed.stages if one.name != "lm"] == [one for one in recipe().stages if one.name != "lm"]


def test_bindings_that_a_scope_hides_are_said_to_be_untried(stage, recipe):
    lm, loaded = stage("lm")
    changed = dataclasses.replace(lm, accumulate=2)
    found = bindings(lm, changed)
    assert [one.gin() for one in found] == ["Stage.accumulate = 2"]
    assert gin_lines(found, lm, changed, loaded, lambda lines: recipe(*lines)) == ["lm/Stage.accumulate = 2"]
    assert gin_lines(found, lm, changed, loaded, lambda lines: loaded)[0].startswith("# for the stage lm")


def test_stages_divide_layers_and_do_not_idle_long(stage):
    lm, _ = stage("lm", "DecoderConfig.num_layers = 12", "Stage.batch_size = 64")
    stages = {mesh.stage for mesh in meshes(lm, WHERE)}
    assert stages == {1, 2, 4}  # 8 do not divide 12 layers
    few, _ = stage("lm", "DecoderConfig.num_layers = 12", "Stage.batch_size = 8")
    assert {mesh.stage for mesh in meshes(few, WHERE)} == {1, 2}  # a row a device: 4 stages idle 3/11 of the time
    assert rounds(lm, 2, 8) == [1, 2] and rounds(lm, 4, 8) == [1]
    assert rounds(few, 2, 8) == [2] and rounds(few, 4, 8) == []
    slices = parse_topology("2*v5e:2x4")
    assert all(mesh.data % 2 == 0 or mesh.stage % 2 == 0 for mesh in meshes(lm, slices))
    assert any(mesh.data % 2 for mesh in meshes(lm, slices))


def test_another_pipeline_does_not_inherit_its_microbatches(stage):
    lm, _ = stage("lm", "DecoderConfig.pipeline_microbatches = 4", "MeshConfig.stage = 4", "Stage.batch_size = 64")
    assert on_mesh(lm, lm.mesh).model.pipeline_microbatches == 4
    other = on_mesh(lm, dataclasses.replace(lm.mesh, stage=2))
    assert other.model.pipeline_microbatches == 0
    assert "DecoderConfig.pipeline_microbatches = 0" in [one.gin() for one in bindings(lm, other)]


@pytest.mark.slow
def test_where_the_network_is_slow_stages_are_found(stage):
    """Gradients over a slow network in every microbatch of a small batch cost more than a pipeline's activations."""
    lm, recipe = stage("lm", "DecoderConfig.d_model = 1024", "DecoderConfig.d_ff = 4096")
    found = search(lm, recipe, parse_topology("2*v5e:2x2"))
    first = found.ranked[0]
    assert first.stage.mesh.stage == 2 and first.stage.mesh.data % 2
    assert first.stage.model.pipeline_rounds in (1, 2)
    again = plan_stage(first.stage, recipe, parse_topology("2*v5e:2x2"), compiler=False)
    assert (again.hbm_bytes_per_chip, again.seconds_per_step) == (first.bytes, pytest.approx(first.seconds))


@pytest.mark.slow
def test_an_iteration_of_ppo_is_ranked_as_a_whole(stage):
    ppo, recipe = stage("ppo")
    best = search(ppo, recipe, parse_topology("v5e:1x2")).ranked[0]
    kinds = {part.program.kind for part in best.plan.parts}
    assert {"train", "forward", "decode"} <= kinds
    assert best.stage.model.remat == best.stage.critic.remat
