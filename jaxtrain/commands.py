"""What the command line does, once its arguments are read."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from jaxtrain import gin_edge
from jaxtrain.config import CONFIGURABLES, PPOStage, Recipe

QUICKSTART = "recipes/quickstart.gin"


def quickstart(args: argparse.Namespace) -> int:
    """Runs the shipped recipe; with ``--check``, exits 1 if a stage did not improve."""
    bindings = [f"Recipe.seed = {args.seed}", *args.gin]
    return _run([QUICKSTART], bindings, args.out, check=args.check)


def run(args: argparse.Namespace) -> int:
    """Runs a recipe."""
    return _run([args.recipe], args.gin, args.out)


def train(args: argparse.Namespace) -> int:
    """Runs what gin files describe, or only describes it."""
    if args.dry_run:
        loaded = gin_edge.load(Recipe, CONFIGURABLES, args.gin_file, args.gin)
        print(loaded.text)
        for line in describe(loaded.config):
            print(line)
        return 0
    return _run(args.gin_file, args.gin, args.out)


def generate(args: argparse.Namespace) -> int:
    """Completes a prompt with the model of a finished stage."""
    from jaxtrain.recipe.complete import complete

    completion, stats = complete(
        args.checkpoint,
        args.prompt,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
    )
    print(completion.text)
    print(
        f"{stats.tokens} tokens, {stats.tokens_per_second:,.0f} tokens/s ({stats.compile_seconds:.1f} s to compile)",
        file=sys.stderr,
    )
    return 0


def _run(files: list[str], bindings: list[str], out: Path, *, check: bool = False) -> int:
    began = time.perf_counter()
    loaded = gin_edge.load(Recipe, CONFIGURABLES, files, bindings)
    from jaxtrain.recipe.chain import run_recipe
    from jaxtrain.report import format_table

    summary, failures = run_recipe(loaded.config, loaded.text, out, say=lambda line: print(line, file=sys.stderr))
    print(format_table(summary))
    print(f"\n{time.perf_counter() - began:.0f} s in all; the report is {out / 'report.html'}")
    if check:
        for line in failures:
            print(f"jaxtrain: check failed: {line}", file=sys.stderr)
        return 1 if failures else 0
    return 0


def describe(recipe: Recipe) -> list[str]:
    """Parameters, FLOPs and bytes of every stage, from shapes alone."""
    import jax

    from jaxtrain.models import build_model
    from jaxtrain.models.flops import train_flops_per_token
    from jaxtrain.train.state import new_state, state_bytes

    lines = []
    for stage in recipe.stages:
        learners: list[tuple[str, Any, Any, int]] = []
        if isinstance(stage, PPOStage):
            length = stage.data.max_prompt_len + stage.ppo.max_new_tokens
            learners.append(("policy", stage.model, stage.optimizer, stage.ppo.updates))
            if stage.critic is not None:
                learners.append(("critic", stage.critic, stage.critic_optimizer, stage.ppo.updates))
        else:
            length = stage.data.seq_len
            learners.append(("model", stage.model, stage.optimizer, stage.steps))
        for what, config, optimizer, steps in learners:
            model = build_model(config)
            tx = optimizer.build(steps, model.shapes(), model.axes)
            state = jax.eval_shape(lambda m=model, t=tx: new_state(m.init(jax.random.key(0)), t, 0))
            lines.append(
                f"# {stage.name} {what}: {model.num_params():,} parameters, "
                f"{train_flops_per_token(config, length):,.0f} training FLOPs per token at {length} tokens, "
                f"{state_bytes(state):,} bytes of state"
            )
    return lines
