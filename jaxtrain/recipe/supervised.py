"""A stage that learns from a data set: language modelling, SFT, reward model, DPO."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from jaxtrain import distributed
from jaxtrain.checkpoint import Checkpoints
from jaxtrain.config import Stage
from jaxtrain.data.loader import Loader, sequential_batches
from jaxtrain.evaluate.heldout import BitsPerByte, ByteLoss, Measure, evaluate, make_eval_step
from jaxtrain.models import build_model
from jaxtrain.objectives.dpo import DPO, add_reference
from jaxtrain.recipe.learner import Learner, make_learner
from jaxtrain.recipe.runtime import Parent, Runtime
from jaxtrain.sharding import local_rows, make_mesh, put_batch
from jaxtrain.train.loop import fit, from_trees, state_trees
from jaxtrain.train.metrics import MetricLog
from jaxtrain.train.step import in_mesh
from jaxtrain.types import Pairs, Params

Figures = list[dict[str, Any]]


class SupervisedJob:
    """One Stage of a run.  ``train`` continues from its newest checkpoint; ``figures`` measures parameters."""

    def __init__(self, runtime: Runtime, stage: Stage):
        self.runtime, self.stage = runtime, stage
        self.folder = runtime.folder(stage.name)
        self.mesh = make_mesh(stage.mesh)
        self.model = build_model(stage.model)
        self.data = runtime.prepare(stage.data)
        self.init = runtime.parent(stage.init) if stage.init else None
        reference = stage.reference or stage.init
        self.reference = runtime.parent(reference) if reference and self.needs_reference else None
        if self.needs_reference and self.reference is None:
            raise ValueError(f"stage {stage.name}: DPO needs a reference: give init or reference")
        self.loader = Loader(
            source=self.data.train,
            batch_size=stage.batch_size,
            seed=runtime.recipe.seed,
            to_batch=stage.data.batch,
        )
        self.rows = local_rows(stage.batch_size, self.mesh)

    @property
    def needs_reference(self) -> bool:
        return isinstance(self.stage.objective, DPO)

    def parents(self) -> list[Parent]:
        return [parent for parent in (self.init, self.reference) if parent is not None]

    def data_fingerprint(self) -> dict[str, Any]:
        """Equal for runs that see the same rows in the same order, and measure on the same held-out rows."""
        others = [self.runtime.prepare(e.data).fingerprint for e in self.stage.evaluation if e.data is not None]
        return {"train": self.loader.fingerprint(), "evaluation": others}

    @functools.cached_property
    def learner(self) -> Learner:
        stage = self.stage
        return make_learner(stage, self.model, stage.objective, stage.optimizer, updates=stage.steps, mesh=self.mesh)

    @functools.cached_property
    def _reference(self) -> Callable[[Any], Any]:
        if self.reference is None:
            return lambda batch: batch
        model, params = self.runtime.load(self.reference, self.mesh)
        call = in_mesh(jax.jit(functools.partial(add_reference, model.apply)), self.mesh)
        return lambda batch: call(params, batch)

    def place(self, batch: Any) -> Any:
        """This host's rows of a batch as a whole one on the mesh, with the reference's log-probabilities where the
        objective reads them."""
        batch = put_batch(batch, self.mesh, count=self.stage.batch_size)
        return self._reference(batch) if isinstance(batch, Pairs) else batch

    def first_params(self) -> Params:
        """What training starts from."""
        return self.runtime.start_params(self.model, self.init, self.mesh, self.runtime.recipe.seed)

    def train(self, meta: dict[str, Any]) -> Params:
        """Trains to the end, from the newest checkpoint if there is one, and returns the last parameters."""
        stage, target = self.stage, self.learner.target
        checkpoints = Checkpoints(self.folder / "checkpoints", keep=stage.keep)
        try:
            found = checkpoints.restore_latest(state_trees(target), {"model": meta["model"], "hash": meta["hash"]})
            if found is None:
                start, state = 0, self.learner.fresh(self.runtime.recipe.seed, self.first_params())
            else:
                start, state = found[0], from_trees(found[1])
                self.runtime.say(f"{stage.name}: continuing after step {start}")
            with MetricLog(self.folder, start=start, steps=stage.steps, title=stage.name) as log:
                state = fit(
                    step=self.learner.step,
                    state=state,
                    start=start,
                    steps=stage.steps,
                    load=functools.partial(self.loader.batch, rows=self.rows),
                    place=self.place,
                    checkpoints=checkpoints,
                    meta=meta,
                    log=log,
                    checkpoint_every=stage.checkpoint_every,
                    evaluate=lambda params: {row["metric"]: row["value"] for row in self.figures(params)},
                    evaluate_every=stage.evaluate_every,
                    max_streak=stage.max_skipped,
                )
        finally:
            checkpoints.close()
        return state.params

    def figures_before(self) -> Figures:
        """The figures of what training starts from, as it was: with its own positions where it can read the data."""
        params = self.first_params()
        if self.init is None:
            return self.figures(params)
        own = dataclasses.replace(
            self.stage.model, rope=self.init.config.rope, max_positions=self.init.config.max_positions
        )
        return self.figures(params, own)

    def figures(self, params: Params, config: Any = None) -> Figures:
        """Every measure of ``stage.evaluation``: {"metric", "value", "better"}.

        config: the model to measure with, where it can read rows as long as the data's; else the stage's.
        """
        rows: Figures = []
        for number, evaluation in enumerate(self.stage.evaluation):
            dataset = evaluation.data or self.stage.data
            fits = config is not None and dataset.seq_len <= config.max_positions
            values = evaluate(
                self._eval_step(number, config if fits else self.stage.model),
                params,
                self._heldout(dataset),
                evaluation.max_batches,
            )
            measures = (
                (Measure(metric="bits_per_byte", label=evaluation.label, better=evaluation.better),)
                if isinstance(evaluation, BitsPerByte)
                else evaluation.measures
            )
            for measure in measures:
                if measure.metric not in values:
                    raise ValueError(
                        f"stage {self.stage.name}: there is no metric {measure.metric!r}; the objective has "
                        f"{', '.join(sorted(values))}"
                    )
                value = values[measure.metric]
                row = {"metric": measure.label, "value": value, "better": measure.better, "required": measure.required}
                rows.append(row)
        return rows

    def _heldout(self, dataset: Any) -> Iterator[Any]:
        source = self.runtime.prepare(dataset).heldout
        for number, batch in enumerate(sequential_batches(source, self.stage.batch_size, dataset.batch, self.rows)):
            yield self.place(batch)
            distributed.beat(compiling=number == 0)

    @functools.cache  # noqa: B019  (a job lives as long as its stage)
    def _eval_step(self, number: int, config: Any):
        evaluation = self.stage.evaluation[number]
        if isinstance(evaluation, BitsPerByte):
            sizes = np.zeros(config.vocab_size, np.int32)
            sizes[: self.runtime.tokenizer.vocab_size] = self.runtime.tokenizer.token_bytes()
            objective: Any = ByteLoss(sizes)
        else:
            objective = evaluation.objective or self.stage.objective
        return in_mesh(make_eval_step(build_model(config).apply, objective), self.mesh)
