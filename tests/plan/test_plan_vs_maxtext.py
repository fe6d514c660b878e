"""What benchmarks/plan_vs_maxtext.py counts and asks for; nothing is compiled and MaxText is not needed.

Left out: MaxText itself, and that its names for kernels stay the same, which the benchmark refuses to guess.
"""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from jaxtrain.plan.chips import parse_topology
from jaxtrain.plan.hlo import Loop, Program, Work, walk


@pytest.fixture
def versus(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("plan_vs_maxtext")


def test_both_get_the_same_work(versus):
    for name, case in versus.CASES.items():
        (stage,) = versus.load(case).stages
        chips = parse_topology(case.topology).chips
        settings = dict(one.split("=") for one in versus.maxtext_settings(case, Path("x")))
        assert stage.batch_size == chips * int(settings["per_device_batch_size"]), name
        assert stage.data.seq_len == int(settings["max_target_length"]), name
        assert stage.model.remat == settings["remat_policy"], name
        # MaxText counts the two cores of a v5p chip in the slice's name.
        cores = 2 if case.topology.startswith("v5p") else 1
        assert settings["compile_topology"] == f"{case.topology.split(':')[0]}-{chips * cores}", name
        layers = {"llama3-8b": 32, "llama3-70b": 80}[settings["model_name"]]
        assert stage.model.num_layers == layers, name


KERNELS = {
    "flash_forward.3": 2,
    "flash_dq.1": 3,
    "flash_dkv.1": 4,
    "flash_backward": 5,
    "splash_mha_fwd_segmented_residuals.3": 2,
    "splash_mha_dq_segmented_no_residuals.1": 3,
    "splash_mha_dkv_segmented_no_residuals.1": 4,
}


def test_attention_is_counted_by_hand(versus):
    kernels = tuple(Work(name, flops=7.0, kernel=True) for name in KERNELS)
    items = (Loop(3, kernels), Work("fusion", flops=1.0))
    priced = Program(tuple(versus.priced(item, 100.0) for item in items), (), ())
    assert [(work.name, work.flops, times) for work, times in priced.works()] == [
        *((name, 100.0 * products, 3) for name, products in KERNELS.items()),
        ("fusion", 1.0, 1),
    ]
    with pytest.raises(ValueError, match="some_other_kernel"):
        versus.priced(Work("some_other_kernel", kernel=True), 100.0)


SPLASH = """HloModule step, is_scheduled=true, num_partitions=1

ENTRY %main (q: bf16[8,128]) -> bf16[8,128] {
  %q = bf16[8,128]{1,0} parameter(0)
  %splash_mha_fwd.1 = bf16[8,128]{1,0} custom-call(%q), custom_call_target="tpu_custom_call", """
SPLASH += """frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 512}"
}}, backend_config={"custom_call_config":{"body":"TU","cost_estimate":{"flops":"9","transcendentals":"1"}}}
  ROOT %twice = bf16[8,128]{1,0} add(%splash_mha_fwd.1, %splash_mha_fwd.1)
}
"""


def test_what_kernels_declare_is_left_out(versus):
    """And line breaks in a kernel's metadata do not end the computation."""
    declared, bare = (walk(text).items for text in (SPLASH, versus.without_estimates(SPLASH)))
    assert [item.name for item in bare] == ["splash_mha_fwd.1", "twice"]
    assert (declared[0].flops, bare[0].flops) == (9.0, 0.0)
    assert bare[0].bytes == 2 * 2 * 8 * 128  # read and written


def test_the_table_adds_up(versus):
    row = {
        "case": "c",
        "system": "s",
        "gib": 7.5,
        "gib_added_up": 8.25,
        "flops": 5.5e14,
        "hbm_bytes": 3.5e11,
        "sent_bytes": 5e10,
        "sent_by_kind": {"all-gather": 4e10, "all-reduce": 1e10, "all-to-all": 1e6},
        "seconds": 1.5,
        "exposed": 0.07,
        "mfu": 0.6,
        "compile_cpu_seconds": 50.4,
        "compile_peak_gib": 1.25,
    }
    *_, last = versus.table([row]).splitlines()
    assert last == (
        "| c | s | 7.50 | 8.25 | 550.0 | 350 | 50.0: all-gather 40.0, all-reduce 10.0 "
        "| 1.500 | 7.0% | 60.0% | 50 (1.2) |"
    )
