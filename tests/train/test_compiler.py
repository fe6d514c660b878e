"""What TPUs' compiler is told: by chip, less what the user has said."""

from __future__ import annotations

import types

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from jaxtrain.sharding import MeshConfig, make_mesh
from jaxtrain.train.compiler import SPARSE_CORES, compiler_options


def mesh_of(kind: str, count: int = 4):
    """A mesh as far as the function looks at it: devices of this kind."""
    return types.SimpleNamespace(size=count, devices=np.array([types.SimpleNamespace(device_kind=kind)] * count))


@pytest.mark.parametrize(
    ("kind", "told"), [("TPU v5", True), ("TPU v6 lite", True), ("TPU v5 lite", False), ("TPU7x", False)]
)
def test_chips_with_sparse_cores_are_told_to_use_them(kind, told, monkeypatch):
    monkeypatch.delenv("LIBTPU_INIT_ARGS", raising=False)
    assert compiler_options(mesh_of(kind)) == (SPARSE_CORES if told else None)
    assert compiler_options(mesh_of(kind, 1)) is None


def test_what_the_environment_says_is_left_to_it(monkeypatch):
    name, *others = SPARSE_CORES
    monkeypatch.setenv("LIBTPU_INIT_ARGS", f"--{name}=false --xla_other=1")
    assert list(compiler_options(mesh_of("TPU v5"))) == others
    monkeypatch.setenv("LIBTPU_INIT_ARGS", " ".join(f"--{name}=false" for name in SPARSE_CORES))
    assert compiler_options(mesh_of("TPU v5")) is None


def test_other_devices_are_told_nothing():
    assert compiler_options(make_mesh(MeshConfig(data=8))) is None
    assert compiler_options(AbstractMesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))) is None
