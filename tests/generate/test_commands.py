"""``jaxtrain generate`` and ``jaxtrain chat`` on a checkpoint, as a user runs them."""

from __future__ import annotations

import contextlib
import io
import json
import types

import jax
import pytest

from jaxtrain import main as command_line
from jaxtrain.checkpoint import Checkpoints
from jaxtrain.config_json import to_json


@pytest.fixture(scope="module")
def folder(chat_model, chat_params, tokenizer, tmp_path_factory):
    """A stage's folder whose model has learned to chat."""
    folder = tmp_path_factory.mktemp("stage")
    checkpoints = Checkpoints(folder / "checkpoints")
    meta = {"model": to_json(chat_model.config), "chat": True, "tokenizer": tokenizer.digest}
    checkpoints.save(0, {"params": chat_params}, meta)
    checkpoints.close()
    tokenizer.save(folder / "tokenizer")
    return folder


def call(*argv: object, stdin: str = "", monkeypatch=None):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        if monkeypatch is not None:
            monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        code = command_line.main([str(word) for word in argv])
    return types.SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())


def test_generate(folder, tokenizer, tmp_path):
    words = ["generate", "--checkpoint", folder, "--max_new_tokens", 6]
    one = call(*words, "--prompt", "The cat", "--temperature", 0, "--show_probs", 3)
    assert one.code == 0 and "tokens/s" in one.err, one.err
    lines = one.out.splitlines()
    assert sum(line.startswith("    > ") for line in lines) == 6, one.out  # greedy takes the likeliest

    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "The dog", "id": 7}\n\n{"prompt": "Grüße"}\n', encoding="utf-8")
    out = tmp_path / "out.jsonl"
    several = [*words, "--prompt", "The cat", "--prompt_file", prompts, "--seed", 5, "--show_probs", 2]
    written = call(*several, "--out", out, "--slots", 2)
    assert written.code == 0 and "3 completions" in written.out
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [row["prompt"] for row in rows] == ["The cat", "The dog", "Grüße"]
    assert [row["seed"] for row in rows] == [5, 6, 7]
    assert [json.loads(line) for line in call(*several, "--slots", 2, "--json").out.splitlines()] == rows
    for row in rows:
        assert row["text"] == tokenizer.decode(row["ids"][:-1] if row["stopped"] else row["ids"])
        assert len(row["steps"]) == len(row["ids"]) == len(row["logps"])
        assert [len(step["top"]) for step in row["steps"]] == [2] * len(row["ids"])
    alone = call(*words, "--prompt", "Grüße", "--seed", 7, "--json")
    assert json.loads(alone.out)["ids"] == rows[2]["ids"]
    raw = call(*words, "--prompt", "Grüße", "--seed", 7, "--json", "--raw")
    assert json.loads(raw.out)["ids"] != rows[2]["ids"] or raw.err != alone.err
    assert f"{len(tokenizer.text_ids('Grüße'))} tokens read" in raw.err

    shown = call(*words, "--prompt", "a", "--prompt", "b")
    assert shown.out.startswith("--- 'a'\n") and "\n--- 'b'\n" in shown.out
    assert call(*words, "--prompt", "a", "--int8", "--min_p", 0.1, "--repetition_penalty", 1.2).code == 0


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        ([], "nothing to complete: give --prompt"),
        (["--prompt_file", "BAD"], 'bad.jsonl:2 is not an object with a text "prompt"'),
        (["--prompt_file", "none.txt"], "none.txt"),
        (["--prompt", "x" * 300], "max_positions=160"),
    ],
)
def test_generate_names_mistakes(folder, tmp_path, argv, complaint):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "x"}\n{"text": "y"}\n', encoding="utf-8")
    argv = [bad if word == "BAD" else word for word in argv]
    done = call("generate", "--checkpoint", folder, *argv)
    assert done.code == 43 and complaint in done.err


def test_chat(folder, monkeypatch):
    words = ["chat", "--checkpoint", folder, "--max_new_tokens", 9, "--seed", 3]

    def run(stdin):
        done = call(*words, stdin=stdin, monkeypatch=monkeypatch)
        assert done.code == 0, done.err
        return done

    one = run("The cat\n")
    assert one.out.endswith("\n") and "tokens/s]" in one.err
    both = run("The cat\n\nand the dog\n/reset\nThe cat\n/quit\nnever read\n")
    assert both.err.count("tokens/s]") == 3 and both.out.startswith(one.out)
    assert run("The cat\nand the dog").out == both.out[: len(run("The cat\nand the dog\n").out)]
    refused = run("/restart\n" + "the cat " * 200 + "\nThe cat\n")
    assert "'/restart' is no command" in refused.err and "max_positions=160" in refused.err
    assert refused.out == one.out


def test_chat_says_what_the_model_has_not_learned(folder, chat_model, chat_params, tokenizer, tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(0, {"params": chat_params}, {"model": to_json(chat_model.config), "chat": False})
    checkpoints.close()
    without = call("chat", "--checkpoint", tmp_path, monkeypatch=monkeypatch)
    assert without.code == 43 and "has no tokenizer" in without.err
    tokenizer.save(tmp_path / "tokenizer")
    plain = call("chat", "--checkpoint", tmp_path, monkeypatch=monkeypatch)
    assert plain.code == 0 and "has not been taught to chat" in plain.err
    system = call("chat", "--checkpoint", folder, "--system", "Be brief.", monkeypatch=monkeypatch)
    assert system.code == 43 and "no 'system'" in system.err
    assert jax.tree.leaves(chat_params)
