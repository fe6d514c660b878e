"""Scores of tokens, and their gradients, from a part of the vocabulary at a time: plain XLA, on one device.

The softmax over a vocabulary needs two sums, and these can be carried from part to part (Milakov & Gimelshein,
1805.02867); with them saved, the backward pass computes each part's logits again and leaves it for good (as
FlashAttention does over keys, 2205.14135).  The vocabulary is cut rather than the tokens because a part of the matrix
is then read once in either direction and its gradient is complete at once: what is carried is the gradient of the
hidden states, ``[N, D]``, and not that of the matrix, ``[V, D]``, which is the largest array of a small model's step.

Under a ``shard_map`` the matrix is a device's own part: of the vocabulary, whose sums are then taken over ``vocab``
axes, and of the width, which is gathered for the columns whose turn it is, so that no device ever holds more of the
matrix or of its gradient than its own part.

Letters: N tokens, D model width, V vocabulary (this device's), C columns of the vocabulary at a time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxtrain.kernels.cross_entropy.reference import Scores
from jaxtrain.sharding import vary_like

# What stands for the maximum of no logits: below any of them, and times 0 still 0.
LOWEST = -1e30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """What is computed; see ``api.cross_entropy``.

    columns: C.  size: of the whole vocabulary, over all devices.
    vocab, embed: mesh axes of a ``shard_map`` around that split the matrix's vocabulary, and its width and tokens both.
    """

    softcap: float
    temperature: float
    table: bool
    entropy: bool
    mean: bool
    columns: int
    size: int
    vocab: tuple[str, ...] = ()
    embed: tuple[str, ...] = ()

    @property
    def axis(self) -> int:
        """The matrix's dimension that counts the vocabulary."""
        return 0 if self.table else 1


def forward(spec: Spec, hidden_ND, matrix, bias_V, targets_N) -> Scores:
    """hidden: compute dtype.  matrix: ``[V, D]`` (``spec.table``) or ``[D, V]``, of any type, cast part by part.
    bias: ``[V]`` or None.  targets: int ``[N]``, ids of the whole vocabulary."""
    place_N = _place(spec, matrix, targets_N)

    def add(start, size, carry):
        """``total = Σ e^{z - top}`` and ``moment = Σ (z - top) e^{z - top}``, ``top`` the maximum so far."""
        top_N, total_N, moment_N, chosen_N, plain_N = carry
        _, z_NC = _logits(spec, hidden_ND, matrix, bias_V, start, size)
        new_N = jnp.maximum(top_N, jnp.max(z_NC, axis=1))
        below_NC = z_NC - new_N[:, None]
        shares_NC = jnp.exp(below_NC)
        if spec.entropy:
            # A logit of -inf cannot occur: 0 · -inf counts as 0.
            parts_NC = jnp.where(shares_NC == 0, 0.0, shares_NC * below_NC)
            moment_N = _shift(total_N, moment_N, top_N - new_N) + jnp.sum(parts_NC, axis=1)
        if spec.mean:
            plain_N = plain_N + jnp.sum(z_NC, axis=1)
        total_N = total_N * jnp.exp(top_N - new_N) + jnp.sum(shares_NC, axis=1)
        chosen_N = chosen_N + jnp.sum(jnp.where(_is(place_N, start, size), z_NC, 0.0), axis=1)
        return new_N, total_N, moment_N, chosen_N, plain_N

    zeros_N = vary_like(jnp.zeros(targets_N.shape, _kind(hidden_ND)), hidden_ND, matrix, targets_N)
    start = (zeros_N + LOWEST, *(zeros_N,) * 4)
    top_N, total_N, moment_N, chosen_N, plain_N = _over_columns(spec, matrix.shape[spec.axis], add, start)
    if spec.vocab:
        best_N = jax.lax.pmax(top_N, spec.vocab)
        shift_N = top_N - best_N
        moment_N = _shift(total_N, moment_N, shift_N)
        total_N = total_N * jnp.exp(shift_N)
        total_N, moment_N, chosen_N, plain_N = jax.lax.psum((total_N, moment_N, chosen_N, plain_N), spec.vocab)
        top_N = best_N
    log_total_N = jnp.log(total_N)
    log_z_N = top_N + log_total_N
    return Scores(
        logps=chosen_N - log_z_N,
        log_z=log_z_N,
        correct=(chosen_N >= top_N).astype(log_z_N.dtype),
        entropy=log_total_N - moment_N / total_N if spec.entropy else None,
        mean_logps=plain_N / spec.size - log_z_N if spec.mean else None,
    )


