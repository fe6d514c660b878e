"""Grouped products in plain XLA: a loop over the groups, the definition that every backend must match in value and
gradient.

Letters: M rows, E groups (experts), K and N the sides of a group's matrix.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def grouped_matmul(x_MK: jax.Array, w_EKN: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """Every group's matrix with all rows, of which the group's own are kept: E times the work that is needed."""
    rows_M1 = jnp.arange(x_MK.shape[0])[:, None]
    ends_E = jnp.cumsum(sizes_E)
    out_MN = jnp.zeros((x_MK.shape[0], w_EKN.shape[2]), jnp.float32)
    for group in range(w_EKN.shape[0]):
        mine_M1 = (rows_M1 >= ends_E[group] - sizes_E[group]) & (rows_M1 < ends_E[group])
        product_MN = jnp.matmul(jnp.where(mine_M1, x_MK, 0), w_EKN[group], preferred_element_type=jnp.float32)
        out_MN += jnp.where(mine_M1, product_MN, 0)
    return out_MN.astype(x_MK.dtype)
