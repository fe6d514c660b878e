"""What the command line does, once its arguments are read."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

from jaxtrain import distributed, gin_edge
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
        loaded.config.check_folders()
        print(loaded.text)
        for line in describe(loaded.config):
            print(line)
        return 0
    return _run(args.gin_file, args.gin, args.out)


def generate(args: argparse.Namespace) -> int:
    """Completes prompts with a model."""
    from jaxtrain.generate.text import draw_steps, generate_text

    prompts = _prompts(args)
    model, params, tokenizer, chat = _open(args.checkpoint)
    chat = {None: chat, "chat": True, "raw": False}[args.format]
    completions, stats = generate_text(
        model,
        params,
        tokenizer,
        prompts,
        sampling=_sampling(args, tokenizer),
        max_new_tokens=args.max_new_tokens,
        seed=args.seed,
        encode=lambda text: (
            tokenizer.chat_prompt([{"role": "user", "content": text}]) if chat else tokenizer.text_ids(text)
        ),
        top=args.show_probs,
        int8=args.int8,
        slots=args.slots,
    )
    rows = [
        json.dumps({"prompt": prompt, "seed": args.seed + number, **dataclasses.asdict(completion)}, ensure_ascii=False)
        for number, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
    ]
    if args.out is not None:
        args.out.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
        print(f"{len(rows)} completions in {args.out}")
    elif args.json:
        print("\n".join(rows))
    else:
        for prompt, completion in zip(prompts, completions, strict=True):
            if len(prompts) > 1:
                print(f"--- {prompt!r}")
            print(completion.text)
            if completion.steps:
                print(draw_steps(completion.steps))
    print(
        f"{stats.prompt_tokens} tokens read, {stats.tokens} written, {stats.tokens_per_second:,.0f} tokens/s"
        f" ({stats.compile_seconds:.1f} s to compile)",
        file=sys.stderr,
    )
    return 0


def chat(args: argparse.Namespace) -> int:
    """Talks with a model, a line of standard input at a time."""
    from jaxtrain.generate.chat import Conversation
    from jaxtrain.generate.engine import Engine

    model, params, tokenizer, learned = _open(args.checkpoint)
    if not learned:
        print(f"jaxtrain: the model of {args.checkpoint} has not been taught to chat", file=sys.stderr)
    engine = Engine(model, _sampling(args, tokenizer), slots=1, int8=args.int8)
    conversation = Conversation(engine, engine.prepare(params), tokenizer, system=args.system)
    terminal = sys.stdin.isatty()
    if terminal:
        print("/reset begins a new conversation, /quit ends", file=sys.stderr)
    turn = 0
    while True:
        if terminal:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        text = line.strip()
        if not line or text == "/quit":
            return 0
        if text == "/reset":
            conversation.reset()
        elif text.startswith("/"):
            print(f"jaxtrain: {text.split()[0]!r} is no command: there are /reset and /quit", file=sys.stderr)
        elif text:
            try:
                reply = conversation.ask(
                    text,
                    max_new_tokens=args.max_new_tokens,
                    seed=args.seed + turn,
                    show=lambda piece: print(piece, end="", flush=True),
                )
            except ValueError as error:  # the turn is refused, not the conversation
                print(f"jaxtrain: {error}", file=sys.stderr)
                continue
            turn += 1
            print(flush=True)
            cut = "" if reply.stopped else ", cut off"
            print(
                f"[{reply.read} tokens read, {reply.tokens} written{cut}, {reply.tokens_per_second:,.1f} tokens/s]",
                file=sys.stderr,
                flush=True,
            )


def _open(source: Path) -> tuple[Any, Any, Any, bool]:
    """(model, parameters, tokenizer, whether the model has been taught to chat) of a checkpoint."""
    from jaxtrain.checkpoint import read_meta
    from jaxtrain.interop.importing import load_pretrained

    if (source / "stages").is_dir():
        raise ValueError(f"{source} is a whole run: name one of its stages, {source / 'stages' / 'NAME'}")
    model, params, tokenizer = load_pretrained(source)
    if "lm" not in model.config.heads:
        raise ValueError(f"the model of {source} has the heads {model.config.heads}: it cannot write")
    if tokenizer is None:
        raise ValueError(f"{source} has no tokenizer, so its model can neither read nor write text")
    if (source / "checkpoints").is_dir():
        return model, params, tokenizer, bool(read_meta(source / "checkpoints")["chat"])
    return model, params, tokenizer, tokenizer.chat_template is not None


def _sampling(args: argparse.Namespace, tokenizer: Any) -> Any:
    from jaxtrain.generate.sampling import Sampling

    return Sampling(
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        stop_ids=tokenizer.stop_ids,
    )


def _prompts(args: argparse.Namespace) -> list[str]:
    """Those of the command line, then those of the file."""
    prompts = list(args.prompt)
    if args.prompt_file is not None:
        text = args.prompt_file.read_text(encoding="utf-8")
        for number, line in enumerate(text.splitlines(), start=1):
            if not line.strip():
                continue
            if args.prompt_file.suffix != ".jsonl":
                prompts.append(line)
                continue
            try:
                prompt = json.loads(line)["prompt"]
            except (ValueError, KeyError, TypeError):
                prompt = None
            if not isinstance(prompt, str):
                raise ValueError(f'{args.prompt_file}:{number} is not an object with a text "prompt": {line[:60]!r}')
            prompts.append(prompt)
    if not prompts:
        raise ValueError("there is nothing to complete: give --prompt TEXT, or --prompt_file with a prompt a line")
    return prompts


def import_(args: argparse.Namespace) -> int:
    """Makes a checkpoint of somebody else's weights."""
    _one_arena()
    from jaxtrain.interop.importing import import_model
    from jaxtrain.sharding import MeshConfig, make_mesh

    done = import_model(
        args.source,
        args.out,
        dtype=args.dtype,
        mesh=make_mesh(MeshConfig(**_mesh_sizes(args.mesh))),
        max_positions=args.max_positions,
        force=args.force,
    )
    tokenizer = "no tokenizer" if done.tokenizer is None else f"a tokenizer of {done.tokenizer.vocab_size:,} ids"
    print(
        f"{type(done.config).__name__.removesuffix('Config')} from a {done.kind}: {done.parameters:,} parameters in "
        f"{done.dtype}, {tokenizer}; {done.seconds:.1f} s, at most {_peak_bytes() / 1e6:,.0f} MB of memory"
    )
    print(f"next: jaxtrain generate --checkpoint {args.out} --prompt TEXT")
    return 0


