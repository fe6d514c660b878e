"""The direction of imports, read from the source: each part of the package sees only what is left of it."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "jaxtrain"

CHAIN = [
    "sharding", "kernels", "models", "objectives", "train", "generate", "rl",
    "config", "gin_edge", "recipe", "plan", "rehearse", "commands", "main",
]  # fmt: skip
BASE = {"types", "config_json", "distributed"}  # standard library and JAX only; every part may use them
BESIDE_TRAIN = {"optim", "data", "checkpoint", "evaluate", "report"}
ALLOWED = {
    "__init__": set(),
    "types": set(),
    "config_json": set(),
    "distributed": set(),
    "config_types": set(),
    "config_build": {"config_types"},
    "config_text": {"config_json"},
    "config_model": BASE | {"sharding", "models", "checkpoint"},
    "optim": BASE,
    "data": BASE,
    "checkpoint": BASE | {"sharding"},
    "evaluate": BASE | {"sharding", "models", "objectives", "data"},
    "report": set(),
    "interop": BASE | {"sharding", "models", "data", "checkpoint", "config_model"},
    **{part: BASE | set(CHAIN[:i]) for i, part in enumerate(CHAIN)},
}
for _part in CHAIN[CHAIN.index("train") :]:
    ALLOWED[_part] = ALLOWED[_part] | BESIDE_TRAIN
for _part in CHAIN[CHAIN.index("config") :]:
    ALLOWED[_part] = ALLOWED[_part] | {"config_model"}
ALLOWED["commands"] = ALLOWED["commands"] | {"interop"}
ALLOWED["rehearse"] = ALLOWED["rehearse"] | {"config_text"}
ALLOWED["gin_edge"] = {"config_build", "config_text"}
ALLOWED["main"] = {"commands", "distributed"}

# Flax NNX is used functionally: these either hide state from JAX's own transformations or replace them.
FORBIDDEN_NNX = {"jit", "grad", "value_and_grad", "scan", "vmap", "remat", "cond", "while_loop", "Optimizer"}
SPLIT_MERGE = {"split", "merge"}


def modules_of(package: Path) -> dict[str, Path]:
    """Every module of a package: ``'jaxtrain.data.loader' -> file``."""
    modules = {}
    for file in sorted(package.rglob("*.py")):
        parts = file.relative_to(package.parent).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)] = file
    return modules


def part_of(module: str) -> str:
    """The first name below the package: ``jaxtrain.data.loader -> data``; ``jaxtrain -> __init__``."""
    return module.split(".")[1] if "." in module else "__init__"


def imports_of(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[str, int]]:
    """Full dotted names that a module imports, at its top or inside functions, with their lines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = module.split(".")[: len(module.split(".")) - node.level + is_package]
                base = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((f"{base}.{alias.name}", node.lineno) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "importlib.import_module",
            "__import__",
        ):
            yield from ((name.value, node.lineno) for name in node.args[:1] if isinstance(name, ast.Constant))


