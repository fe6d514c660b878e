"""Looking vectors up in a table of embeddings that is split over devices.

Letters: B rows, T tokens, V entries of the table, D width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxtrain.sharding import Constrain
from jaxtrain.types import Array


def lookup(table: Array, ids: Array, axis: str, constrain: Constrain) -> Array:
    """``[V, D], int [B, T] -> [B, T, D]`` in the table's type, split by rows.

    Devices that split the table's width look up their columns of all of each other's rows, and exchange them for the
    other columns of their own rows: what is sent is one layer's activations, and not the table, which no device holds
    whole, nor its gradient.  Where the sequence is split, the table is gathered.

    axis: the logical name of the table's first dimension.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return jnp.take(table, ids, axis=0)
    if mesh.shape["context"] > 1:
        return jnp.take(constrain(table, (axis, "act_embed")), ids, axis=0)
    rows, columns = (constrain.rules.spec((name,))[0] or () for name in ("batch", "embed"))
    rows = tuple(name for name in rows if name not in columns)
    ids = jax.lax.with_sharding_constraint(ids, PartitionSpec(rows, None))
    x = jnp.take(constrain(table, (axis, "embed")), ids, axis=0)
    x = jax.lax.with_sharding_constraint(x, PartitionSpec(rows, None, columns))
    return constrain(x, ("batch", "sequence", "act_embed"))
