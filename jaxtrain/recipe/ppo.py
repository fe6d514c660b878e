"""A stage that learns from its own samples."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain import distributed
from jaxtrain.checkpoint import Checkpoints
from jaxtrain.config import PPOStage
from jaxtrain.data.loader import Loader
from jaxtrain.distributed import Preempted
from jaxtrain.models import Model, build_model
from jaxtrain.recipe.learner import Learner, make_learner
from jaxtrain.recipe.runtime import Parent, Runtime
from jaxtrain.rl.loop import LoopState, PPOLoop, new_loop_state
from jaxtrain.rl.rewards import ModelReward
from jaxtrain.rl.rollout import PromptBatch
from jaxtrain.sharding import make_mesh, put_batch, put_everywhere
from jaxtrain.train.loop import check_streak, from_trees, state_trees
from jaxtrain.train.metrics import MetricLog
from jaxtrain.types import Params, TrainState

Figures = list[dict[str, Any]]


class PPOJob:
    """One PPOStage of a run.  ``train`` continues from its newest checkpoint; ``figures`` measures parameters."""

    def __init__(self, runtime: Runtime, stage: PPOStage):
        self.runtime, self.stage = runtime, stage
        self.folder = runtime.folder(stage.name)
        self.mesh = make_mesh(stage.mesh)
        self.data = runtime.prepare(stage.data)
        self.init = runtime.parent(stage.init)
        self.critic_init = runtime.parent(stage.critic_init) if stage.critic_init else self.init
        self.reward_model = runtime.parent(stage.reward_model) if stage.reward_model else None
        self.loader = Loader(
            source=self.data.train,
            batch_size=stage.ppo.prompts_per_iteration,
            seed=runtime.recipe.seed,
            to_batch=stage.data.batch,
        )
        self.model = build_model(stage.model)

    def parents(self) -> list[Parent]:
        names = {parent.folder: parent for parent in (self.init, self.critic_init, self.reward_model) if parent}
        return list(names.values())

    def data_fingerprint(self) -> dict[str, Any]:
        return {"train": self.loader.fingerprint()}

    def _learner(self, model: Model, objective: Any, optimizer: Any) -> Learner:
        return make_learner(self.stage, model, objective, optimizer, updates=self.stage.ppo.updates, mesh=self.mesh)

    @functools.cached_property
    def policy(self) -> Learner:
        return self._learner(self.model, self.stage.ppo.objective(self.stage.objective), self.stage.optimizer)

    @functools.cached_property
    def critic(self) -> Learner | None:
        if self.stage.critic is None:
            return None
        return self._learner(build_model(self.stage.critic), self.stage.critic_objective, self.stage.critic_optimizer)

    @functools.cached_property
    def loop(self) -> PPOLoop:
        stage, tokenizer = self.stage, self.runtime.tokenizer
        rewards, weights = [], []
        if self.reward_model is not None:
            model, params = self.runtime.load(self.reward_model, self.mesh)
            length = stage.data.max_prompt_len + stage.ppo.max_new_tokens
            rewards.append(
                ModelReward(
                    model=model,
                    params=params,
                    length=length,
                    batch_size=stage.ppo.prompts_per_iteration,
                    place=lambda batch: put_batch(batch, self.mesh),
                )
            )
            weights.append(stage.reward_weight)
        rewards += [rule.reward for rule in stage.rewards]
        weights += [rule.weight for rule in stage.rewards]
        return PPOLoop(
            stage.ppo,
            policy=self.model,
            critic=self.critic and self.critic.model,
            reference_params=self.first_params(),
            prompts=lambda iteration: self._prompts(self.loader.batch(iteration), self.data.train),
            decode=tokenizer.decode,
            stop_ids=tokenizer.stop_ids,
            rewards=rewards,
            weights=weights,
            policy_step=self.policy.step,
            critic_step=self.critic and self.critic.step,
            seed=self.runtime.recipe.seed,
            mesh=self.mesh,
        )

    def _prompts(self, batch: Any, source: Any) -> PromptBatch:
        texts = source.texts
        return PromptBatch(ids=batch.ids, lengths=batch.lengths, rows=[texts[int(row)] for row in batch.rows])

    def first_params(self) -> Params:
        """The policy's first parameters, and the reference's for good."""
        return self.runtime.start_params(self.model, self.init, self.mesh, self.runtime.recipe.seed)

    def train(self, meta: dict[str, Any]) -> Params:
        """Iterates to the end, from the newest checkpoint if there is one, and returns the policy's parameters."""
        stage, seed = self.stage, self.runtime.recipe.seed
        checkpoints = Checkpoints(self.folder / "checkpoints", keep=stage.keep)
        try:
            target = self._trees(self.policy.target, self.critic and self.critic.target, new_loop_state(stage.ppo))
            found = checkpoints.restore_latest(target, {"model": meta["model"], "hash": meta["hash"]})
            if found is None:
                policy = self.policy.fresh(seed, self.first_params())
                critic = None
                if self.critic is not None:
                    params = self.runtime.start_params(self.critic.model, self.critic_init, self.mesh, seed)
                    critic = self.critic.fresh(seed, params)
                state = new_loop_state(stage.ppo)
            else:
                trees = found[1]
                policy = from_trees({"params": trees["params"], "rest": trees["rest"]})
                critic = self.critic and from_trees({"params": trees["critic_params"], "rest": trees["critic_rest"]})
                state = LoopState(**{name: jnp.asarray(distributed.fetch(x)) for name, x in trees["loop"].items()})
                self.runtime.say(f"{stage.name}: continuing after iteration {found[0]}")
            start = int(state.iteration)
            with distributed.loop(), MetricLog(self.folder, start=start, steps=stage.steps, title=stage.name) as log:
                for number in range(start + 1, stage.steps + 1):
                    began = log.seconds()
                    policy, critic, state, metrics = self.loop.iterate(policy, critic, state)
                    sampled = metrics["completions/mean_length"] * stage.ppo.prompts_per_iteration
                    metrics["tokens_per_second"] = sampled / max(log.seconds() - began, 1e-9)
                    log.write(number, metrics)
                    check_streak(metrics, number, stage.max_skipped)
                    if critic is not None:
                        own = {name: metrics[f"critic/{name}"] for name in ("streak", "loss", "grad_norm")}
                        check_streak(own, number, stage.max_skipped)
                    leaving = distributed.preempted()
                    due = stage.checkpoint_every and number % stage.checkpoint_every == 0
                    if leaving or due or number == stage.steps:
                        log.sync()
                        checkpoints.save(number, self._trees(policy, critic, state), meta)
                    if leaving:
                        checkpoints.wait()
                        raise Preempted(f"{stage.name}: iteration {number} of {stage.steps} is saved")
            checkpoints.wait()
        finally:
            checkpoints.close()
        return policy.params

    def _trees(self, policy: TrainState, critic: TrainState | None, state: LoopState) -> dict[str, Any]:
        loop = {"iteration": state.iteration, "kl_coef": state.kl_coef}
        trees = state_trees(policy) | {"loop": put_everywhere(loop, self.mesh)}
        if critic is not None:
            trees |= {f"critic_{name}": tree for name, tree in state_trees(critic).items()}
        return trees

    def figures_before(self) -> Figures:
        return self.figures(self.first_params())

    def figures(self, params: Params) -> Figures:
        """Mean reward of sampled answers to held-out prompts, its parts, and the KL they cost."""
        count = self.stage.evaluation_prompts
        if not count:
            return []
        heldout, size = self.data.heldout, self.stage.ppo.prompts_per_iteration
        wanted = np.arange(min(count, len(heldout)))
        sums: dict[str, float] = {}
        for number, start in enumerate(range(0, len(wanted), size)):
            chosen = wanted[start : start + size]
            # The sampler is compiled for one batch size; what fills the last batch up is not counted.
            filled = np.concatenate([chosen, np.repeat(chosen[:1], size - len(chosen))])
            batch = self.stage.data.batch([heldout[int(i)] for i in filled])
            key = jax.random.fold_in(jax.random.key(self.runtime.recipe.seed), number)
            values = self.loop.evaluate(params, self._prompts(batch, heldout), key, len(chosen))
            for name, value in values.items():
                sums[name] = sums.get(name, 0.0) + value * len(chosen)
        means = {name: value / len(wanted) for name, value in sums.items()}
        rows = [{"metric": "held-out mean reward", "value": means.pop("reward"), "better": "higher"}]
        rows.append({"metric": "held-out KL to the reference (nats)", "value": means.pop("kl"), "better": "none"})
        rows += [{"metric": f"held-out {name}", "value": value, "better": "none"} for name, value in means.items()]
        return [row | {"required": None} for row in rows]
