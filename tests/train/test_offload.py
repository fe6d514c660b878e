"""The optimizer's state in the host's memory: the same updates as on the device, of any optimizer, on any mesh."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.checkpoint import Checkpoints
from jaxtrain.optim import OPTIMIZERS, AdamW, Constant
from jaxtrain.sharding import MeshConfig, make_mesh, put_batch, state_rules
from jaxtrain.train.loop import from_trees, state_trees
from jaxtrain.train.offload import Offload, update_where
from jaxtrain.train.state import abstract_state, init_state, new_state
from jaxtrain.train.step import make_train_step
from jaxtrain.train.zero import gather
from jaxtrain.types import path_name

MESHES = {
    "fsdp4-data2-zero_data": MeshConfig(fsdp=4, data=2, zero_data=True),
    "fsdp2-tensor2-data2-zero1": MeshConfig(fsdp=2, tensor=2, data=2, zero=1),
}
RATE = Constant(peak=0.01)


def kinds(tree):
    return {x.sharding.memory_kind for x in jax.tree.leaves(tree)}


def assert_same(found, expected):
    found, expected = jax.device_get((found, expected))
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=path_name(path))


def twice(update, tx, good, grads, state, params):
    """Two updates, the second by another gradient."""
    params, state = update(tx, good, grads, state, params)
    return update(tx, good, jax.tree.map(lambda g: g * g - 0.3 * g, grads), state, params)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_makes_the_same_update(name, tools):
    model = tools.model(param_dtype="bfloat16", num_layers=3)
    options = {"min_size_to_factor": 2} if name == "Adafactor" else {}
    optimizer = OPTIMIZERS[name](schedule=RATE, weight_decay=0.1, frozen=("^embed/",), **options)
    tx = optimizer.build(4, model.shapes(), model.axes)
    mesh = make_mesh(MeshConfig())
    target = abstract_state(model, tx, mesh, offload=True)
    state = jax.jit(lambda p: new_state(p, tx, 0))(jax.tree.map(jnp.bfloat16, tools.params(model)))
    grads = tools.params(model, 1)

    def run(update, state, good=True):
        function = jax.jit(partial(twice, update, tx), compiler_options=tools.fast)
        with jax.set_mesh(mesh):
            return function(good, grads, state.opt_state, state.params)

    expected = run(update_where, state)
    placed = jax.device_put(state, jax.tree.map(lambda x: x.sharding, target))
    plan = Offload.of(target, model.axes)
    found = run(plan.update, placed)
    assert kinds([x for x in jax.tree.leaves(found[1]) if x.ndim > 1]) == {"pinned_host"}
    assert kinds(found[0]) == {"device"}
    # Other programs, other fusions: to rounding, which of bfloat16 is another.
    tools.assert_close(jax.device_get(found[1]), jax.device_get(expected[1]), 1e-6)
    new, wanted = (jax.tree.map(np.float32, jax.device_get(params)) for params, _ in (found, expected))
    tools.assert_close(new, wanted, 2**-7)
    assert not np.array_equal(found[0]["layers"]["mlp"]["up"]["kernel"], state.params["layers"]["mlp"]["up"]["kernel"])
    assert_same(run(plan.update, placed, good=False), (state.params, state.opt_state))


def where(model, config, offload):
    """The optimizer, the mesh, and the state's target on it."""
    tx = AdamW(schedule=RATE).build(4, model.shapes(), model.axes)
    mesh = make_mesh(config)
    return tx, mesh, abstract_state(model, tx, mesh, state_rules(model.rules, config), offload)


def learner(tools, config, offload):
    """(state before any update, step, target)"""
    model = tools.model()
    tx, mesh, target = where(model, config, offload)
    jitted = make_train_step(
        model.apply,
        tools.objectives["LM"],
        tx,
        accumulate=2,
        shardings=jax.tree.map(lambda x: x.sharding, target),
        gather=gather(model, mesh, config),
        offload=Offload.of(target, model.axes) if offload else None,
    )
    with jax.set_mesh(mesh):
        compiled = jitted.lower(target, put_batch(batches(tools)[0], mesh)).compile(compiler_options=tools.fast)

    def step(state, batch):
        return compiled(state, put_batch(batch, mesh))

    state = init_state(model, tx, mesh, 0, rules=state_rules(model.rules, config), offload=offload)
    return state, step, target


def batches(tools):
    """Three, of two rows for each device; the second has no finite loss."""
    found = [tools.batch(tools.objectives["LM"], seed) for seed in range(3)]
    found = [jax.tree.map(lambda x: np.concatenate([x, x[::-1]]), batch) for batch in found]
    found[1].weights[0, 0] = np.nan
    return found


@pytest.fixture(scope="module", params=MESHES)
def trained(request, tools):
    """(name of the mesh, {offload: (state after three steps, the last metrics)})"""
    done = {}
    for offload in (False, True):
        state, step, target = learner(tools, MESHES[request.param], offload)
        for batch in batches(tools):
            state, metrics = step(state, batch)
        assert jax.tree.map(lambda x: x.sharding, state) == jax.tree.map(lambda x: x.sharding, target)
        done[offload] = state, metrics
    return request.param, done


def test_training_is_the_same(trained, tools):
    _, done = trained
    assert done[True][1]["skipped"] == 1
    assert "pinned_host" in kinds(done[True][0].opt_state) and kinds(done[False][0]) == {"device"}
    tools.assert_close(jax.device_get(done[True]), jax.device_get(done[False]), 1e-6)


def test_it_is_saved_and_restored(trained, tools, tmp_path):
    name, done = trained
    state = done[True][0]
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, state_trees(state), {})
    checkpoints.wait()
    # Back where it was, on the device of the same mesh, and on the host of another.
    for mesh, offload in ((name, True), (name, False), (next(iter(MESHES.keys() - {name})), True)):
        _, _, target = where(tools.model(), MESHES[mesh], offload)
        restored = from_trees(checkpoints.restore(3, state_trees(target)))
        assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(lambda x: x.sharding, target)
        assert_same(restored, state)
    checkpoints.close()


def test_layers_take_turns(tools):
    """What belongs to stacked matrices goes through a loop; the rest in one piece."""
    model = tools.model(num_layers=3)
    target = abstract_state(model, AdamW(schedule=RATE).build(4, model.shapes(), model.axes), make_mesh(MeshConfig()))
    plan = Offload.of(target, model.axes)
    paths = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(target.params)]
    assert list(plan.turns) == [3] and len(plan.turns[3]) == 7
    assert all(paths[i].startswith("layers/") and "norm" not in paths[i] for i in plan.turns[3])
    assert sorted((*plan.turns[3], *plan.alone)) == list(range(len(paths)))
