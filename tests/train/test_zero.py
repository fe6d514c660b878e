"""ZeRO: every level makes the same update; what is gathered, where, and how often is read from the program."""

from __future__ import annotations

import re

import jax
import numpy as np
import optax
import pytest

from jaxtrain.sharding import MeshConfig, make_mesh, put_batch, state_rules
from jaxtrain.train.state import abstract_state, init_state
from jaxtrain.train.step import make_train_step
from jaxtrain.train.zero import gather

MESH = dict(fsdp=4, data=2)
DATA = MeshConfig(**MESH, zero_data=True)
# (mesh, microbatches): in microbatches, parameters are made whole over data once, else where layers are computed.
KINDS = {level: (MeshConfig(**MESH, zero=level), 2) for level in (1, 2, 3)}
KINDS |= {"data": (DATA, 2), "layers": (DATA, 1), "at once": (MeshConfig(**MESH), 1)}


@pytest.fixture(scope="module")
def trained(tools):
    """kind -> (state after two updates, metrics, the step's program)."""
    tx, objective = optax.adam(1e-2), tools.objectives["LM"]
    # Its parameters outweigh its activations.
    model = tools.model(d_model=64, d_ff=256, num_layers=4, num_heads=4, num_kv_heads=4, head_dim=4)
    batch = tools.batch(objective)
    # Two rows for each device.
    batch = jax.tree.map(lambda x: np.concatenate([x, x[::-1]]), batch)

    def run(config, accumulate):
        mesh, rules = make_mesh(config), state_rules(model.rules, config)
        target = abstract_state(model, tx, mesh, rules)
        shardings = jax.tree.map(lambda x: x.sharding, target)
        whole = gather(model, mesh, config, accumulate)
        step = make_train_step(model.apply, objective, tx, accumulate=accumulate, shardings=shardings, gather=whole)
        with jax.set_mesh(mesh):
            state = init_state(model, tx, mesh, 0, rules=rules)
            compiled = step.lower(state, put_batch(batch, mesh)).compile()
            for _ in range(2):
                state, metrics = compiled(state, put_batch(batch, mesh))
        assert jax.tree.map(lambda x: x.sharding, state) == shardings
        return jax.device_get(state), jax.device_get(metrics), compiled

    return {kind: run(*each) for kind, each in KINDS.items()}


@pytest.mark.parametrize("kind", [1, 2, "data", "layers"])
def test_every_level_makes_the_same_update(kind, trained, tools):
    wanted = trained["at once" if kind == "layers" else 3]
    tools.assert_close(trained[kind][0].params, wanted[0].params)
    tools.assert_close(trained[kind][0].opt_state, wanted[0].opt_state)
    tools.assert_close(trained[kind][1], wanted[1])


def test_more_levels_hold_less(trained):
    memory = {kind: found[2].memory_analysis() for kind, found in trained.items()}
    temporary = {kind: found.temp_size_in_bytes for kind, found in memory.items()}
    held = {kind: found.argument_size_in_bytes for kind, found in memory.items()}
    parameters = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(trained[3][0].params))
    # A quarter of each is what a device holds of it anyway.
    assert temporary[1] - temporary[2] > 0.5 * parameters
    assert temporary[2] - temporary[3] > 0.5 * parameters
    assert held[1] == held[2] == held[3]
    # Parameters and two moments, an eighth of each in place of a quarter; the batch and the norms stay as they are.
    assert held[3] - held["data"] == pytest.approx(3 * parameters / 8, rel=0.02)
    assert held["layers"] == held["data"]


def gathers_of_layers(text: str, outer: int = 1, sizes: str = "64,256|256,64") -> dict[str, int]:
    """How many all-gathers of layers' matrices stand inside and outside of the loop over layers, by the op's name.

    outer: how many loops there are around that one.  sizes: of what is gathered.
    """
    found = {"inside": 0, "outside": 0}
    for line in text.splitlines():
        name = re.search(r'all-gather(?:-start)?\(.*op_name="([^"]*)"', line)
        if name and re.search(rf"f32\[(?:[14],)?(?:{sizes})\]", line.split(" = ")[1].split("all-gather")[0]):
            found["inside" if name[1].count("while/body") > outer else "outside"] += 1
    return found


def test_where_parameters_are_gathered(trained):
    found = {kind: gathers_of_layers(trained[kind][2].as_text()) for kind in (1, 2, 3, "data")}
    assert found[3]["inside"] >= 3 and found[3]["outside"] == 0
    assert found["data"]["inside"] >= 3
    # Over data to a quarter, which fsdp makes whole.
    text = trained["layers"][2].as_text()
    for sizes in ("16,256|256,16", "64,256|256,64"):
        inside = gathers_of_layers(text, 0, sizes)
        assert inside["inside"] >= 3 and inside["outside"] == 0, inside
    for level in (1, 2):
        # Gate, up and down, once each.
        assert found[level] == {"inside": 0, "outside": 3}, found


def test_levels_that_change_nothing(tools):
    model = tools.model()
    for config in (MeshConfig(fsdp=8), MeshConfig(data=8, zero=1), MeshConfig(fsdp=8, zero_data=True)):
        assert gather(model, make_mesh(config), config) is None
    with pytest.raises(ValueError, match="zero is 0: 1 splits"):
        MeshConfig(zero=0)


def test_what_is_used_in_one_type_is_gathered_in_it(tools):
    model = tools.model(compute_dtype="bfloat16")
    config = MeshConfig(fsdp=2, tensor=2, data=2, zero=2)
    mesh = make_mesh(config)
    whole = gather(model, mesh, config)
    with jax.set_mesh(mesh):
        params = jax.jit(whole.params)(model.init(jax.random.key(0)))
    query = params["layers"]["attention"]["query"]["kernel"]
    assert query.dtype == "bfloat16" and query.sharding.spec[:3] == (None, None, "tensor")
    assert params["layers"]["attention_norm"]["scale"].dtype == "float32"
    assert params["embed"]["embedding"].dtype == "float32"