def nnx_uses(tree: ast.AST, imports: list[tuple[str, int]]) -> Iterator[tuple[str, int]]:
    """Names taken from ``flax.nnx``: ``nnx.split`` under any alias, or ``from flax.nnx import split``."""
    yield from ((name.removeprefix("flax.nnx."), line) for name, line in imports if name.startswith("flax.nnx."))
    aliases = {"nnx", "flax.nnx"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            aliases |= {alias.asname for alias in node.names if alias.asname and alias.name.endswith("nnx")}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in aliases:
            yield node.attr, node.lineno


def violations(package: Path) -> list[str]:
    """Every import or use of NNX that the architecture forbids, as ``file:line what``."""
    found = []
    for module, file in modules_of(package).items():
        tree = ast.parse(file.read_text(encoding="utf-8"), str(file))
        place = file.relative_to(package.parent).as_posix()
        part = part_of(module)
        if part not in ALLOWED:
            found.append(f"{place}: {part} has no place in the order of imports; give it one in this test")
            continue
        imports = list(imports_of(tree, module, file.name == "__init__.py"))
        for name, line in imports:
            top = name.split(".")[0]
            seen = part_of(name) if top == package.name else part
            version = seen.startswith("__")  # ``import jaxtrain``, ``from jaxtrain import __version__``
            if seen != part and not version and seen not in ALLOWED[part]:
                found.append(f"{place}:{line}: {part} may not import {seen}")
            if top == "gin" and part != "gin_edge":
                found.append(f"{place}:{line}: only gin_edge.py imports gin")
            if top == "flax" and part != "models":
                found.append(f"{place}:{line}: only models/ imports flax")
        for name, line in nnx_uses(tree, imports):
            if name in FORBIDDEN_NNX:
                found.append(f"{place}:{line}: nnx.{name} is not used here; use JAX's own")
            if name in SPLIT_MERGE and module != f"{package.name}.models.functional":
                found.append(f"{place}:{line}: only models/functional.py uses nnx.{name}")
    return found


@pytest.mark.smoke
def test_imports_point_left():
    assert len(modules_of(PACKAGE)) > 20  # the package was found
    assert violations(PACKAGE) == []


PLANTED = {
    "models/decoder.py": ("from jaxtrain.objectives import lm", "models may not import objectives"),
    "models/lazy.py": ("def f():\n    import jaxtrain.train.step", "models may not import train"),
    "models/relative.py": ("from ..objectives.lm import LM", "models may not import objectives"),
    "models/__init__.py": ("from .. import rl", "models may not import rl"),
    "models/dynamic.py": (
        "import importlib\nimportlib.import_module('jaxtrain.rl')",
        "models may not import rl",
    ),
    "models/jit.py": ("from flax import nnx\nnnx.jit(f)", "nnx.jit is not used"),
    "models/alias.py": ("from flax import nnx as n\nn.Optimizer(m)", "nnx.Optimizer is not used"),
    "models/direct.py": ("from flax.nnx import scan", "nnx.scan is not used"),
    "models/split.py": ("import flax\nflax.nnx.split(m)", "only models/functional.py uses nnx.split"),
    "objectives/lm.py": ("from jaxtrain import train", "objectives may not import train"),
    "optim/masks.py": ("from jaxtrain.sharding import constrain", "optim may not import sharding"),
    "data/loader.py": ("from jaxtrain import types, models", "data may not import models"),
    "evaluate/loss.py": ("from jaxtrain.generate import decode", "evaluate may not import generate"),
    "report/page.py": ("from jaxtrain.types import Tokens", "report may not import types"),
    "checkpoint.py": ("import jaxtrain.models", "checkpoint may not import models"),
    "types.py": ("from jaxtrain import sharding", "types may not import sharding"),
    "train/step.py": ("from jaxtrain import recipe", "train may not import recipe"),
    "train/gins.py": ("import gin.config", "only gin_edge.py imports gin"),
    "train/linen.py": ("import flax.linen as nn", "only models/ imports flax"),
    "main.py": ("from jaxtrain import recipe", "main may not import recipe"),
    "extras.py": ("", "extras has no place in the order"),
}


@pytest.mark.parametrize(("file", "source", "complaint"), [(f, *rest) for f, rest in PLANTED.items()], ids=PLANTED)
def test_a_planted_violation_is_found(file, source, complaint, tmp_path):
    path = tmp_path / "jaxtrain" / file
    path.parent.mkdir(parents=True)
    path.write_text(source)
    found = violations(tmp_path / "jaxtrain")
    assert len(found) == 1
    assert found[0].startswith(f"jaxtrain/{file}")
    assert complaint in found[0]


def test_allowed_imports_pass(tmp_path):
    package = tmp_path / "jaxtrain"
    for file, source in {
        "__init__.py": "__version__ = '1'",
        "main.py": "import jaxtrain\ndef f():\n    from jaxtrain import commands",
        "commands.py": "from jaxtrain import __version__, gin_edge, recipe, data, report",
        "gin_edge.py": "import gin\nfrom jaxtrain import config_text",
        "models/functional.py": "from flax import nnx\nfrom . import layers\nnnx.split(nnx.merge(a))",
        "train/loop.py": "from jaxtrain import checkpoint, evaluate, optim, report\nfrom . import step",
    }.items():
        path = package / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    assert violations(package) == []


HEAVY = ("jax", "jaxlib", "numpy", "flax", "optax", "orbax", "grain", "gin", "torch", "sentencepiece", "absl")


@pytest.mark.smoke
@pytest.mark.parametrize("argv", [["--help"], ["quickstart", "--help"], ["generate", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(argv):
    code = f"""
import sys
from jaxtrain.main import main
try:
    main({argv!r})
except SystemExit as end:
    assert not end.code, end.code
print(sorted(set(sys.modules) & set({HEAVY!r})))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
