"""The command line.  Nothing heavy is imported until a command runs, so that ``--help`` answers at once."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import jaxtrain
from jaxtrain.distributed import CRASH, INTERRUPTED, USER_MISTAKE


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 43 for a user's mistake, told in one line on stderr.

    ``JAXTRAIN_TRACEBACK=1`` lets the exception through instead.
    """
    args = _parser().parse_args(argv)
    set_environment()
    try:
        from jaxtrain import commands

        return getattr(commands, args.command)(args)
    except (ValueError, OSError) as error:  # OSError: a full disk, a folder that cannot be written
        if os.environ.get("JAXTRAIN_TRACEBACK", "0") not in ("", "0"):
            raise
        print(f"jaxtrain: error: {error}", file=sys.stderr)
        return USER_MISTAKE
    except KeyboardInterrupt:
        print("jaxtrain: interrupted", file=sys.stderr)
        return INTERRUPTED


def console() -> None:
    """The ``jaxtrain`` command: ``main`` in a process that allocates in huge pages.

    XLA's CPU backend takes its temporary buffers from malloc afresh for every call, and the page faults of a few
    hundred megabytes can cost a third of a step (they did: 0.22 of 0.75 CPU-seconds).  glibc reads this setting
    only when a process starts, so the process starts itself over, once.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    try:
        sys.exit(main())
    except Exception:  # noqa: BLE001  the last resort; not 1, which says that a check failed
        traceback.print_exc()
        sys.exit(CRASH)


def set_environment() -> None:
    """Sets what JAX reads from the environment when it is first imported, wherever the user has not.

    The persistent compilation cache spares a second run of the same shapes its compilations, those of small
    programs too; ``JAX_ENABLE_COMPILATION_CACHE=false`` turns it off.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache / "jaxtrain" / "xla"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA's C++ logs: errors only


