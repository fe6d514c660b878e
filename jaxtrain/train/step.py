"""The one train step.  Every stage is this function with another objective plugged in."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.extend.core import get_opaque_trace_state
from jax.sharding import Mesh

from jaxtrain.train.compiler import compiler_options
from jaxtrain.train.offload import Offload, update_where
from jaxtrain.train.zero import Gather
from jaxtrain.types import Apply, Array, Auxiliary, Loss, Objective, Sum, TrainState

Step = Callable[[TrainState, Any], tuple[TrainState, dict[str, Array]]]


def divide(x: Sum) -> Array:
    """The mean; 0, not NaN, where nothing had weight."""
    return jnp.where(x.weight != 0, x.total / jnp.where(x.weight != 0, x.weight, 1), 0.0)


def split_rows(batch: Any, count: int) -> Any:
    """``[B, ...] -> [count, B / count, ...]``.  Microbatch i takes rows i, i + count, ...: when rows are split over
    devices in blocks, each device keeps its own and nothing moves."""

    def one(x):
        if x.shape[0] % count:
            raise ValueError(f"a batch of {x.shape[0]} rows is not divisible into {count} microbatches")
        return jnp.swapaxes(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 0, 1)

    return jax.tree.map(one, batch)


def with_auxiliary(apply: Apply, objective: Objective, params: Any, batch: Any, rng: Array) -> Loss:
    """The objective's loss, with the auxiliary losses, metrics and counts of every call that it makes of the model.

    Each auxiliary loss is a mean over those calls, by its own weights, and is added for every unit of the objective's
    weight: after the step's division its coefficient means the same whatever the objective counts.
    Raises ValueError where a model with auxiliary losses is called inside a transformation of the objective's own
    (``jax.checkpoint``, ``scan``, ``grad`` …), out of which they could not be taken.
    """
    found: list[Auxiliary] = []
    outside = get_opaque_trace_state(convention="flax")

    def collecting(*args: Any, **kwargs: Any) -> Any:
        outputs = apply(*args, **kwargs)
        auxiliary = outputs.auxiliary
        if auxiliary is None:
            return outputs
        if get_opaque_trace_state(convention="flax") == outside:
            found.append(auxiliary)
        elif auxiliary.losses:
            raise ValueError(
                f"{type(objective).__name__} calls the model inside a transformation (jax.checkpoint, scan, grad …), "
                f"where its auxiliary losses {sorted(auxiliary.losses)} would be lost: call it outside, or set their "
                "coefficients to 0 in the model's config"
            )
        return outputs

    loss = objective(collecting, params, batch, rng)
    if not found:
        return loss
    losses, metrics = (_added([getattr(one, name) for one in found]) for name in ("losses", "metrics"))
    extra = sum((divide(found) for found in losses.values()), jnp.zeros(()))
    return dataclasses.replace(
        loss,
        total=loss.total + jax.lax.stop_gradient(loss.weight) * extra,
        metrics={**metrics, **loss.metrics},
        counts=_added([one.counts for one in found]),
    )


def _added(dicts: list[Mapping[str, Any]]) -> dict[str, Any]:
    """Sums by name."""
    names = {name: None for found in dicts for name in found}
    return {name: jax.tree.map(lambda *x: sum(x), *(d[name] for d in dicts if name in d)) for name in names}


def loss_and_grads(
    apply: Apply,
    objective: Objective,
    params: Any,
    batch: Any,
    rng: Array,
    accumulate: int = 1,
    gather: Gather | None = None,
) -> tuple[Loss, Any]:
    """The summed loss and the gradient of the *sum*, over ``accumulate`` microbatches.

    Nothing is divided here: averaging microbatch means would weight a token by how few others share its
    microbatch.  Gradients and sums are float32.

    What a model wants of any objective in training (``Outputs.auxiliary``: balance of experts, multi-token prediction)
    is added here, see ``with_auxiliary``.  A loss of balance is a product of means and so not a sum over tokens: it is
    taken of each microbatch (over all its devices), and counts as much as the objective's weight in it.

    gather: see ``zero``.
    """
    if gather is not None:
        params = gather.params(params)

    def total(params, micro, rng):
        params = params if gather is None else gather.at_use(params)
        loss = with_auxiliary(apply, objective, params, micro, rng)
        return loss.total, loss

    def once(micro, rng):
        grads, loss = jax.grad(total, has_aux=True)(params, micro, rng)
        loss, grads = jax.tree.map(lambda x: x.astype(jnp.float32), (loss, grads))
        return loss, grads if gather is None else gather.microbatch(grads)

    def done(sums):
        loss, grads = sums
        return loss, grads if gather is None else gather.sums(grads)

    if accumulate == 1:
        return done(once(batch, jax.random.fold_in(rng, 0)))
    micros = split_rows(batch, accumulate)
    shapes = jax.eval_shape(once, jax.tree.map(lambda x: x[0], micros), rng)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def body(sums, scanned):
        number, micro = scanned
        new = once(micro, jax.random.fold_in(rng, number))
        return jax.tree.map(jnp.add, sums, new), None

    return done(jax.lax.scan(body, zeros, (jnp.arange(accumulate), micros))[0])


def make_train_step(
    apply: Apply,
    objective: Objective,
    tx: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    clip_norm: float | None = 1.0,
    learning_rate: Callable[[Array], Array] | None = None,
    balance: Callable[[Any, Any, Any], Any] | None = None,
    mesh: Mesh | None = None,
    shardings: TrainState | None = None,
    gather: Gather | None = None,
    offload: Offload | None = None,
) -> Step:
    """Builds ``step(state, batch) -> (state, metrics)``, jitted, with the old state donated.

    Gradients of the summed loss are added over microbatches, divided once by the summed weight, clipped to a
    global norm of ``clip_norm`` (None: not clipped), and handed to ``tx``.  A step whose loss or gradient is NaN
    or Inf leaves parameters and optimizer as they were and is counted in ``state.skipped`` and ``state.streak``.

    learning_rate: schedule over applied updates, for the metrics only.
    balance: ``Model.balance``, for models whose routers' biases are moved by the loads of the whole batch rather than
        by a gradient.  A skipped step leaves them too.
    mesh, shardings: where the state lives; the result stays there.
    gather: what is made whole for the time of the step, see ``zero``.
    offload: how a state is updated whose optimizer's part is on the host, see ``offload``.
    metrics: float32 scalars: every metric of the objective divided by its own weight, "loss" (what is minimised,
        where the objective has no metric of that name), "weight" (tokens, pairs or sequences behind it), "grad_norm"
        (before clipping), "skipped", "streak", "learning_rate", and the model's own ("moe/…", "mtp/…").
    """
    if accumulate < 1:
        raise ValueError(f"accumulate must be at least 1, found {accumulate}")
    if clip_norm is not None and not clip_norm > 0:
        raise ValueError(f"clip_norm must be positive, or None for no clipping, found {clip_norm}")

    def step(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Array]]:
        rng = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
        loss, grads = loss_and_grads(apply, objective, state.params, batch, rng, accumulate, gather)

        per_weight = jnp.where(loss.weight != 0, 1 / jnp.where(loss.weight != 0, loss.weight, 1), 0.0)
        grad_norm = optax.tree.norm(grads) * per_weight
        clip = 1.0 if clip_norm is None else jnp.minimum(1.0, clip_norm / jnp.maximum(grad_norm, 1e-12))
        grads = jax.tree.map(lambda g: g * (per_weight * clip), grads)

        good = jnp.isfinite(loss.total) & jnp.isfinite(grad_norm)
        update = update_where if offload is None else offload.update
        params, opt_state = update(tx, good, grads, state.opt_state, state.params)
        if balance is not None:
            if loss.counts is None:
                raise ValueError(
                    f"{type(objective).__name__} calls the model inside a transformation (jax.checkpoint, scan, "
                    "grad …), where the loads of its experts are lost: call it outside"
                )
            # Without counts nothing moves.
            counts = jax.tree.map(lambda x: jnp.where(good, x, 0), loss.counts)
            params = balance(state.params, params, counts)
        bad = (~good).astype(jnp.int32)
        new_state = dataclasses.replace(
            state,
            step=state.step + 1,
            skipped=state.skipped + bad,
            streak=(state.streak + bad) * bad,
            params=params,
            opt_state=opt_state,
        )
        # An objective's own "loss" (such as LM's, without its z-loss) stays: it is the one to compare runs by.
        metrics = {"loss": Sum(loss.total, loss.weight), **loss.metrics}
        metrics = {name: divide(metric) for name, metric in metrics.items()} | {
            "weight": loss.weight,
            "grad_norm": grad_norm,
            "skipped": new_state.skipped.astype(jnp.float32),
            "streak": new_state.streak.astype(jnp.float32),
        }
        if learning_rate is not None:
            metrics["learning_rate"] = learning_rate(state.step - state.skipped)
        return new_state, metrics

    placed = {}
    if shardings is not None:
        options = compiler_options(jax.tree.leaves(shardings)[0].mesh)
        placed = {"out_shardings": (shardings, None), "compiler_options": options}
    jitted = jax.jit(step, donate_argnums=0, **placed)
    return jitted if mesh is None else in_mesh(jitted, mesh)


def in_mesh(jitted: Callable, mesh: Mesh) -> Callable:
    """Calls ``jitted`` with the mesh set, so that constraints inside it apply."""

    def call(*args):
        with jax.set_mesh(mesh):
            return jitted(*args)

    return call
