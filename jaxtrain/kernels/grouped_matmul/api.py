"""The grouped product that models call: checks shapes, then hands over to a backend."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jaxtrain.kernels.grouped_matmul import blocked, reference
from jaxtrain.sharding import vary_like

BACKENDS = ("auto", "blocked", "ragged", "reference")


def grouped_matmul(x_MK: jax.Array, w_EKN: jax.Array, sizes_E: jax.Array, *, backend: str = "auto") -> jax.Array:
    """Multiplies consecutive groups of rows, each by its own matrix.

    x_MK: ``[M, K]``, sorted by group.  w_EKN: ``[E, K, N]``.
    sizes_E: int32 ``[E]``, how many rows each group has; their sum is at most M, and rows beyond it give 0 and have
        no gradient, whatever they hold.
    backend: "blocked" loops over blocks of rows, "ragged" is ``jax.lax.ragged_dot``, "reference" a loop over groups;
        "auto" is blocked on a CPU and ragged elsewhere, where the compiler knows a kernel for it.
    Returns ``[M, N]`` in the type of ``x_MK``, summed in float32.
    Raises ValueError for shapes that do not fit and for an unknown backend.
    """
    if backend not in BACKENDS:
        raise ValueError(f"grouped_matmul backend {backend!r} is unknown; one of {BACKENDS}")
    if x_MK.ndim != 2 or w_EKN.ndim != 3 or x_MK.shape[1] != w_EKN.shape[1] or sizes_E.shape != w_EKN.shape[:1]:
        raise ValueError(
            f"grouped_matmul: x {x_MK.shape}, w {w_EKN.shape} and sizes {sizes_E.shape} do not fit: want [M, K], "
            "[E, K, N] and [E]"
        )
    if backend == "reference":
        return reference.grouped_matmul(x_MK, w_EKN, sizes_E)
    # A custom gradient must vary over the axes of a shard_map that its argument varies over.
    arrays = (x_MK, w_EKN, sizes_E)
    return _grouped_matmul(backend, *(vary_like(x, *arrays) for x in arrays))


def _choose(backend: str, blocks, ragged, *args):
    if backend == "auto":
        return jax.lax.platform_dependent(*args, cpu=blocks, default=ragged)
    return (blocks if backend == "blocked" else ragged)(*args)


def _inside(x_MK: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """Rows beyond the last group as 0: what ragged_dot gives for them differs between backends."""
    return jnp.where(jnp.arange(x_MK.shape[0])[:, None] < jnp.sum(sizes_E), x_MK, 0)


def _ragged(x_MK, w_EKN, sizes_E):
    # In the rows' own type, as with every other product: the matrix units add up in float32 whatever comes out, and
    # float32 rows, twice as large, would be the most that a step keeps.
    return _inside(jax.lax.ragged_dot(x_MK, w_EKN, sizes_E, preferred_element_type=x_MK.dtype), sizes_E)


def _ragged_transposed(y_MN, w_EKN, sizes_E):
    return _ragged(y_MN, jnp.swapaxes(w_EKN, 1, 2), sizes_E)


_OUTER = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
)


# JAX 0.10's libtpu has no kernel for the gradient of the matrices and multiplies every row for every group: with 64
# groups 64 times the work.  That of JAX 0.12 has one.  Compiled for v5p and walked (49,152 rows, 64 groups of
# 2,048 x 1,408, 0.62 ms of products), blocks of 128, 512, 1,024 and 2,048 rows take 4.4, 2.05, 1.96 and 2.8 ms.
_OUTER_ROWS = 512


def _ragged_outer(x_MK, y_MN, sizes_E):
    if jax.__version_info__ < (0, 12):
        by_blocks = functools.partial(blocked.outer_product, rows=_OUTER_ROWS)
        return jax.lax.platform_dependent(x_MK, y_MN, sizes_E, tpu=by_blocks, default=_general_outer)
    return _general_outer(x_MK, y_MN, sizes_E)


def _general_outer(x_MK, y_MN, sizes_E):
    return jax.lax.ragged_dot_general(
        _inside(x_MK, sizes_E), _inside(y_MN, sizes_E), sizes_E, _OUTER, preferred_element_type=jnp.float32
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped_matmul(backend, x_MK, w_EKN, sizes_E):
    return _choose(backend, blocked.product, _ragged, x_MK, w_EKN, sizes_E)


def _forward(backend, x_MK, w_EKN, sizes_E):
    return _grouped_matmul(backend, x_MK, w_EKN, sizes_E), (x_MK, w_EKN, sizes_E)


def _backward(backend, saved, grad_MN):
    x_MK, w_EKN, sizes_E = saved
    transposed = functools.partial(blocked.product, transpose=True)
    grad_x = _choose(backend, transposed, _ragged_transposed, grad_MN, w_EKN, sizes_E)
    grad_w = _choose(backend, blocked.outer_product, _ragged_outer, x_MK, grad_MN, sizes_E)
    return grad_x, grad_w.astype(w_EKN.dtype), None


_grouped_matmul.defvjp(_forward, _backward)
