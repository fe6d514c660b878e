"""What a laptop runs needs nothing installed, and hands nothing to a shell of its own."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
FILES = sorted(LAUNCH.glob("*.py"))
OWN = {path.stem for path in FILES}
SHELLS = {("os", "system"), ("os", "popen"), ("subprocess", "getoutput"), ("subprocess", "getstatusoutput")}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_imports_and_shells(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    allowed = set(sys.stdlib_module_names) | (OWN if path.stem != "supervise" else set())  # it is copied alone
    assert {name.split(".")[0] for name in names} <= allowed
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            assert all(keyword.arg != "shell" for keyword in node.keywords)
            if isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
                assert (node.func.value.id, node.func.attr) not in SHELLS


@pytest.mark.parametrize("script", ["local.py", "tpu_vm.py", "slurm.py", "gke.py", "supervise.py"])
def test_help_answers_without_site_packages(script):
    done = subprocess.run([sys.executable, "-S", str(LAUNCH / script), "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "usage: " in done.stdout, done.stderr
