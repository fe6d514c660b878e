"""What the README says is run: its example, its commands (at tiny settings), its paths and links."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxtrain import main as command_line
from jaxtrain.data.stdlib import StdlibInstructions, StdlibPairs, StdlibText
from jaxtrain.data.tokenizer import SentencePieceBPE
from jaxtrain.interop.exporting import export_params
from jaxtrain.interop.importing import load_pretrained
from jaxtrain.models import LlamaConfig, build_model
from jaxtrain.types import Outputs, Tokens

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CI = (ROOT / ".ci/run").read_text(encoding="utf-8")
TINY = ["vocab_size=400", "Stage.steps=4", "Stage.batch_size=8", "DecoderConfig.d_model=16"]
TINY += ["DecoderConfig.d_ff=32", "DecoderConfig.num_layers=1", "DecoderConfig.scan_unroll=1"]


def blocks(kind: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


COMMANDS = [line for block in blocks("bash") for line in block.splitlines() if line.strip()]


def in_ci(argv: list[str]) -> bool:
    """Whether ``.ci/run`` runs the command, perhaps with more arguments or more extras."""
    if argv[:2] == ["pip", "install"]:
        extras = set(re.findall(r"\w+", argv[2]))
        return any(extras <= set(re.findall(r"\w+", found)) for found in re.findall(r"'(\.\[[\w,]+\])'", CI))
    plain = CI.replace('"', "")
    return bool(re.search(r"(?<![\w-])" + re.escape(" ".join(argv)) + r"(?![\w-])", plain))


def tiny(argv: list[str]) -> list[str]:
    """The command's arguments with the settings of the test after them."""
    return argv + [part for binding in TINY for part in ("--gin", binding)]


def test_every_command_is_run_by_ci_or_below():
    assert len(COMMANDS) >= 9
    left = [line for line in COMMANDS if not in_ci(shlex.split(line))]
    assert {" ".join(shlex.split(line)[:2]) for line in left} == {
        "jaxtrain train",
        "jaxtrain run",
        "jaxtrain generate",
        "jaxtrain plan",
        "jaxtrain rehearse",
        "jaxtrain import",
        "jaxtrain chat",
        "jaxtrain export",
        "python launch/local.py",
        "pytest -q",
    }


@pytest.mark.parametrize(
    "line",
    ["jaxtrain quickstart --chekc", "jaxtrain quick", "pytest -qq", "pip install '.[teste]'", "ruff checks"],
)
def test_what_ci_does_not_run_is_noticed(line):
    assert not in_ci(shlex.split(line))


