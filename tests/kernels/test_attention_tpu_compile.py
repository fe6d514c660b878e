"""The TPU compiler takes the kernels: libtpu compiles for chips that this machine does not have.

All of 5 chips, 3 head sizes and 4 lengths are 60 programs, forward and backward, which take some minutes:

    JAXTRAIN_COMPILE_ALL=1 pytest tests/kernels/test_attention_tpu_compile.py

Otherwise each chip compiles at a short length, where one kernel computes all gradients, and at the longest, where
there are two, with each head size in turn.  The length enters the kernels only so, and as a number of blocks.
What this leaves out is running them.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

COMPILE = Path(__file__).with_name("compile_attention_tpu.py")
CHIPS = ("v4", "v5e", "v5p", "v6e", "tpu7x")
SIZES = (64, 128, 256)
LENGTHS = (2048, 8192, 32768, 131072)
ALL = "JAXTRAIN_COMPILE_ALL"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None, reason="no TPU compiler: pip install 'jaxtrain[tpu]'"
    ),
]


def compiled(cases: list[dict]) -> list[dict]:
    """What ``compile_attention_tpu.py`` says of each."""
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    ran = subprocess.run([sys.executable, COMPILE, *map(json.dumps, cases)], env=env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return [json.loads(line) for line in ran.stdout.splitlines()]


def check(found: dict) -> None:
    assert "error" not in found, found
    assert found["kernels"] in (["flash_backward", "flash_forward"], ["flash_dkv", "flash_dq", "flash_forward"])
    assert found["calls"] == len(found["kernels"])
    assert not found["square"], found


@pytest.fixture(scope="module")
def some() -> list[dict]:
    cases = []
    for i, chip in enumerate(CHIPS):
        cases.append({"chip": chip, "T": LENGTHS[i % 2], "H": SIZES[i % 3]})
        cases.append({"chip": chip, "T": LENGTHS[-1], "H": SIZES[(i + 1) % 3]})
    return compiled(cases)


def test_every_chip_compiles_short_and_long_rows(some):
    for found in some:
        check(found)
    ways = {(found["case"]["chip"], len(found["kernels"])) for found in some}
    # v4 has too little VMEM for a group's gradients of queries.
    assert ways == {*itertools.product(CHIPS, (3,)), *itertools.product(CHIPS[1:], (2,))}


OPTIONS = [
    {"chip": "v5e", "T": 1000, "H": 80, "dtype": "float32", "softcap": 30.0},
    {"chip": "v6e", "T": 4096, "H": 192, "V": 128, "N": 8, "K": 2, "window": 1024},
    {"chip": "tpu7x", "T": 700, "S": 3000, "H": 96, "N": 3, "B": 2, "causal": False, "dtype": "float32"},
    {"chip": "v4", "T": 8192, "H": 256, "N": 4, "softcap": 50.0, "window": 4096, "causal": False},
    # With its own tiles of 512 x 512 this takes 1 MiB more than there is.
    {"chip": "v4", "T": 8192, "H": 256, "dtype": "float32", "tiles": [512, 256]},
]


def test_every_option_compiles():
    for found in compiled(OPTIONS):
        check(found)


def test_decoding_compiles_and_never_copies_the_cache():
    sizes = {"S": 32768, "B": 4, "N": 8, "K": 2, "H": 128, "decode": True}
    cases = [{"chip": chip, "T": T, **sizes} for chip, T in zip(CHIPS, (1, 5, 1, 5, 1), strict=True)]
    for each in compiled(cases):
        assert "error" not in each, each
        assert (each["kernels"], each["calls"]) == (["decode_attention"], 1)
        assert each["temporaries"] < 0.01 * each["arguments"]


def test_a_step_of_decoding_writes_into_the_cache_in_place():
    sizes = {"S": 16384, "B": 8, "N": 8, "K": 4, "H": 128, "T": 1, "decode": True, "steps": 16}
    for each in compiled([{"chip": chip, **sizes} for chip in CHIPS]):
        assert "error" not in each, each
        assert each["temporaries"] < 0.01 * each["arguments"]


def test_temporaries_grow_with_the_length_and_no_array_with_its_square():
    """Forward and backward on one v5e chip; at the longest, one array of T x S would be 32 GiB in bfloat16."""
    found = compiled([{"chip": "v5e", "T": T, "H": 64, "N": 8, "K": 2} for T in (32768, 65536, 131072)])
    for each in found:
        check(each)
        assert 0 < each["temporaries"] < 4 * each["arguments"]
    small, middle, large = (each["temporaries"] for each in found)
    # A group of heads is taken in two parts, in four, and by two kernels.
    assert middle / small == pytest.approx(2, rel=0.25) and large / middle == pytest.approx(2, rel=0.2)
    assert large / small == pytest.approx(4, rel=0.05)


@pytest.mark.skipif(not os.environ.get(ALL), reason=f"minutes; {ALL}=1 runs it")
@pytest.mark.parametrize("chip", CHIPS)
def test_every_chip_compiles_every_length_and_size(chip):
    cases = [{"chip": chip, "T": T, "H": H} for T, H in itertools.product(LENGTHS, SIZES)]
    found = compiled(cases)
    assert [each["case"] for each in found] == cases
    for each in found:
        check(each)
