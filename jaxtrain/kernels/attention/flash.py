"""What the backends that never hold ``T x S`` logits share: the pair (output, log-sum-exp) and its gradient.

A backend is a module with

    forward(spec, q_BNTH, k_BKSH, v_BKSV, marks) -> out_BNTV, lse_BNT
    backward(spec, q_BNTH, k_BKSH, v_BKSV, marks, lse_BNT, delta_BNT, d_out_BNTV) -> dq, dk, dv
    refusal(spec, q, k, v) -> None, or why it cannot run on these shapes and types (q, k, v may be ShapeDtypeStructs)

``lse`` and ``delta`` are float32.  ``forward`` says -inf where a query sees nothing, and its output there is 0;
``backward`` is given 0 in its place.  Gradients have the types of what they belong to.

FlashAttention-2 (2307.08691), equations in section 3: with P = exp(cap(s) - lse) and dP = d_out v^T,

    delta_t = sum_v d_out[t, v] out[t, v] - d_lse[t],    dS = P * (dP - delta) * cap'(s),
    dq = scale dS k,    dk = scale dS^T q,    dv = P^T d_out.

Since ``lse`` and ``delta`` are of the whole softmax, ``backward`` may be called on any part of the keys, and the dq of
the parts add up: that is all that attention over a ring of devices needs (2310.01889).
"""

from __future__ import annotations

from functools import partial
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from jaxtrain.kernels.attention.masks import Marks, Spec


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def flash(backend: ModuleType, spec: Spec, q_BNTH, k_BKSH, v_BKSV, marks: Marks) -> tuple[jax.Array, jax.Array]:
    """``out [B, N, T, V]`` in the type of q, and ``lse`` float32 ``[B, N, T]``, both differentiable."""
    return backend.forward(spec, q_BNTH, k_BKSH, v_BKSV, marks)


def _forward(backend, spec, q_BNTH, k_BKSH, v_BKSV, marks):
    # By this name a model may keep both rather than compute attention again in the backward pass.
    out_BNTV, lse_BNT = checkpoint_name(backend.forward(spec, q_BNTH, k_BKSH, v_BKSV, marks), "attention")
    return (out_BNTV, lse_BNT), (q_BNTH, k_BKSH, v_BKSV, marks, out_BNTV, lse_BNT)


def _backward(backend, spec, saved, cotangents):
    q_BNTH, k_BKSH, v_BKSV, marks, out_BNTV, lse_BNT = saved
    d_out_BNTV, d_lse_BNT = cotangents
    lse_BNT, delta_BNT = for_backward(out_BNTV, lse_BNT, d_out_BNTV, d_lse_BNT)
    grads = backend.backward(spec, q_BNTH, k_BKSH, v_BKSV, marks, lse_BNT, delta_BNT, d_out_BNTV)
    # Integers have no gradient, which JAX writes as float0.
    none = jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), marks)
    return (*grads, none)


def for_backward(out_BNTV, lse_BNT, d_out_BNTV, d_lse_BNT) -> tuple[jax.Array, jax.Array]:
    """``lse`` and ``delta`` as ``backward`` wants them, float32 ``[B, N, T]``."""
    seen_BNT = ~jnp.isneginf(lse_BNT)
    delta_BNT = jnp.sum(out_BNTV.astype(jnp.float32) * d_out_BNTV.astype(jnp.float32), axis=-1)
    delta_BNT = delta_BNT - jnp.where(seen_BNT, d_lse_BNT, 0.0)
    return jnp.where(seen_BNT, lse_BNT, 0.0), delta_BNT


flash.defvjp(_forward, _backward)
