"""The mesh, the table of names, and what happens to arrays that do not fit them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxtrain.models import DecoderConfig, build_model
from jaxtrain.sharding import (
    AXES,
    DEFAULT_RULES,
    MeshConfig,
    ShardingRules,
    batch_sharding,
    constrain,
    make_mesh,
    param_shardings,
    put_batch,
    slice_axes,
    whole_mesh,
)


@pytest.mark.smoke
def test_every_axis_is_in_the_mesh_and_minus_one_takes_the_rest():
    mesh = make_mesh(MeshConfig(data=2, fsdp=-1))
    assert mesh.axis_names == AXES
    assert dict(mesh.shape) == {"data": 2, "fsdp": 4, "tensor": 1, "context": 1, "expert": 1, "stage": 1}
    assert make_mesh(MeshConfig(data=2, tensor=2)).devices.size == 4  # a part of the machine
    assert make_mesh(MeshConfig(), jax.devices()[3:4]).devices.item() == jax.devices()[3]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 0}, r"\{'data': 0\} must be at least 1"),
        ({"tensor": -2}, r"\{'tensor': -2\} must be at least 1"),
        ({"data": -1, "fsdp": -1}, "only one axis may be -1"),
    ],
)
def test_meshes_that_make_no_sense_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        MeshConfig(**sizes)


def test_meshes_that_do_not_fit_the_machine_are_refused():
    with pytest.raises(ValueError, match=r"needs 16 devices, but only 8 are visible"):
        make_mesh(MeshConfig(data=16))
    with pytest.raises(ValueError, match=r"MeshConfig.data is -1, but 8 devices are not divisible by the 3"):
        make_mesh(MeshConfig(data=-1, tensor=3))


class Chip:
    """A device of one of several 2x2 slices, as JAX describes it."""

    platform, device_kind, core_on_chip = "tpu", "TPU v5", 0

    def __init__(self, slice_index, number):
        self.slice_index, self.id, self.process_index = slice_index, 4 * slice_index + number, slice_index
        self.coords = (number % 2, number // 2, 0)


def test_slices_are_joined_by_data_or_by_stages_and_by_nothing_else():
    devices = [Chip(n // 4, n % 4) for n in range(8)]
    for sizes in ({"data": 4, "fsdp": 2}, {"data": 2, "tensor": 4}, {"stage": 2, "fsdp": 4}):
        mesh = whole_mesh(MeshConfig(**sizes).sizes(8), devices)
        assert dict(mesh.shape) == {axis: sizes.get(axis, 1) for axis in AXES}
        joined = AXES.index(next(iter(sizes)))
        first, second = np.split(mesh.devices, 2, axis=joined)
        assert {chip.slice_index for chip in first.flat} == {0}
        assert {chip.slice_index for chip in second.flat} == {1}
    assert slice_axes(MeshConfig(data=2, stage=4, fsdp=2).sizes(16), 4) == {"data": 2, "stage": 2}
    assert slice_axes(MeshConfig(fsdp=8).sizes(8), 1) == {}
    with pytest.raises(ValueError, match=r"no axis for 2 slices.*so make one of them a multiple of 2"):
        whole_mesh(MeshConfig(fsdp=8).sizes(8), devices)


def test_the_table_names_duplicates_and_unknown_axes():
    with pytest.raises(ValueError, match=r"\['mlp'\] stand in the table more than once"):
        ShardingRules(table=(("mlp", ("tensor",)), ("embed", ()), ("mlp", ())))
    with pytest.raises(ValueError, match=r"'mlp' maps to unknown mesh axes \['tensr'\]"):
        ShardingRules(table=(("mlp", ("tensr",)),))


@pytest.mark.smoke
def test_unknown_and_colliding_names_raise_and_the_rest_is_looked_up():
    assert DEFAULT_RULES.spec(("embed", "mlp")) == PartitionSpec(("fsdp",), ("tensor",))
    assert DEFAULT_RULES.spec(("layers", None)) == PartitionSpec(None, None)
    with pytest.raises(ValueError, match=r"no sharding rule for 'embd' in \('embd', 'mlp'\)"):
        DEFAULT_RULES.spec(("embd", "mlp"))
    with pytest.raises(ValueError, match="'mlp' and 'vocab' would both be split over 'tensor'"):
        DEFAULT_RULES.spec(("mlp", "vocab"))
    with pytest.raises(ValueError, match="'batch' and 'embed' would both be split over 'fsdp'"):
        DEFAULT_RULES.spec(("batch", "embed"))


def test_constraints_are_checked_without_a_mesh_and_work_under_one():
    x = jnp.zeros((8, 4, 16))
    names = ("batch", "sequence", "act_mlp")
    assert constrain(x, names, DEFAULT_RULES) is x
    for wrong, message in [
        (("batch", "act_mlp"), "has 3 dimensions"),
        (("batch", "sequnce", None), "no sharding rule for 'sequnce'"),
        (("act_heads", None, "act_mlp"), "both be split over 'tensor'"),
    ]:
        with pytest.raises(ValueError, match=message):
            constrain(x, wrong, DEFAULT_RULES)
    mesh = make_mesh(MeshConfig(data=2, context=2, tensor=2))
    with jax.set_mesh(mesh):
        function = jax.jit(lambda x: constrain(x * 2, names, DEFAULT_RULES))
        assert "sharding_constraint" in str(jax.make_jaxpr(function)(x))
        assert "sdy.sharding_constraint" in function.lower(x).as_text()
        out = function(x)
    assert out.addressable_shards[0].data.shape == (4, 2, 8)
    wanted = NamedSharding(mesh, PartitionSpec(("data", "fsdp", "expert"), "context", "tensor"))
    assert out.sharding.is_equivalent_to(wanted, 3)


def test_activations_of_the_decoder_are_split_on_cpu_too():
    model = build_model(
        DecoderConfig(vocab_size=16, num_layers=1, d_model=8, num_heads=2, num_kv_heads=2, d_ff=16, max_positions=8)
    )
    from jaxtrain.types import Tokens

    ids = np.zeros((4, 8), np.int32)
    tokens = Tokens(ids=ids, targets=ids, weights=ids.astype(np.float32), positions=ids, segments=ids + 1)
    mesh = make_mesh(MeshConfig(data=2, tensor=2, context=2))
    with jax.set_mesh(mesh):
        out = jax.jit(model.apply)(model.init(jax.random.key(0)), put_batch(tokens, mesh))
    assert out.logits.addressable_shards[0].data.shape == (2, 4, 8)


def test_parameters_that_do_not_divide_are_named():
    def shardings(**changes):
        sizes = {"vocab_size": 16, "d_model": 16, "num_heads": 4, "num_kv_heads": 2, "d_ff": 32} | changes
        model = build_model(DecoderConfig(num_layers=1, max_positions=8, **sizes))
        return param_shardings(model.axes, model.shapes(), make_mesh(MeshConfig(fsdp=2, tensor=4)), model.rules)

    with pytest.raises(
        ValueError,
        match=r"parameter layers/attention/key/kernel has shape \(1, 16, 2, 4\): dimension 'kv_heads' of size 2 is "
        r"not divisible by the 4 devices of mesh axes tensor",
    ):
        shardings()
    with pytest.raises(ValueError, match=r"embed/embedding has shape \(18, 16\): dimension 'vocab' of size 18"):
        shardings(num_kv_heads=4, vocab_size=18)
    fitting = shardings(num_kv_heads=4)
    assert fitting["embed"]["embedding"].spec == PartitionSpec(("tensor",), ("fsdp",))
    assert fitting["layers"]["mlp"]["down"]["kernel"].spec == PartitionSpec(("stage",), ("tensor",), ("fsdp",))


def test_batches_are_split_by_rows_or_refused():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    rows = np.arange(24, dtype=np.float32).reshape(8, 3)
    placed = put_batch({"x": rows, "y": rows[:, 0]}, mesh)
    assert placed["x"].sharding.is_equivalent_to(batch_sharding(mesh), 2)
    assert placed["x"].addressable_shards[0].data.shape == (2, 3)
    np.testing.assert_array_equal(placed["x"], rows)
    with pytest.raises(ValueError, match=r"a batch of 6 rows is not divisible by the 4 devices .* multiple of 4"):
        put_batch({"x": rows[:6]}, mesh)
