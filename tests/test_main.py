"""The command line: what it parses, how it fails, what it sets before JAX is imported."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

import jaxtrain
from jaxtrain import main as command_line


@pytest.fixture
def commands(monkeypatch):
    """Stands in for ``jaxtrain.commands`` and keeps the arguments it was called with."""
    stand_in = types.ModuleType("jaxtrain.commands")
    stand_in.calls = []

    def record(name, code):
        def command(args):
            stand_in.calls.append((name, args))
            return code

        return command

    for code, name in enumerate(("quickstart", "train", "run", "generate")):
        setattr(stand_in, name, record(name, code))
    monkeypatch.setitem(sys.modules, "jaxtrain.commands", stand_in)
    monkeypatch.setattr(jaxtrain, "commands", stand_in, raising=False)
    monkeypatch.setattr(command_line, "set_environment", lambda: None)
    monkeypatch.delenv("JAXTRAIN_TRACEBACK", raising=False)
    return stand_in


def parsed(commands, *argv: str) -> dict:
    command_line.main(argv)
    name, args = commands.calls[-1]
    assert name == argv[0] == args.command
    return {key: value for key, value in vars(args).items() if key != "command"}


def test_commands_get_their_arguments_and_give_the_exit_code(commands):
    assert parsed(commands, "quickstart") == {
        "out": Path("jaxtrain-quickstart"),
        "seed": 0,
        "check": False,
        "gin": [],
    }
    assert parsed(commands, "quickstart", "--out", "d", "--seed", "3", "--check") == {
        "out": Path("d"),
        "seed": 3,
        "check": True,
        "gin": [],
    }
    train = ["train", "--gin_file", "a.gin", "--gin_file", "b.gin", "--gin", "A.x=1", "--gin", "B.y='z'"]
    assert parsed(commands, *train, "--out", "d", "--dry_run") == {
        "gin_file": ["a.gin", "b.gin"],
        "gin": ["A.x=1", "B.y='z'"],
        "out": Path("d"),
        "dry_run": True,
    }
    assert parsed(commands, "run", "r.gin", "--out", "d") == {"recipe": "r.gin", "gin": [], "out": Path("d")}
    assert parsed(commands, "generate", "--checkpoint", "c", "--prompt", "p") == {
        "checkpoint": Path("c"),
        "prompt": ["p"],
        "prompt_file": None,
        "max_new_tokens": 64,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "seed": 0,
        "int8": False,
        "out": None,
        "json": False,
        "show_probs": 0,
        "slots": 32,
        "format": None,
    }
    assert [command_line.main(argv) for argv in (["quickstart"], ["run", "r", "--out", "d"])] == [0, 2]
    # one call's bindings must not stay in the parser's default for the next
    assert parsed(commands, "run", "r.gin", "--out", "d", "--gin", "A.x=1")["gin"] == ["A.x=1"]
    assert parsed(commands, "run", "r.gin", "--out", "d")["gin"] == []


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        ([], "COMMAND"),
        (["trian"], "invalid choice: 'trian'"),
        (["train", "--out", "d"], "--gin_file"),
        (["run", "r.gin"], "--out"),
        (["run", "r.gin", "--out", "d", "--gni", "A.x=1"], "--gni"),
        (
            ["generate", "--checkpoint", "c", "--prompt", "p", "--max_new_tokens", "0"],
            "at least 1, found '0'",
        ),
        (["generate", "--checkpoint", "c", "--prompt", "p", "--temperature", "-1"], "at least 0, found '-1'"),
        (["generate", "--checkpoint", "c", "--prompt", "p", "--temperature", "nan"], "found 'nan'"),
        (["generate", "--checkpoint", "c", "--prompt", "p", "--top_k", "1.5"], "whole number"),
        (["generate", "--checkpoint", "c", "--prompt", "p", "--top_p", "0"], "found '0'"),
        (["quickstart", "--seed", "x"], "found 'x'"),
    ],
)
def test_wrong_arguments_exit_43_and_name_the_culprit(argv, complaint, commands, capsys):
    with pytest.raises(SystemExit) as end:
        command_line.main(argv)
    assert end.value.code == 43
    assert complaint in capsys.readouterr().err
    assert commands.calls == []


@pytest.mark.parametrize("error", [ValueError("no such field"), OSError(28, "No space left on device", "d/x")])
def test_a_users_mistake_is_one_line_and_exit_43(error, commands, capsys, monkeypatch):
    def fail(args):
        raise error

    commands.run = fail
    argv = ["run", "r.gin", "--out", "d"]
    assert command_line.main(argv) == 43
    assert capsys.readouterr().err == f"jaxtrain: error: {error}\n"
    monkeypatch.setenv("JAXTRAIN_TRACEBACK", "1")
    with pytest.raises(type(error)):
        command_line.main(argv)


def test_our_own_bugs_keep_their_traceback(commands):
    def fail(args):
        raise AssertionError("a bug")

    commands.run = fail
    with pytest.raises(AssertionError, match="a bug"):
        command_line.main(["run", "r.gin", "--out", "d"])


def test_an_interrupt_exits_130(commands, capsys):
    def interrupt(args):
        raise KeyboardInterrupt

    commands.run = interrupt
    assert command_line.main(["run", "r.gin", "--out", "d"]) == 130
    assert capsys.readouterr().err == "jaxtrain: interrupted\n"


def test_the_compilation_cache_is_on_unless_the_user_says_otherwise(monkeypatch, tmp_path):
    for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    # set_environment writes os.environ itself; setting these here makes pytest take that back afterwards
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "0")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(os, "environ", dict(os.environ))
    command_line.set_environment()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path / ".cache" / "jaxtrain" / "xla")
    assert float(os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"]) <= 0.2
    assert os.environ["TF_CPP_MIN_LOG_LEVEL"] == "0"
    os.environ["JAX_COMPILATION_CACHE_DIR"] = "elsewhere"
    command_line.set_environment()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == "elsewhere"


@pytest.mark.smoke
def test_jax_reads_what_was_set(tmp_path):
    code = """
from jaxtrain.main import set_environment
set_environment()
import jax
assert jax.config.jax_compilation_cache_dir.endswith("jaxtrain/xla"), jax.config.jax_compilation_cache_dir
assert jax.config.jax_persistent_cache_min_compile_time_secs == 0.1
jax.jit(lambda x: sum((x * i) @ x for i in range(40)))(jax.numpy.ones((8, 8))).block_until_ready()
"""
    unset = {"JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"}
    env = {key: value for key, value in os.environ.items() if key not in unset}
    subprocess.run([sys.executable, "-c", code], check=True, env=env | {"XDG_CACHE_HOME": str(tmp_path)})
    assert list((tmp_path / "jaxtrain" / "xla").iterdir())


@pytest.mark.smoke
def test_the_module_prints_its_version():
    done = subprocess.run([sys.executable, "-m", "jaxtrain.main", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"jaxtrain {jaxtrain.__version__}\n")