class _Parser(argparse.ArgumentParser):
    """Wrong arguments are a user's mistake like any other; argparse's own exit code is 2."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(USER_MISTAKE, f"{self.prog}: error: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="jaxtrain",
        description="From raw text to an aligned model: one train step, another objective for each stage.",
        epilog="Set JAXTRAIN_TRACEBACK=1 to see where an error was raised. Exit codes: 0 done, 1 a check failed, "
        "42 preempted (the same command continues), 43 a mistake in the command, its files or data.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"jaxtrain {jaxtrain.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text, allow_abbrev=False)

    quickstart = command("quickstart", "train a small model through every stage, on text found on this machine")
    _add_out(quickstart, default=Path("jaxtrain-quickstart"))
    _add_gin(quickstart)
    quickstart.add_argument("--seed", type=_COUNT, default=0, help="seed of every random choice (default: 0)")
    quickstart.add_argument(
        "--check",
        action="store_true",
        help="exit 1, naming it, if a stage does not improve its held-out metric, or misses a required value",
    )

    train = command("train", "train what gin files describe, usually one stage")
    train.add_argument(
        "--gin_file",
        action="append",
        required=True,
        metavar="FILE",
        help="gin file; repeat for more, in order",
    )
    _add_gin(train)
    _add_out(train)
    train.add_argument(
        "--dry_run",
        action="store_true",
        help="print the resolved config, parameter count, FLOPs per token and bytes of state; train nothing",
    )

    run = command("run", "run a recipe: a chain of stages, skipping those whose inputs have not changed")
    run.add_argument("recipe", metavar="RECIPE.gin", help="gin file that binds Recipe.stages")
    _add_gin(run)
    _add_out(run)

    generate = command("generate", "complete prompts with a model")
    add = generate.add_argument
    _add_writing(generate, max_new_tokens=64)
    add("--prompt", action="append", default=[], metavar="TEXT", help="what to complete; repeat for more")
    add("--prompt_file", type=Path, metavar="FILE", help='more of them: one a line, or in a .jsonl {"prompt": TEXT}')
    add("--out", type=Path, metavar="FILE.jsonl", help="write completions there, as --json prints them")
    add("--json", action="store_true", help="print one JSON object a completion")
    add(
        "--show_probs",
        type=_COUNT,
        default=0,
        metavar="N",
        help="show the N likeliest tokens of every step, with the model's probabilities before any sampling rule",
    )
    add("--slots", type=_POSITIVE, default=32, metavar="N", help="most prompts to complete at once (default: 32)")
    ways = generate.add_mutually_exclusive_group()
    ways.add_argument(
        "--chat",
        dest="format",
        action="store_const",
        const="chat",
        help="the prompt is a user's turn (default: as taught)",
    )
    ways.add_argument("--raw", dest="format", action="store_const", const="raw", help="continue the prompt's text")

    chat = command("chat", "talk with a model; /reset begins anew, /quit or the end of input ends")
    _add_writing(chat, max_new_tokens=512)
    chat.add_argument("--system", metavar="TEXT", help="what the model is told before the conversation")

    bring = command("import", "make a checkpoint of a Hugging Face folder, a GGUF file or another stage")
    bring.set_defaults(command="import_")  # a reserved word names no function
    bring.add_argument("source", type=Path, metavar="SRC", help="Hugging Face folder, .gguf file, or RUN/stages/NAME")
    _add_out(bring)
    _add_dtype(bring)
    bring.add_argument(
        "--mesh", metavar="AXIS=N,...", default="", help="read onto a mesh of devices (fsdp=8); default: one device"
    )
    bring.add_argument(
        "--max_positions", type=_POSITIVE, metavar="N", help="longest text, in place of the source's (smaller caches)"
    )
    bring.add_argument("--force", action="store_true", help="replace an earlier import of the same source")

    export = command("export", "write a checkpoint as a Hugging Face folder")
    export.add_argument("folder", type=Path, metavar="DIR", help="what jaxtrain import wrote, or RUN/stages/NAME")
    _add_out(export)
    _add_dtype(export)
    export.add_argument(
        "--shard_gb", type=_SIZE, default=5.0, metavar="GB", help="largest safetensors file, in 1e9 bytes (default: 5)"
    )

    plan = command("plan", "say what a recipe needs and how long it takes on a slice of chips, before it is rented")
    plan.add_argument("recipe", metavar="RECIPE.gin", help="gin file that binds Recipe.stages")
    _add_gin(plan)
    add = plan.add_argument
    add("--topology", required=True, metavar="KIND:SHAPE", help="v5p:4x4x4, v5e:16x16, h100:64, 2*v5e:16x16, ...")
    add("--stage", metavar="NAME", help="one stage alone")
    add("--price", type=_SIZE, metavar="DOLLARS", help="of a chip for an hour: what the whole run costs")
    add("--no_compile", action="store_true", help="count by hand alone: seconds, where the compiler takes minutes")
    add("--search", action="store_true", help="rank meshes, remat and microbatches, and print the best one's bindings")
    add(
        "--candidates",
        type=_POSITIVE,
        default=3,
        metavar="N",
        help="of a search's best, how many that fit the compiler sees (default: 3)",
    )
    add("--json", action="store_true", help="print one JSON object")

    rehearse = command("rehearse", "run a recipe in miniature on virtual CPU devices: whether every stage of it works")
    rehearse.add_argument("recipe", metavar="RECIPE.gin", help="gin file that binds Recipe.stages")
    _add_gin(rehearse)
    add = rehearse.add_argument
    add("--devices", type=_POSITIVE, default=8, metavar="N", help="virtual CPU devices (default: 8)")
    add("--out", type=Path, metavar="DIR", help="new folder to keep the miniature's run in; default: a temporary one")
    return parser


def _add_out(parser: argparse.ArgumentParser, default: Path | None = None) -> None:
    shown = f" (default: {default})" if default else ""
    parser.add_argument(
        "--out",
        type=Path,
        required=default is None,
        default=default,
        metavar="DIR",
        help=f"folder of the run{shown}",
    )


def _add_writing(parser: argparse.ArgumentParser, max_new_tokens: int) -> None:
    """What ``generate`` and ``chat`` share: the model, and how it is sampled."""
    add = parser.add_argument
    add(
        "--checkpoint",
        type=Path,
        required=True,
        metavar="DIR",
        help="a trained stage (RUN/stages/NAME), what import wrote, a Hugging Face folder or a .gguf file",
    )
    add(
        "--max_new_tokens",
        type=_POSITIVE,
        default=max_new_tokens,
        metavar="N",
        help=f"most to write (default: {max_new_tokens})",
    )
    add("--temperature", type=_TEMPERATURE, default=1.0, metavar="T", help="0: the likeliest token (default: 1)")
    add("--top_k", type=_COUNT, default=0, metavar="K", help="sample from the K likeliest (default: 0, all)")
    add("--top_p", type=_SHARE, default=1.0, metavar="P", help="sample from the likeliest of mass P (default: 1)")
    add(
        "--min_p",
        type=_FRACTION,
        default=0.0,
        metavar="P",
        help="sample from those at least P times as likely as the likeliest (default: 0)",
    )
    add(
        "--repetition_penalty",
        type=_SIZE,
        default=1.0,
        metavar="R",
        help="makes ids less likely that stand in the text so far (default: 1, no change)",
    )
    add("--seed", type=_COUNT, default=0, help="of the first prompt or turn; the next has one more (default: 0)")
    add("--int8", action="store_true", help="hold matrices in 8 bits: a quarter of the memory, less exact")


def _add_dtype(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the weights; default: as stored")


def _add_gin(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--gin",
        action="append",
        default=[],
        metavar="NAME.FIELD=VALUE",
        help="one binding on top of the files; repeat for more",
    )


def _number(kind: type, described: str, accepts: Callable[[float], bool]) -> Callable[[str], float]:
    """An argparse type: a ``kind`` for which ``accepts`` holds; ``described`` goes into the error."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not accepts(value):
            raise argparse.ArgumentTypeError(f"expected {described}, found {text!r}")
        return value

    return parse


_COUNT = _number(int, "a whole number of at least 0", lambda value: value >= 0)
_POSITIVE = _number(int, "a whole number of at least 1", lambda value: value >= 1)
_TEMPERATURE = _number(float, "a number of at least 0", lambda value: 0 <= value < float("inf"))
_SIZE = _number(float, "a number above 0", lambda value: 0 < value < float("inf"))
_FRACTION = _number(float, "a number from 0 to 1", lambda value: 0 <= value <= 1)
_SHARE = _number(float, "a number above 0 and at most 1", lambda value: 0 < value <= 1)


if __name__ == "__main__":
    console()
