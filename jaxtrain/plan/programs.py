"""The programs of a stage as training runs them, with shapes in place of arrays.

Nothing here reads data, tokenizers or checkpoints: a batch's shape follows from the configuration.  A reference or a
reward model that lies in a folder is taken to be of the same size as the stage's own model.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from jaxtrain.config import PPOStage, Recipe, Stage
from jaxtrain.generate.engine import prefill_rows
from jaxtrain.generate.prepare import abstract_prepared
from jaxtrain.generate.programs import abstract_slots
from jaxtrain.generate.programs import programs as sampler
from jaxtrain.generate.requests import bucket
from jaxtrain.generate.sampling import Sampling
from jaxtrain.models import Model, build_model
from jaxtrain.models.flops import forward_flops_per_token, head_flops_per_token
from jaxtrain.objectives.dpo import DPO, add_reference
from jaxtrain.plan.chips import Slice
from jaxtrain.plan.gpus import TARGETS
from jaxtrain.recipe.learner import Learner, make_learner
from jaxtrain.rl.rewards import scores_at
from jaxtrain.rl.rollout import score_rows
from jaxtrain.sharding import AXES, batch_sharding, ways
from jaxtrain.train.state import abstract_params
from jaxtrain.train.zero import data_in_layers
from jaxtrain.types import Pairs, Rollout, Tokens

# device_kind, as the compiler calls the chips that it knows.
KINDS = {"v4": "TPU v4", "v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite", "tpu7x": "TPU7x"}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Program:
    """One jitted function of a stage.

    name: what it does.  kind: "train", "forward", "prefill" (of the sampler) or "decode".  calls: how often it runs for
        one step of the stage (an iteration of PPO).  jitted, args: to lower with the mesh set.
    model, objective, learner: what it computes with; the latter two are None of what trains nothing.
    held: parameters that lie beside those that are arguments, which the sampler has made of them; None elsewhere.
    slots: beside a prefill, what the sampler keeps of the rows that are being written.
    rows, length: of its batch, over all devices.  accumulate: microbatches.  zero, zero_data: of the
        stage's mesh.
    new_tokens: of a decode, how many it writes after each row's prompt.  Where a row ends depends on what is sampled;
        planned is that every row is written to its limit, in one call.
    """

    name: str
    kind: str
    calls: int
    jitted: Any
    args: tuple[Any, ...]
    model: Model
    rows: int
    length: int
    objective: Any = None
    learner: Learner | None = None
    held: Any = None
    slots: Any = None
    accumulate: int = 1
    zero: int = 3
    zero_data: bool = False
    new_tokens: int = 0

    @property
    def params(self) -> Any:
        """Of the model, as ShapeDtypeStructs with shardings."""
        if self.learner:
            return self.learner.target.params
        return self.held or next(x for x in self.args if isinstance(x, dict))

    def data_in_layers(self, mesh: Any) -> bool:
        """See ``train.zero``."""
        return data_in_layers(self.zero, self.zero_data, mesh, self.accumulate)

    def split(self, mesh: Any, *names: str) -> int:
        """Over how many devices dimensions of these logical names are split, together."""
        return math.prod(ways(mesh, self.model.rules.spec((name,))[0]) for name in names)

    @property
    def tokens(self) -> int:
        """Positions of one call."""
        return self.rows * (self.new_tokens or self.length)

    @property
    def model_flops(self) -> float:
        """What the mathematics of one call asks for, over all devices: causal attention, nothing computed twice."""
        return self._flops(lambda length: length)

    @property
    def model_flops_non_causal(self) -> float:
        """The same with every token attending to the whole row, as some count it: a row of 2 T - 1 tokens has T keys a
        token under a causal mask."""
        return self._flops(lambda length: 2 * length - 1)

    def _flops(self, counted: Callable[[int], int]) -> float:
        """counted: as rows of which length rows of another length are counted."""
        config = self.model.config

        def row(length: int) -> float:
            return length * forward_flops_per_token(config, counted(length)) if length else 0.0

        found = row(self.length)
        if self.kind == "decode":
            found -= row(self.length - self.new_tokens)
        elif self.kind == "prefill":  # the next token follows from the last alone
            found -= (self.length - 1) * head_flops_per_token(config)
        return self.rows * found * (3 if self.kind == "train" else 1)


def abstract_mesh(config: Any, where: Slice) -> AbstractMesh:
    """The mesh without devices, enough for shapes and for the choice of kernels.

    Raises ValueError where the config's sizes do not fill the slice.
    """
    sizes = mesh_sizes(config, where)
    kind = KINDS.get(where.chip.name) or TARGETS[where.chip.name].kind
    cores = (2 if where.chip.name in ("v4", "v5p") else 1) if where.chip.is_tpu else None
    device = jax.sharding.AbstractDevice(
        device_kind=kind, num_cores=cores, platform="tpu" if where.chip.is_tpu else "cuda"
    )
    types = (jax.sharding.AxisType.Auto,) * len(AXES)
    return AbstractMesh(tuple(sizes.values()), AXES, axis_types=types, abstract_device=device)


def mesh_sizes(config: Any, where: Slice) -> dict[str, int]:
    """Sizes by axis.  Raises ValueError where they need more or fewer devices than the slice has."""
    sizes = config.sizes(where.devices)
    count = math.prod(sizes.values())
    if count != where.devices:
        raise ValueError(
            f"the mesh {sizes} has {count} devices, but {where.name} has {where.devices}; set one axis of MeshConfig "
            "to -1, or choose another --topology"
        )
    return sizes


def programs(stage: Any, recipe: Recipe, mesh: Mesh | AbstractMesh) -> list[Program]:
    """Of one step of a stage, in order."""
    return _ppo(stage, recipe, mesh) if isinstance(stage, PPOStage) else _supervised(stage, recipe, mesh)


def _supervised(stage: Stage, recipe: Recipe, mesh: Any) -> list[Program]:
    _check_rows(stage.name, "batch_size", stage.batch_size, mesh)
    model = build_model(stage.model)
    learner = make_learner(stage, model, stage.objective, stage.optimizer, updates=stage.steps, mesh=mesh)
    batch = abstract_batch(stage.data, stage.batch_size, mesh)
    pairs = isinstance(batch, Pairs)
    size = {"rows": stage.batch_size * (2 if pairs else 1), "length": stage.data.seq_len}
    train = Program(
        name="train",
        kind="train",
        calls=1,
        jitted=learner.jitted,
        args=(learner.target, batch),
        model=model,
        objective=stage.objective,
        learner=learner,
        accumulate=stage.accumulate,
        zero=stage.mesh.zero,
        zero_data=stage.mesh.zero_data,
        **size,
    )
    if not isinstance(stage.objective, DPO):
        return [train]
    frozen = build_model(_model_of(recipe, stage.reference or stage.init, stage.model))
    call = jax.jit(functools.partial(add_reference, frozen.apply))
    args = (abstract_params(frozen, mesh), batch)
    return [Program(name="reference", kind="forward", calls=1, jitted=call, args=args, model=frozen, **size), train]


def _ppo(stage: PPOStage, recipe: Recipe, mesh: Any) -> list[Program]:
    ppo = stage.ppo
    for name in ("prompts_per_iteration", "minibatch_size"):
        _check_rows(stage.name, f"ppo.{name}", getattr(ppo, name), mesh)
    length = stage.data.max_prompt_len + ppo.max_new_tokens
    minibatches = -(-ppo.prompts_per_iteration // ppo.minibatch_size)
    size = {"rows": ppo.minibatch_size, "length": length}
    floats = _arrays(mesh, ppo.minibatch_size, length, jnp.float32)
    tokens = abstract_tokens(ppo.minibatch_size, length, mesh)
    rollout = Rollout(tokens=tokens, **{f.name: floats for f in dataclasses.fields(Rollout) if f.name != "tokens"})

    policy_model = build_model(stage.model)
    learners = {
        "policy": make_learner(
            stage, policy_model, ppo.objective(stage.objective), stage.optimizer, updates=ppo.updates, mesh=mesh
        )
    }
    objectives = {"policy": ppo.objective(stage.objective), "critic": stage.critic_objective}
    scored = {"policy": policy_model, "reference": policy_model}
    frozen = []
    if stage.critic is not None:
        scored["critic"] = build_model(stage.critic)
        learners["critic"] = make_learner(
            stage, scored["critic"], stage.critic_objective, stage.critic_optimizer, updates=ppo.updates, mesh=mesh
        )
    if stage.reward_model is not None:
        heads = dataclasses.replace(stage.model, heads=("reward",))
        frozen = [_reward(build_model(_model_of(recipe, stage.reward_model, heads)), ppo, length, mesh)]
    found = _rollout(stage, policy_model, mesh)
    for name, model in scored.items():
        trained = learners.get(name)
        params = trained.target.params if trained else abstract_params(model, mesh)
        args = (model.apply, ppo.temperature, params, tokens)
        found.append(
            Program(
                name=f"score: {name}",
                kind="forward",
                calls=minibatches,
                jitted=score_rows,
                args=args,
                model=model,
                **size,
            )
        )
    found += frozen
    for name, learner in learners.items():
        found.append(
            Program(
                name=f"train: {name}",
                kind="train",
                calls=ppo.epochs * minibatches,
                jitted=learner.jitted,
                args=(learner.target, rollout),
                model=learner.model,
                objective=objectives[name],
                learner=learner,
                accumulate=stage.accumulate,
                zero=stage.mesh.zero,
                zero_data=stage.mesh.zero_data,
                **size,
            )
        )
    return found


def _reward(model: Model, ppo: Any, length: int, mesh: Any) -> Program:
    """The reward model reads all of an iteration's completions at once."""
    rows = ppo.prompts_per_iteration
    last = jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=batch_sharding(mesh))
    args = (model.apply, abstract_params(model, mesh), abstract_tokens(rows, length, mesh), last)
    return Program(
        name="score: reward model",
        kind="forward",
        calls=1,
        jitted=scores_at,
        args=args,
        model=model,
        rows=rows,
        length=length,
    )


