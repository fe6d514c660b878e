"""The same loss and gradients as on one device, of every objective, where a mesh's devices are several processes'."""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import sys
from pathlib import Path

import jax
import pytest

from jaxtrain.sharding import MeshConfig

TRAIN = Path(__file__).resolve().parents[1] / "train"
WARNING = "Involuntary full rematerialization"
# By processes (of eight devices in all): zero's ways, and axes across processes and within one.  Every process compiles
# every program, so four of them take twice as long; JAXTRAIN_ALL_MESHES=1 adds the rest, for some minutes more.
GROUPS = {2: ("fsdp4-data2-zero1", "context2-tensor2-fsdp2", "stage2-fsdp2-tensor2"), 4: ("fsdp2-data4",)}
MORE = {
    2: (
        "data8",
        "fsdp8",
        "fsdp4-data2-zero2",
        "fsdp2-data2-tensor2-zero_data",
        "tensor8",
        "context4-fsdp2",
        "expert2-tensor2-fsdp2",
        "stage2-data4",
    ),
    4: ("fsdp2-tensor4", "context8"),
}
if os.environ.get("JAXTRAIN_ALL_MESHES"):
    GROUPS = {processes: (*GROUPS[processes], *MORE[processes]) for processes in GROUPS}


def module(name: str):
    """A module of tests/train."""
    spec = importlib.util.spec_from_file_location(f"train_{name}", TRAIN / f"{name}.py")
    found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found
    spec.loader.exec_module(found)
    return found


@pytest.fixture(scope="module")
def cases():
    return module("test_meshes")


@pytest.fixture(scope="module")
def one_device(cases, tmp_path_factory):
    """A file of what one device of one process computes."""
    file = tmp_path_factory.mktemp("expected") / "one_device.pickle"
    file.write_bytes(pickle.dumps(jax.device_get(cases.all_objectives(module("conftest").make_tools(), MeshConfig()))))
    return file


def test_the_meshes_are_those_of_the_other_tests(cases):
    chosen = [name for names in (*GROUPS.values(), *MORE.values()) for name in names]
    assert set(chosen) <= set(cases.MESHES)


@pytest.mark.slow
@pytest.mark.parametrize("processes", GROUPS)
def test_several_processes_compute_what_one_device_does(processes, worker, one_device, cases):
    job = worker("meshes", one_device, *GROUPS[processes], processes=processes, devices=8 // processes)
    assert job.wait(900) == [0] * processes, job.logs
    for log in job.logs:
        rows = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
        assert [row["mesh"] for row in rows] == list(GROUPS[processes])
        for row in rows:
            assert list(row["far"]) == list(cases.NAMES) and max(row["far"].values()) <= 1, row
            assert row["control"] > 1000, row
        assert WARNING not in log