def backward(
    spec: Spec, hidden_ND, matrix, bias_V, targets_N, found: Scores, grads: Scores, matrix_dtype: Any
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Gradients of hidden (its type, summed over ``spec.vocab``), of the matrix (``matrix_dtype``, summed over
    ``spec.embed``) and of the bias (float32, this device's tokens').

    found: what ``forward`` returned.  grads: cotangents of it.  With p = softmax(z), z = logits / temperature:

        d logps = 1[v = target] − p_v,    d log_z = p_v,    d entropy = −p_v (log p_v + entropy),
        d mean_logps = 1/V − p_v.
    """
    place_N = _place(spec, matrix, targets_N)
    factor_N = grads.log_z - grads.logps
    if spec.mean:
        factor_N = factor_N - grads.mean_logps
    kind = _kind(hidden_ND)

    def add(start, size, carry):
        d_hidden_ND, d_matrix, d_bias_V = carry
        part, z_NC = _logits(spec, hidden_ND, matrix, bias_V, start, size)
        logps_NC = z_NC - found.log_z[:, None]
        p_NC = jnp.exp(logps_NC)
        d_NC = p_NC * factor_N[:, None]
        if spec.entropy:
            surprise_NC = jnp.where(p_NC == 0, 0.0, p_NC * (logps_NC + found.entropy[:, None]))
            d_NC = d_NC - surprise_NC * grads.entropy[:, None]
        d_NC = d_NC + jnp.where(_is(place_N, start, size), grads.logps[:, None], 0.0)
        if spec.mean:
            d_NC = d_NC + (grads.mean_logps / spec.size)[:, None]
        if spec.softcap:
            d_NC = d_NC * (1.0 - jnp.square(z_NC * (spec.temperature / spec.softcap)))
        if spec.temperature != 1.0:
            d_NC = d_NC / spec.temperature
        if bias_V is not None:
            d_bias_V = _put(d_bias_V, jnp.sum(d_NC, axis=0), start, 0)
        # Left in float32, as differentiating whole logits does: the TPU's matrix units round it themselves.
        d_hidden_ND = d_hidden_ND + _dot(d_NC, part, (1, spec.axis), kind)
        sides = (d_NC, hidden_ND) if spec.table else (hidden_ND, d_NC)
        d_part = _dot(*sides, (0, 0), kind)
        if spec.embed:
            d_part = jax.lax.psum_scatter(d_part, spec.embed, scatter_dimension=1 - spec.axis, tiled=True)
        d_matrix = _put(d_matrix, d_part, start, spec.axis)
        return d_hidden_ND, d_matrix, d_bias_V

    empty = (
        jnp.zeros(hidden_ND.shape, kind),
        jnp.zeros(matrix.shape, matrix_dtype),
        None if bias_V is None else jnp.zeros(bias_V.shape, kind),
    )
    empty = jax.tree.map(lambda x: vary_like(x, hidden_ND, matrix, targets_N), empty)
    d_hidden_ND, d_matrix, d_bias_V = _over_columns(spec, matrix.shape[spec.axis], add, empty)
    d_hidden_ND = d_hidden_ND.astype(hidden_ND.dtype)
    if spec.vocab:
        d_hidden_ND = jax.lax.psum(d_hidden_ND, spec.vocab)
    return d_hidden_ND, d_matrix, d_bias_V


def _over_columns(spec: Spec, size: int, add: Callable[[Any, int, Any], Any], carry: Any) -> Any:
    """``add(start, count, carry)`` for all columns, ``spec.columns`` at a time and what is left over by itself."""
    turns, rest = divmod(size, spec.columns)
    if turns:
        carry = jax.lax.fori_loop(0, turns, lambda i, carry: add(i * spec.columns, spec.columns, carry), carry)
    return add(turns * spec.columns, rest, carry) if rest else carry


def _logits(spec: Spec, hidden_ND, matrix, bias_V, start, size: int):
    """Columns ``start`` to ``start + size``: of the matrix in the compute dtype, and ``logits / temperature``."""
    part = jax.lax.dynamic_slice_in_dim(matrix, start, size, spec.axis)
    if part.dtype != hidden_ND.dtype:
        part = _rounded(part, hidden_ND.dtype)
    if spec.embed:
        part = jax.lax.all_gather(part, spec.embed, axis=1 - spec.axis, tiled=True)
    kind = _kind(hidden_ND)
    logits_NC = _dot(hidden_ND, part, (1, 1 - spec.axis), kind)
    if bias_V is not None:
        logits_NC = logits_NC + jax.lax.dynamic_slice_in_dim(bias_V, start, size).astype(kind)
    if spec.softcap:
        logits_NC = spec.softcap * jnp.tanh(logits_NC / spec.softcap)
    return part, logits_NC if spec.temperature == 1.0 else logits_NC / spec.temperature


def _is(place_N, start, size: int):
    """bool ``[N, C]``: which of the columns is the target."""
    return (place_N - start)[:, None] == jnp.arange(size, dtype=place_N.dtype)


def _rounded(part, dtype):
    """``astype``, for a narrower type in two steps: the TPU's compiler moves a mere cast out of the loop and keeps a
    copy of the whole matrix."""
    kind = jnp.finfo(dtype)
    if kind.bits < jnp.finfo(part.dtype).bits:
        part = jax.lax.reduce_precision(part, kind.nexp, kind.nmant)
    return part.astype(dtype)


def _place(spec: Spec, matrix, targets_N):
    """In which of this device's columns each target stands, if in any."""
    return targets_N - jax.lax.axis_index(spec.vocab) * matrix.shape[spec.axis] if spec.vocab else targets_N


def _shift(total_N, moment_N, by_N):
    """``Σ (z - new) e^{z - new}`` from the sums by ``top``, where ``by = top - new``."""
    return jnp.exp(by_N) * (moment_N + by_N * total_N)


def _kind(hidden_ND) -> Any:
    return jnp.promote_types(hidden_ND.dtype, jnp.float32)


def _dot(a, b, dims: tuple[int, int], kind: Any):
    """The product of two matrices over one dimension of each."""
    return jax.lax.dot_general(a, b, (((dims[0],), (dims[1],)), ((), ())), preferred_element_type=kind)


def _put(whole, part, start, axis: int):
    return jax.lax.dynamic_update_slice_in_dim(whole, part.astype(whole.dtype), start, axis)