def _rollout(stage: PPOStage, model: Model, mesh: Any) -> list[Program]:
    """The sampler's programs, of the sizes that the engine gives them: prompts are read in groups, then slots are
    decoded together, as often as they are filled for an iteration."""
    ppo, config = stage.ppo, model.config
    # Which ids end a row is the tokenizer's affair; that one is compared with is not.
    sampling = Sampling(temperature=ppo.temperature, stop_ids=(0,))
    jitted = sampler(model, sampling, 0)
    unit = ways(mesh, model.rules.spec(("batch",))[0])
    together = min(ppo.sampler_slots or ppo.prompts_per_iteration, ppo.prompts_per_iteration)
    together = -(-together // unit) * unit
    prompt, length = stage.data.max_prompt_len, stage.data.max_prompt_len + ppo.max_new_tokens
    width = bucket(prompt, config.max_positions)
    read = prefill_rows(width, unit, together)
    prepared = abstract_prepared(model, mesh)
    slots = abstract_slots(model, sampling, mesh, together, bucket(length - 1, config.max_positions))
    shared = {"model": model, "held": abstract_params(model, mesh)}

    def array(shape: tuple[int, ...], dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    columns = (array((read,)), array((read,)), array((read, slots.keys.shape[1]), jnp.uint32), array((read, 0), bool))
    prefill = Program(
        name="rollout: read",
        kind="prefill",
        calls=-(-ppo.prompts_per_iteration // read),
        jitted=jitted["read"],
        args=(prepared, array((read, width)), *columns),
        rows=read,
        length=width,
        slots=slots,
        **shared,
    )
    decode = Program(
        name="rollout: write",
        kind="decode",
        calls=-(-ppo.prompts_per_iteration // together),
        jitted=jitted["decode"],
        args=(prepared, slots, array(()), array(())),
        rows=together,
        length=length,
        new_tokens=ppo.max_new_tokens,
        **shared,
    )
    return [prefill, decode]


def abstract_batch(data: Any, rows: int, mesh: Any) -> Tokens | Pairs:
    """A data set's batch as ShapeDtypeStructs, placed as ``put_batch`` places it."""
    tokens = abstract_tokens(rows, data.seq_len, mesh)
    if type(data).__name__ != "PairDataset":
        return tokens
    floats = jax.ShapeDtypeStruct((rows,), jnp.float32, sharding=batch_sharding(mesh))
    names = ("reference_chosen", "reference_rejected", "margin", "weight")
    return Pairs(chosen=tokens, rejected=tokens, **dict.fromkeys(names, floats))


def abstract_tokens(rows: int, length: int, mesh: Any) -> Tokens:
    whole, real = _arrays(mesh, rows, length, jnp.int32), _arrays(mesh, rows, length, jnp.float32)
    return Tokens(ids=whole, targets=whole, weights=real, positions=whole, segments=whole)


def _arrays(mesh: Any, rows: int, length: int, dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((rows, length), dtype, sharding=batch_sharding(mesh))


def _check_rows(stage: str, name: str, rows: int, mesh: Any) -> None:
    spec = batch_sharding(mesh).spec[0]
    if rows % ways(mesh, spec):
        raise ValueError(
            f"stage {stage}: {name}={rows} is not divisible by the {ways(mesh, spec)} devices of the mesh's row axes "
            f"{spec}; make it a multiple of {ways(mesh, spec)}"
        )


def _model_of(recipe: Recipe, name: str | None, otherwise: Any) -> Any:
    """The model of an earlier stage; ``otherwise`` where the name is a folder's."""
    return next((stage.model for stage in recipe.stages if stage.name == name), otherwise)