@pytest.fixture
def own_data(tmp_path, monkeypatch):
    """A working folder with the files that the README's commands name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command_line, "set_environment", lambda: None)
    for number, text in enumerate(itertools.islice(StdlibText(domain="prose").documents("train"), 200)):
        path = tmp_path / "my_text" / f"part{number % 3}" / f"{number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    for name, source in {"instructions": StdlibInstructions(), "pairs": StdlibPairs(negatives=1)}.items():
        rows = itertools.islice(source.rows("train"), 60)
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


RELEASED = README.split("## Start from released weights")[1].split("\n## ")[0]
WEIGHTS = [line for block in blocks("bash", RELEASED) for line in block.splitlines() if line.startswith("jaxtrain")]


@pytest.fixture
def downloaded(own_data):
    """``downloads/model``: a tiny Llama with a tokenizer and a chat template, as from Hugging Face."""
    tokenizer = SentencePieceBPE(vocab_size=400, sources=(StdlibText(domain="prose"),), max_bytes=100_000)
    trained = tokenizer.train(own_data / "tokenizer")
    config = LlamaConfig(
        vocab_size=416, num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, d_ff=48, max_positions=512
    )
    model = build_model(config)
    export_params(model, model.init(jax.random.key(0)), own_data / "downloads/model", tokenizer=trained)
    return own_data


@pytest.mark.slow
def test_the_commands_from_released_weights(downloaded, monkeypatch):
    """Import, chat, SFT on own data, export; and what was exported comes in again."""
    monkeypatch.setattr("sys.stdin", io.StringIO("What is a list?\nAnd a dict?\n"))
    shown = {}
    for line in WEIGHTS:
        argv = shlex.split(line)[1:]
        small = ["Stage.steps=2", "Stage.batch_size=8", "InstructionDataset.seq_len=128"]
        argv += [part for binding in small for part in ("--gin", binding)] if argv[0] == "run" else []
        argv += ["--max_new_tokens", "5"] if argv[0] == "chat" else []
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            assert command_line.main(argv) == 0, line
        shown[argv[0]] = printed.getvalue()
    assert list(shown) == ["import", "chat", "run", "export", "generate"]
    assert "held-out completion loss" in shown["run"]
    result = json.loads(Path("runs/tuned/stages/sft/result.json").read_text())
    assert result["chat"] and result["steps"] == 2 and len(result["parents"]) == 1
    assert "%" in shown["generate"], shown["generate"]

    tuned, tokenizer = load_pretrained("runs/tuned/stages/sft")[1:]
    again, found = load_pretrained("exported")[1:]
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), tuned, again))
    text = "def f(x):\n\treturn x  # \u4f60\u597d"
    assert found.encode(text) == tokenizer.encode(text)


@pytest.mark.slow
def test_the_commands_on_own_text(own_data):
    shown = {}
    for line in COMMANDS:
        if line in WEIGHTS or line.startswith("pytest"):
            continue
        argv = shlex.split(line)
        if argv[0] == "python":
            # After the same run in this process nothing is left to train: it is found to be the same run.
            script, arguments = str(ROOT / argv[1]), tiny(argv[2:])
            done = subprocess.run(
                [sys.executable, script, *arguments],
                env=os.environ | {"PYTHONPATH": str(ROOT)},
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, done.stderr
            assert "launch: start: " in done.stderr
            assert "pretrain: unchanged, skipped" in done.stderr
        elif not in_ci(argv):
            printed = io.StringIO()
            arguments = argv[1:] if argv[1] in ("generate", "plan", "rehearse") else tiny(argv[1:])
            with contextlib.redirect_stdout(printed):
                code = command_line.main(arguments)
            assert code == 0, line
            shown[" ".join(argv[1:3])] = printed.getvalue()
            if "--dry_run" in argv:
                assert not Path("runs").exists()
    assert "pretrain  LM, Llama, data=2 fsdp=4" in shown["rehearse recipes/llama3_8b_pretrain.gin"]
    assert "training FLOPs per token" in shown["train --gin_file"]
    assert "TextFiles.pattern = 'my_text/**/*.txt'" in shown["train --gin_file"]
    assert "held-out bits per byte" in shown["run recipes/own_text.gin"]
    assert "held-out completion loss" in shown["run recipes/own_instructions.gin"]
    assert "held-out pair accuracy" in shown["run recipes/own_pairs.gin"]
    ancestry = json.loads(Path("runs/dpo/stages/dpo/result.json").read_text())["parents"]
    assert [parent["stage"] for parent in ancestry] == ["pretrain", "sft"]

    table = README.split("A run's folder:")[1].split("##")[0]
    for cell in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE):
        for number, path in enumerate(re.findall(r"`([^`]+)`", cell)):
            places = [Path("runs/sft") / path.replace("NAME", "sft")]
            if number and "NAME" in cell:  # a row's first path says the folder of the rest
                places.append(Path("runs/sft/stages/sft") / path)
            assert any(place.exists() for place in places), f"a run has no {path}"


@pytest.mark.slow
def test_json_lines_of_text_as_own_text_says(own_data):
    """The other way in, by the bindings in the comment at the top of ``own_text.gin``."""
    notes = (ROOT / "configs/recipes/own_text.gin").read_text()
    bindings = [line.replace("FILES", "*.jsonl") for line in re.findall(r"^#   (.*)$", notes, re.MULTILINE)]
    assert len(bindings) == 2
    for name in ("instructions", "pairs"):
        (own_data / f"{name}.jsonl").unlink()
    texts = [path.read_text() for path in sorted(own_data.glob("my_text/*/*.txt"))]
    (own_data / "docs.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    argv = ["train", "--gin_file", "recipes/own_text.gin", "--out", "runs/lines"]
    argv += [part for binding in bindings for part in ("--gin", binding)]
    assert command_line.main(tiny(argv)) == 0
    assert json.loads(Path("runs/lines/summary.json").read_text())[0]["stage"] == "pretrain"


@pytest.mark.slow
def test_the_example_lowers_its_loss(capsys, monkeypatch):
    (example,) = blocks("python")
    assert len(example.splitlines()) <= 40
    module = types.ModuleType("readme_example")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # dataclasses look their module up
    exec(compile(example, "README.md", "exec"), module.__dict__)
    shown = capsys.readouterr().out
    losses = [float(x) for x in re.findall(r"^\d+ loss (\d+\.\d+), nll \d+\.\d+$", shown, re.MULTILINE)]
    assert len(losses) == 20
    assert losses[-1] < losses[0] - 0.5
    check_formula(module)


def check_formula(module) -> None:
    """The example's loss is that of its docstring, and it returns sums."""
    logits = np.log(np.array([[[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]], np.float32))
    targets, weights = np.array([[0, 2]]), np.array([[1.0, 3.0]], np.float32)
    steps, ones = np.array([[0, 1]]), np.array([[1, 1]])
    batch = Tokens(ids=ones, targets=targets, weights=weights, positions=steps, segments=ones)

    def apply(params, tokens, *, rng=None):
        return Outputs(hidden=logits, logits=logits)

    loss = module.Focal(gamma=2.0)(apply, {}, batch, None)
    nll = -np.log([0.5, 0.8])
    np.testing.assert_allclose(loss.total, 1.0 * 0.5**2 * nll[0] + 3.0 * 0.2**2 * nll[1], rtol=1e-5)
    np.testing.assert_allclose(loss.weight, 4.0)
    np.testing.assert_allclose(loss.metrics["nll"], [nll[0] + 3 * nll[1], 4.0], rtol=1e-5)


def test_the_map_names_what_is_there():
    table = README.split("## Map of the repository")[1].split("\n## ")[0]
    cells = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
    paths = [path for cell in cells for path in re.findall(r"`([^`]+)`", cell)]
    assert len(paths) > 15
    assert [path for path in paths if not (ROOT / path).exists()] == []
    packages = {f"jaxtrain/{path.parent.name}/" for path in (ROOT / "jaxtrain").glob("*/__init__.py")}
    assert packages - set(paths) == set(), "the map leaves these out"


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "launch/README.md", "benchmarks/README.md"])
def test_links_and_paths_lead_somewhere(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)]+)\)", text):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), link
        titles = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE) if anchor else []
        assert not anchor or anchor in [title.lower().replace(" ", "-") for title in titles], link
    named = re.findall(r"`((?:jaxtrain|configs|tests|launch|benchmarks)/[\w./]+)`", text)
    assert [path for path in named if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("name", ["launch/README.md", "benchmarks/README.md"])
def test_the_options_that_other_readmes_show_exist(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    commands = [block.replace("\\\n", " ") for block in blocks("bash", text)]
    lines = [shlex.split(line) for block in commands for line in block.splitlines()]
    scripts = [argv for argv in lines if argv[0] == "python"]
    assert scripts
    for argv in scripts:
        own = argv[2 : argv.index("--")] if "--" in argv else argv[2:]
        verb = own[:1] if argv[1] == "launch/tpu_vm.py" else []
        asked = [sys.executable, str(ROOT / argv[1]), *verb, "--help"]
        usage = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
        assert [part for part in own if part.startswith("--") and part not in usage] == []
