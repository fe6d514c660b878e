"""Sharding (T6): the same loss and gradients on one device and on every mesh of eight."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxtrain.models import layers
from jaxtrain.sharding import MeshConfig, make_mesh, param_shardings, put_batch
from jaxtrain.train.step import loss_and_grads
from jaxtrain.train.zero import gather

MESHES = {
    "data8": MeshConfig(data=8),
    "fsdp8": MeshConfig(fsdp=8),
    "fsdp2-data4": MeshConfig(fsdp=2, data=4),
    "fsdp4-data2-zero1": MeshConfig(fsdp=4, data=2, zero=1),
    "fsdp4-data2-zero2": MeshConfig(fsdp=4, data=2, zero=2),
    "fsdp2-data2-tensor2-zero_data": MeshConfig(fsdp=2, data=2, tensor=2, zero_data=True),
    "tensor8": MeshConfig(tensor=8),
    "fsdp2-tensor4": MeshConfig(fsdp=2, tensor=4),
    "fsdp2-tensor2-data2-zero1": MeshConfig(fsdp=2, tensor=2, data=2, zero=1),
    "context2-data4": MeshConfig(context=2, data=4),
    "context8": MeshConfig(context=8),
    "context4-fsdp2": MeshConfig(context=4, fsdp=2),
    "context2-tensor2-fsdp2": MeshConfig(context=2, tensor=2, fsdp=2),
    "expert2-tensor2-fsdp2": MeshConfig(expert=2, tensor=2, fsdp=2),
    "stage2-data4": MeshConfig(stage=2, data=4),
    "stage2-fsdp2-tensor2": MeshConfig(stage=2, fsdp=2, tensor=2),
    "stage2-context2-fsdp2-zero1": MeshConfig(stage=2, context=2, fsdp=2, zero=1),
}
WARNING = "Involuntary full rematerialization"


NAMES = ("LM", "SFT", "RewardModel", "DPO", "PPOPolicy", "PPOCritic")


def all_objectives(tools, config, names=NAMES):
    """{objective: (Loss, gradients)} on the mesh of ``config``, over all processes; they all must call it.

    One program for all objectives of a mesh: most of the time goes into compiling.
    """
    model = tools.model()
    params = tools.params(model)
    batches = {name: tools.batch(tools.objectives[name]) for name in names}
    mesh = make_mesh(config)
    whole = gather(model, mesh, config)

    def all_of_them(params, batches, rng):
        return {
            name: loss_and_grads(model.apply, tools.objectives[name], params, batch, rng, gather=whole)
            for name, batch in batches.items()
        }

    shardings = param_shardings(model.axes, params, mesh, model.rules)
    function = jax.jit(
        all_of_them,
        out_shardings=dict.fromkeys(names, (None, shardings)),
        compiler_options=tools.fast,
    )
    with jax.set_mesh(mesh):
        placed = {name: put_batch(batch, mesh) for name, batch in batches.items()}
        return function(jax.device_put(params, shardings), placed, jax.random.key(0))


@pytest.fixture(scope="module")
def compute(tools):
    """mesh config -> ``all_objectives`` as NumPy, and what the compiler said."""
    done = {}

    def run(config, capfd):
        if config not in done:
            capfd.readouterr()
            found = jax.device_get(all_objectives(tools, config))
            done[config] = found, capfd.readouterr().err
        return done[config]

    return run


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
def test_one_device_equals_eight(mesh, name, compute, tools, capfd):
    one_loss, one_grads = compute(MeshConfig(), capfd)[0][name]
    found, said = compute(mesh, capfd)
    assert WARNING not in said
    loss, grads = found[name]
    assert one_loss.weight > 0
    tools.assert_close((loss.total, loss.weight), (one_loss.total, one_loss.weight))
    tools.assert_close(grads, one_grads)
    for metric, found in loss.metrics.items():
        tools.assert_close(found, one_loss.metrics[metric])


@pytest.mark.parametrize(
    "config",
    [
        MeshConfig(),
        MeshConfig(fsdp=2, tensor=2, data=2),
        MeshConfig(expert=2, tensor=2, fsdp=2),
        MeshConfig(stage=2, fsdp=2, tensor=2),
    ],
    ids=["one", "fsdp2-tensor2-data2", "expert2-tensor2-fsdp2", "stage2-fsdp2-tensor2"],
)
def test_rows_and_positions_apart_change_nothing(config, compute, tools, capfd, monkeypatch):
    """As on TPUs, where ``rows_of`` leaves them so."""
    wanted = compute(MeshConfig(), capfd)[0]["LM"]
    monkeypatch.setattr(layers, "target", lambda: ("tpu", "TPU v5"))
    found = jax.device_get(all_objectives(tools, config, ("LM",))["LM"])
    assert WARNING not in capfd.readouterr().err
    tools.assert_close(found[0].total, wanted[0].total)
    tools.assert_close(found[1], wanted[1])


def test_the_compilers_warning_would_be_seen(capfd):
    """The positive control of the test above: the gradient of a lookup in a table that is split by width."""
    pin = jax.lax.with_sharding_constraint
    rows, width = PartitionSpec(("data", "fsdp")), PartitionSpec(None, "fsdp")

    def total(table):
        ids = pin(jnp.arange(64).reshape(8, 8) % 3, rows)
        return jnp.sum(jnp.sin(pin(jnp.take(table, ids, axis=0), rows)))

    with jax.set_mesh(make_mesh(MeshConfig(data=4, fsdp=2))):
        function = jax.jit(lambda table: pin(jax.grad(total)(pin(table, width)), width))
        function(np.ones((16, 16), np.float32)).block_until_ready()
    assert WARNING in capfd.readouterr().err


def test_the_stream_between_layers_is_split_over_tensor(tools):
    """What the scan over layers keeps for its backward pass is each layer's input: ``[L, B * T, D]``."""
    model = tools.model(d_model=64, num_layers=3, remat="full", num_heads=8)
    batch = tools.batch(tools.objectives["LM"])
    rows = batch.ids.size

    def kept(config):
        mesh = make_mesh(config)
        shardings = param_shardings(model.axes, model.shapes(), mesh, model.rules)
        function = jax.jit(lambda *args: loss_and_grads(model.apply, tools.objectives["LM"], *args, jax.random.key(0)))
        with jax.set_mesh(mesh):
            params = jax.device_put(tools.params(model), shardings)
            text = function.lower(params, put_batch(batch, mesh)).compile(compiler_options=tools.fast).as_text()
        return {size for size in (rows, rows // 2, rows // 8) if f"f32[3,{size},64]" in text}

    assert kept(MeshConfig()) == {rows}
    assert kept(MeshConfig(tensor=8)) == {rows // 8}
    assert kept(MeshConfig(tensor=4, data=2)) == {rows // 8}
    assert kept(MeshConfig(data=2)) == {rows // 2}
