"""Lookups in a table that is split over devices: the same vectors and gradient, and the table stays where it is."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from jaxtrain.models.lookup import lookup
from jaxtrain.sharding import DEFAULT_RULES, Constrain, MeshConfig, batch_sharding, make_mesh

ROWS, LENGTH, ENTRIES, WIDTH = 16, 8, 64, 32
MESHES = [
    MeshConfig(fsdp=8),
    MeshConfig(fsdp=4, data=2),
    MeshConfig(fsdp=4, tensor=2),
    MeshConfig(fsdp=2, expert=2, stage=2),
    MeshConfig(context=2, fsdp=4),
]


@pytest.mark.parametrize("config", MESHES, ids=str)
def test_a_split_table_is_read_where_it_lies(config):
    rng = np.random.default_rng(0)
    table = rng.normal(size=(ENTRIES, WIDTH)).astype(np.float32)
    ids = rng.integers(0, ENTRIES, (ROWS, LENGTH)).astype(np.int32)
    d_x = rng.normal(size=(ROWS, LENGTH, WIDTH)).astype(np.float32)
    mesh = make_mesh(config)
    rows, own = batch_sharding(mesh), NamedSharding(mesh, DEFAULT_RULES.spec(("vocab", "embed")))

    def both(table, ids, d_x):
        x, back = jax.vjp(lambda table: lookup(table, ids, "vocab", Constrain(DEFAULT_RULES)), table)
        return x, back(d_x)[0]

    args = (jax.device_put(table, own), jax.device_put(ids, rows), jax.device_put(d_x, rows))
    with jax.set_mesh(mesh):
        compiled = jax.jit(both, out_shardings=(None, own)).lower(*args).compile()
        x, d_table = compiled(*args)
    wanted, back = jax.vjp(lambda table: jnp.take(table, ids, axis=0), jnp.asarray(table))
    np.testing.assert_array_equal(x, wanted)
    np.testing.assert_allclose(d_table, back(jnp.asarray(d_x))[0], atol=1e-5)
    gathered = re.search(rf"f32\[{ENTRIES // config.tensor},{WIDTH}\]\S* all-gather", compiled.as_text())
    assert bool(gathered) == (config.context > 1)


def test_without_a_mesh_it_is_plain_indexing():
    table = jnp.arange(12.0).reshape(4, 3)
    np.testing.assert_array_equal(lookup(table, jnp.array([[2, 0]]), "vocab", Constrain(DEFAULT_RULES))[0, 0], table[2])
