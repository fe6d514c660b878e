"""A model as a stage trains it: the same step for training and for planning it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh

from jaxtrain.models import Model
from jaxtrain.sharding import ShardingRules, state_rules
from jaxtrain.train.offload import Offload
from jaxtrain.train.state import abstract_state, init_state
from jaxtrain.train.step import Step, in_mesh, make_train_step
from jaxtrain.train.zero import gather
from jaxtrain.types import Objective, Params, TrainState


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Learner:
    """One trained model of a stage.

    target: the state as ShapeDtypeStructs with shardings, what it is restored into.
    jitted: the train step; compile it with the mesh set.  rules, offload: where the state lives.
    """

    model: Model
    tx: Any
    target: TrainState
    jitted: Any
    mesh: Mesh
    rules: ShardingRules
    offload: bool

    def fresh(self, seed: int, params: Params) -> TrainState:
        """The state before the first update, of a copy of ``params``."""
        return init_state(self.model, self.tx, self.mesh, seed, params, self.rules, self.offload)

    @property
    def step(self) -> Step:
        return in_mesh(self.jitted, self.mesh)


def make_learner(
    stage: Any, model: Model, objective: Objective, optimizer: Any, *, updates: int, mesh: Mesh
) -> Learner:
    """stage: a Stage or PPOStage, for what its steps share.  updates: of the whole run, for the schedule."""
    tx = optimizer.build(updates, model.shapes(), model.axes)
    rules = state_rules(model.rules, stage.mesh)
    target = abstract_state(model, tx, mesh, rules, optimizer.offload)
    jitted = make_train_step(
        model.apply,
        objective,
        tx,
        accumulate=stage.accumulate,
        clip_norm=stage.clip_norm,
        learning_rate=lambda done: optimizer.learning_rate(done, updates),
        balance=model.balance,
        shardings=jax.tree.map(lambda x: x.sharding, target),
        gather=gather(model, mesh, stage.mesh, stage.accumulate),
        offload=Offload.of(target, model.axes) if optimizer.offload else None,
    )
    return Learner(model=model, tx=tx, target=target, jitted=jitted, mesh=mesh, rules=rules, offload=optimizer.offload)
