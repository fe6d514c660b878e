"""Layers over pipeline stages: the same loss and gradients as in line, for every schedule and kind of layer."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.models import DeepseekV3Config, Gemma2Config, LlamaConfig, build_model
from jaxtrain.models.pipeline import Pipeline, bubble
from jaxtrain.objectives import LM
from jaxtrain.sharding import Constrain, MeshConfig, make_mesh, param_shardings, put_batch
from jaxtrain.train.step import loss_and_grads
from jaxtrain.train.zero import gather

SIZES = {"vocab_size": 24, "d_model": 16, "num_heads": 4, "num_kv_heads": 2, "d_ff": 32, "max_positions": 32}
LLAMA = LlamaConfig(num_layers=8, **SIZES)
GEMMA = Gemma2Config(num_layers=8, window=4, **SIZES)
DEEPSEEK = DeepseekV3Config(
    num_layers=5,
    num_dense_layers=1,
    num_experts=4,
    top_k=2,
    expert_d_ff=8,
    latent_size=8,
    plain_dim=4,
    rope_dim=4,
    value_dim=4,
    sequence_balance_coef=0.1,
    load_balance_coef=0.1,
    mtp_layers=1,
    **SIZES | {"num_kv_heads": 4},
)
CASES = {
    "rounds": (dataclasses.replace(LLAMA, pipeline_rounds=2), MeshConfig(stage=2, fsdp=2, tensor=2)),
    "more stages than rounds": (
        dataclasses.replace(LLAMA, num_layers=12, pipeline_rounds=3, pipeline_microbatches=4, remat="full"),
        MeshConfig(stage=4, data=2),
    ),
    "more rounds than stages": (
        dataclasses.replace(LLAMA, pipeline_rounds=4, remat="dots"),
        MeshConfig(stage=2, fsdp=2, data=2, zero_data=True),
    ),
    "windows": (dataclasses.replace(GEMMA, pipeline_rounds=2), MeshConfig(stage=2)),
    "experts": (dataclasses.replace(DEEPSEEK, pipeline_rounds=2), MeshConfig(stage=2, expert=2, tensor=2)),
}


def compute(tools, config, mesh_config, batch=None, rng=0):
    """(Loss, gradients) of next-token prediction on a mesh."""
    model, mesh = build_model(config), make_mesh(mesh_config)
    params = tools.params(model)
    shardings = param_shardings(model.axes, params, mesh, model.rules)
    whole = gather(model, mesh, mesh_config)
    batch = tools.batch(tools.objectives["LM"]) if batch is None else batch

    def run(params, batch):
        return loss_and_grads(model.apply, LM(), params, batch, jax.random.key(rng), gather=whole)

    function = jax.jit(run, out_shardings=(None, shardings), compiler_options=tools.fast)
    with jax.set_mesh(mesh):
        return jax.device_get(function(jax.device_put(params, shardings), put_batch(batch, mesh)))


@pytest.mark.parametrize("name", CASES)
def test_every_schedule_equals_layers_in_line(name, tools, capfd):
    config, mesh = CASES[name]
    expected, expected_grads = compute(tools, config, MeshConfig())
    capfd.readouterr()
    found, grads = compute(tools, config, mesh)
    assert "Involuntary full rematerialization" not in capfd.readouterr().err
    tools.assert_close(grads, expected_grads)
    tools.assert_close((found.total, found.metrics), (expected.total, expected.metrics))
    if isinstance(config, DeepseekV3Config):
        # What routers' biases are moved by.
        tools.assert_close(found.counts, expected.counts)
        assert sum(np.sum(x) for x in found.counts.values()) > 0


def test_dropout_differs_by_stage_and_microbatch(tools):
    config, mesh = dataclasses.replace(LLAMA, dropout=0.5), MeshConfig(stage=4)
    batch = tools.batch(tools.objectives["LM"])
    first, second, again = (compute(tools, config, mesh, batch, rng)[0].total for rng in (1, 2, 1))
    assert first == again != second
    # Equal rows: with one mask for all of them, microbatches would be exact copies of one another.
    same = jax.tree.map(lambda x: np.repeat(x[:1], 8, axis=0), batch)
    one, _ = compute(tools, config, mesh, same)
    part, _ = compute(tools, config, MeshConfig(), jax.tree.map(lambda x: x[:1], same))
    assert abs(one.total - 8 * part.total) > 1e-3 * one.total


def test_gradients_over_microbatches_are_added_up_in_float32(tools):
    """Of weights that a step has gathered in bfloat16: eight equal microbatches have eight times one's gradient, which
    sums of bfloat16 miss at the third already."""
    config = dataclasses.replace(LLAMA, compute_dtype="bfloat16", remat="full")
    batch = jax.tree.map(lambda x: np.repeat(x[:1], 16, axis=0), tools.batch(tools.objectives["LM"]))
    mesh = MeshConfig(stage=2, fsdp=2, zero=1)
    few, many = (
        compute(tools, dataclasses.replace(config, pipeline_microbatches=count), mesh, batch)[1]["layers"]["mlp"]
        for count in (2, 8)
    )
    tools.assert_close(many, few, 2e-3)


def test_no_copy_of_a_rounds_weights_is_kept_for_every_tick(tools):
    model = build_model(dataclasses.replace(LLAMA, pipeline_rounds=2, remat="full"))
    mesh = make_mesh(MeshConfig(stage=4))
    batch = tools.batch(tools.objectives["LM"])

    def kept(params):
        return jax.vjp(lambda p: LM()(model.apply, p, batch, jax.random.key(0)).total, params)[1]

    with jax.set_mesh(mesh):
        residuals = jax.tree.leaves(jax.eval_shape(kept, model.shapes()))
    weights = {leaf.shape[1:] for leaf in jax.tree.leaves(model.shapes()["layers"]["mlp"])}
    stacked = [leaf.shape for leaf in residuals if leaf.shape[-2:] in weights]
    assert stacked and all(np.prod(shape) <= 8 * 16 * 32 for shape in stacked), stacked


@pytest.mark.parametrize("rounds", [1, 2])
def test_rows_stay_split_on_their_way_through(tools, rounds):
    """Nothing makes the hidden states of a batch, or of one group of its rows, whole over the row axes, nor a stack of
    weights, which is what the partitioner does with operands of an all-to-all over stages."""
    model = build_model(dataclasses.replace(LLAMA, d_model=48, pipeline_rounds=rounds))
    config = MeshConfig(stage=2, data=2, fsdp=2)
    mesh, batch = make_mesh(config), tools.batch(tools.objectives["LM"])
    batch = jax.tree.map(lambda x: np.repeat(x, 2, axis=0), batch)
    shardings = param_shardings(model.axes, model.shapes(), mesh, model.rules)
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), model.shapes(), shardings)

    def run(params, batch):
        return loss_and_grads(model.apply, LM(), params, batch, jax.random.key(0))[1]

    with jax.set_mesh(mesh):
        compiled = jax.jit(run, out_shardings=shardings).lower(abstract, put_batch(batch, mesh)).compile()
    found = re.findall(r"= f32\[([\d,]+)\]\S* (?:all-gather|all-to-all)\(", compiled.as_text())
    sizes = [np.prod([int(n) for n in shape.split(",")]) for shape in found]
    rows, length = batch.ids.shape
    assert sizes, "weights are gathered"
    # A layer's largest matrix, or the embedding's table, or what a device looks up for others.
    assert max(sizes) <= max(48 * 32, 48 * 24, rows * length * 48 // 4)


def test_the_number_of_ticks_and_the_bubble():
    with jax.set_mesh(make_mesh(MeshConfig(stage=4, data=2))):
        pin = Constrain(build_model(LLAMA).rules)
        layers = LLAMA.spec().layers()
        pipe = Pipeline.of(LLAMA, layers, 64, pin)
        assert (pipe.microbatches, pipe.ticks) == (16, 19)  # four a stage
        assert Pipeline.of(LLAMA, layers, 8 * 3, pin).microbatches == 12  # three rows a device
        twice = dataclasses.replace(LLAMA, pipeline_rounds=2, pipeline_microbatches=8)
        assert Pipeline.of(twice, layers, 64, pin).ticks == 2 * 8 + 3
    assert bubble(4, 16, 1) == 3 / 19
    assert bubble(4, 8, 2) == 3 / 19
    assert bubble(1, 8, 1) == 0


@pytest.mark.parametrize(
    ("changes", "rows", "message"),
    [
        ({"num_layers": 6}, 64, "6 layers are not divisible by MeshConfig.stage=4 times pipeline_rounds=1"),
        ({"pipeline_rounds": 4}, 64, "8 layers are not divisible by MeshConfig.stage=4 times pipeline_rounds=4"),
        ({}, 12, "12 rows of a .* are not divisible by the 8 devices"),
        ({"pipeline_microbatches": 6}, 64, "pipeline_microbatches=6 must be a multiple of MeshConfig.stage=4"),
        ({"pipeline_microbatches": 12}, 64, "pipeline_microbatches=12 must be .* divides the 32 rows"),
    ],
)
def test_what_does_not_divide_is_refused(changes, rows, message):
    config = dataclasses.replace(LLAMA, **changes)
    with jax.set_mesh(make_mesh(MeshConfig(stage=4, data=2))), pytest.raises(ValueError, match=message):
        Pipeline.of(config, config.spec().layers(), rows, Constrain(build_model(config).rules))


def test_kinds_of_layers_must_repeat_from_group_to_group():
    config = dataclasses.replace(GEMMA, num_layers=4)
    pin = Constrain(build_model(config).rules)
    with jax.set_mesh(make_mesh(MeshConfig(stage=4))), pytest.raises(ValueError, match="do not repeat after so many"):
        Pipeline.of(config, config.spec().layers(), 8, pin)
    for field in ({"pipeline_microbatches": -1}, {"pipeline_rounds": 0}):
        with pytest.raises(ValueError, match="pipeline_rounds at least 1"):
            dataclasses.replace(LLAMA, **field)


def test_an_idle_stage_leaves_no_trace(tools):
    """Padding rows are what idle stages compute: a batch with nothing to train has no gradient, and no NaN."""
    batch = tools.batch(tools.objectives["LM"])
    empty = dataclasses.replace(batch, weights=np.zeros_like(batch.weights), segments=np.zeros_like(batch.segments))
    loss, grads = compute(tools, dataclasses.replace(LLAMA, pipeline_rounds=2), MeshConfig(stage=4), empty)
    assert loss.total == 0
    assert all(not np.any(x) for x in jax.tree.leaves(jax.tree.map(jnp.asarray, grads)))
