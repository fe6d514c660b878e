"""Float32 masters of parameters that are kept in fewer bits (mixed-precision training, 1710.03740, section 3.1).

A bfloat16 number has 8 significant bits: what is less than a 512th of it is lost when it is added, and most updates
are.  So the optimizer adds to a float32 copy, and the parameter is that copy, rounded.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxtrain.types import Params


class MasterState(NamedTuple):
    """master: a tree like the parameters, float32, with optax.MaskedNode where there is none.  inner: the state of the
    transformation that updates the masters."""

    master: Any
    inner: Any


def _masked(leaf: Any) -> bool:
    return isinstance(leaf, optax.MaskedNode)


def with_master(tx: optax.GradientTransformation, wanted: Any) -> optax.GradientTransformation:
    """``tx`` made to update float32 masters of the parameters that ``wanted`` (a tree of bool) names.

    All of ``tx`` sees masters in the place of those parameters, weight decay too.  ``apply_updates`` adds its updates.
    """

    def whole(master: Any, params: Params) -> Params:
        return jax.tree.map(lambda m, p: p if _masked(m) else m, master, params, is_leaf=_masked)

    def init(params):
        master = jax.tree.map(lambda p, want: p.astype(jnp.float32) if want else optax.MaskedNode(), params, wanted)
        return MasterState(master, tx.init(whole(master, params)))

    def update(updates, state, params=None):
        assert params is not None, "masters stand in for parameters"
        updates, inner = tx.update(updates, state.inner, whole(state.master, params))
        master = jax.tree.map(lambda m, u: m if _masked(m) else m + u, state.master, updates, is_leaf=_masked)
        return updates, MasterState(master, inner)

    return optax.GradientTransformation(init, update)


def apply_updates(params: Params, updates: Any, opt_state: Any) -> Params:
    """The new parameters: the sum, or where ``opt_state`` (as ``update`` returned it) has a master, that one rounded to
    the parameter's type."""
    if not isinstance(opt_state, MasterState):
        return optax.apply_updates(params, updates)

    def one(master, param, update):
        return optax.apply_updates(param, update) if _masked(master) else master.astype(param.dtype)

    return jax.tree.map(one, opt_state.master, params, updates, is_leaf=_masked)