def export(args: argparse.Namespace) -> int:
    """Writes a checkpoint as a Hugging Face folder."""
    _one_arena()
    from jaxtrain.interop.exporting import export_model

    done = export_model(args.folder, args.out, max_shard_bytes=args.shard_gb * 1e9, dtype=args.dtype)
    print(
        f"{done.family}: {done.parameters:,} parameters in {done.dtype}, {len(done.files)} files in {args.out}; "
        f"{done.seconds:.1f} s, at most {_peak_bytes() / 1e6:,.0f} MB of memory"
    )
    if not done.tokenizer:
        print("there is no tokenizer among them: the checkpoint has none")
    if done.left_out:
        print(f"left out, since transformers has no place for it: {', '.join(done.left_out)}")
    return 0


def plan(args: argparse.Namespace) -> int:
    """Plans a recipe's stages for a slice of chips."""
    loaded = gin_edge.load(Recipe, CONFIGURABLES, [args.recipe], args.gin)
    from jaxtrain.plan import command

    return command.run(
        loaded.config,
        args.topology,
        stage=args.stage,
        compiler=not args.no_compile,
        price=args.price,
        as_json=args.json,
        show=print,
        say=lambda line: print(line, file=sys.stderr),
        load=lambda more: gin_edge.load(Recipe, CONFIGURABLES, [args.recipe], [*args.gin, *more]).config,
        candidates=args.candidates if args.search else 0,
    )


def rehearse(args: argparse.Namespace) -> int:
    """Runs a recipe in miniature."""
    from jaxtrain.rehearse import command

    return command.run(
        args.recipe,
        args.gin,
        devices=args.devices,
        out=args.out,
        show=print,
        say=lambda line: print(line, file=sys.stderr),
    )


def _mesh_sizes(text: str) -> dict[str, int]:
    """``fsdp=4,tensor=2`` as arguments of a MeshConfig."""
    from jaxtrain.sharding import AXES

    sizes: dict[str, int] = {}
    for part in filter(None, text.split(",")):
        axis, _, size = part.partition("=")
        if axis not in AXES or axis in sizes or not size.removeprefix("-").isdigit():
            raise ValueError(f"--mesh {text!r}: {part!r} is not AXIS=N with one of {', '.join(AXES)}")
        sizes[axis] = int(size)
    return sizes


def _one_arena() -> None:
    """One malloc arena for all threads, where there is glibc: each of Orbax's would keep what it has freed (150 MB)."""
    import ctypes

    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(-8, 1)  # M_ARENA_MAX


def _peak_bytes() -> int:
    """The most memory that this process has had."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _run(files: list[str], bindings: list[str], out: Path, *, check: bool = False) -> int:
    try:
        with distributed.job():
            return _run_in_job(files, bindings, out, check=check)
    except distributed.Preempted as stop:
        print(f"jaxtrain: preempted ({stop}): the same command continues", file=sys.stderr)
        return distributed.PREEMPTED


def _run_in_job(files: list[str], bindings: list[str], out: Path, *, check: bool) -> int:
    began = time.perf_counter()
    loaded = gin_edge.load(Recipe, CONFIGURABLES, files, bindings)
    from jaxtrain.recipe.chain import run_recipe
    from jaxtrain.report import format_table

    def say(line: str) -> None:
        if distributed.is_writer():
            print(line, file=sys.stderr)

    summary, failures = run_recipe(loaded.config, loaded.text, out, say=say)
    if distributed.is_writer():
        print(format_table(summary))
        print(f"\n{time.perf_counter() - began:.0f} s in all; the report is {out / 'report.html'}")
    if not check:
        return 0
    for line in failures:
        say(f"jaxtrain: check failed: {line}")
    return 1 if failures else 0


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
