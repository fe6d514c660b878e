"""The reader of schedules and what the benchmark counts with it, on small dumps written here; nothing is compiled."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
UNITS = 10


@pytest.fixture
def schedule(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("tpu_schedule")


@pytest.fixture
def benchmark_module(monkeypatch, schedule):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("attention_schedule")


def dump(end: int, branches: dict[int, int]) -> str:
    """Text as the compiler writes it: bundle -> where its branch goes; every target starts a region of its own."""
    region = {target: i + 20 for i, target in enumerate(sorted(set(branches.values())))}
    lines = ["= control target key start", "LB: loop body", "= control target key end", ""]
    for at in range(end):
        address = f"{at:#6x}" if at else "     0"
        text = "%v1_v0 = vld [vmem:[%s1_s0] sm:$0xff]"
        if at in branches:
            text += f"  ;;  %9 = sbr.rel (!%p1_p0) target = $region{region[branches[at]]}"
        lines.append(f"{address}   : > {{ {text} }}" + (" /* Start region 3 :: End region 3 */" if at == 1 else ""))
        if at in region:
            # Long comments wrap: the region belongs to the bundle above.
            empty = "Start/End empty" if at % 2 else "Start"
            lines.append(f"window bound. */ }} /* End region 7 :: {empty} region {region[at]} */")
    return "\n".join(lines)


def tree(stretch) -> tuple:
    return (stretch.kind, stretch.start, stretch.end, [tree(child) for child in stretch.children])


def test_a_branch_takes_effect_after_four_more_bundles(schedule):
    # A loop of bundles 5 to 39 around an ``if`` of 15 to 29, which guards a loop over the same bundles.
    root = schedule.read_program(dump(45, {10: 30, 25: 15, 35: 5}), "v6e")
    inner = ("loop", 15, 30, [])
    assert tree(root) == ("kernel", 0, 45, [("loop", 5, 40, [("if", 15, 30, [inner])])])
    loop = root.children[0]
    assert (root.own_cycles, loop.own_cycles, loop.children[0].own_cycles) == (10, 20, 0)
    assert list(loop.own()) == [*range(5, 15), *range(30, 40)]


def test_chips_differ_in_when_a_branch_takes_effect(schedule):
    ends = [schedule.read_program(dump(45, {35: 5}), chip).children[0].end for chip in ("v4", "v5p", "tpu7x")]
    assert ends == [37, 40, 42]


def test_a_loop_may_begin_while_the_branch_around_it_takes_effect(schedule):
    # The ``if`` of 12 on guards the loop of 14 on, the first bundles of which run whether it is taken or not.
    root = schedule.read_program(dump(45, {11: 38, 30: 14}), "tpu7x")
    assert tree(root) == ("kernel", 0, 45, [("if", 14, 38, [("loop", 14, 37, [])])])


def test_a_branch_may_leave_the_program(schedule):
    text = "\n".join(line for line in dump(45, {10: 44}).splitlines() if "window bound" not in line)
    assert tree(schedule.read_program(text, "v6e")) == ("kernel", 0, 45, [("if", 15, 45, [])])


def test_branches_that_are_not_nested_are_refused(schedule):
    with pytest.raises(ValueError, match="half inside"):
        schedule.read_program(dump(60, {5: 30, 20: 50}), "v6e")
    with pytest.raises(ValueError, match="unconditional"):
        schedule.read_program(dump(60, {5: 30}).replace("(!%p1_p0) ", ""), "v6e")


def write(folder: Path, name: str, end: int, branches: dict[int, int], feeds: list[int], full: int = 2) -> None:
    """Both files of a kernel; ``feeds``: bundles that feed a matrix unit."""
    stem = f"123-{name}-"
    (folder / f"{stem}72-final_bundles.txt").write_text(dump(end, branches))
    (folder / f"{stem}71-schedule-analysis_final_bundles.txt").write_text("Schedule analysis:\n")
    rows = ["  ".join(str(full if at in feeds and unit == 0 else 0) for unit in range(UNITS)) for at in range(end)]
    capacity = ["== CAPACTIY:", "MXU, XLU", "  2  2  4  2  1  3  3  2  2  2", "== UTILIZATION:"]
    (folder / f"{stem}70-final_hlo-static-per-bundle-utilization.txt").write_text("\n".join(capacity + rows))


def test_a_kernel_is_read_from_its_two_files(schedule, tmp_path):
    write(tmp_path, "flash_forward.1", 45, {10: 30, 35: 5}, [16, 20, 24], full=1)
    write(tmp_path, "copy.3", 10, {}, [])
    (tmp_path / "123-flash_forward.1-05-original.txt").write_text("much more")
    schedule.keep_schedules(tmp_path)
    assert not (tmp_path / "123-flash_forward.1-05-original.txt").exists()

    (kernel,) = schedule.read_kernels(tmp_path, "v6e").values()
    (fed,) = kernel.matrix
    assert (kernel.name, fed.start, kernel.hot(fed)) == ("flash_forward.1", 15, 9)
    assert [stretch.kind for stretch in kernel.path(fed)] == ["kernel", "loop", "if"]
    assert kernel.use(fed)["MXU"] == 3 / (2 * 15)

    write(tmp_path, "flash_forward.1", 46, {10: 30, 35: 5}, [16])
    (tmp_path / "123-flash_forward.1-72-final_bundles.txt").write_text(dump(45, {10: 30, 35: 5}))
    with pytest.raises(ValueError, match="45 bundles"):
        schedule.read_kernels(tmp_path, "v6e")


def test_a_step_of_the_grid_begins_no_row_and_ends_none(benchmark_module, schedule, tmp_path):
    # In the grid's loop, 10 to 119: begin 20 to 29, two kinds of tile at 40 to 69 and 80 to 89, end 100 to 109.
    branches = {15: 30, 35: 70, 75: 90, 95: 110, 115: 10}
    write(tmp_path, "splash", 125, branches, [45, 60, 82, 86])
    costs = benchmark_module.GridCosts.read(schedule.read_kernels(tmp_path, "v6e")["splash"])
    around = 110 - 10 - 30 - 10 - 10
    assert costs == benchmark_module.GridCosts(step=around + 10, hot=5, skipped=around, begin=10, end=10)
    # 4 x 8 tiles of 256 x 128 in 1,024 tokens: 2 + 4 + 6 + 8 are visited.
    rows = 4 * 20
    assert costs.sequence(1024, (256, 128), row=0) == 20 * costs.step + 12 * costs.skipped + rows
    assert costs.sequence(1024, (256, 128), row=1) == 20 * costs.step + 12 * costs.skipped + 8 * 20


@pytest.fixture
def loop_kernel(benchmark_module, schedule, tmp_path):
    """A step of the grid like ours, from 10 on; every ``if`` leaves five bundles for its branch and four after it."""
    branches = {
        15: 30,  # begins a block: 20 to 29
        31: 50, 42: 36,  # clears, loop 36 to 46
        51: 70, 65: 56,  # masked tiles, loop 56 to 69
        71: 160,  # full tiles, 76 to 159: the start of the first
        85: 110, 105: 90,  # pairs, loop 90 to 109
        111: 125,  # an odd count: 116 to 124
        126: 150,  # an even count: 131 to 149
        161: 180, 175: 166,  # masked tiles, loop 166 to 179
        181: 195,  # ends a block: 186 to 194
        200: 10,
    }  # fmt: skip
    write(tmp_path, "ours", 210, branches, [60, 80, 95, 104, 120, 140, 170])
    return benchmark_module.LoopKernel(schedule.read_kernels(tmp_path, "v6e")["ours"])


def test_what_a_step_of_ours_costs(loop_kernel):
    cycles = loop_kernel.cycles
    assert (loop_kernel.pairs.own_cycles, loop_kernel.kernel.hot(loop_kernel.pairs), loop_kernel.masked.start) == (
        20,
        10,
        166,
    )
    nothing = cycles(0, 0, 0, False, False)
    # 10 to 204, without every ``if``.
    assert nothing == 195 - 10 - 14 - 14 - 84 - 14 - 9
    assert cycles(0, 0, 0, True, False) == nothing + 10
    assert cycles(0, 0, 0, False, True) == nothing + 9
    assert cycles(3, 0, 2, False, False) == nothing + 5 * 14
    start, odd, even = 84 - 20 - 9 - 19, 9, 19
    assert cycles(0, 1, 0, False, False) == nothing + start + odd
    assert cycles(0, 2, 0, False, False) == nothing + start + even
    assert cycles(0, 5, 0, False, False) == nothing + start + 2 * 20 + odd
    assert cycles(0, 6, 0, False, False) == nothing + start + 2 * 20 + even
    # The clearing loop has 11 bundles, and its ``if`` three more.
    assert cycles(0, 0, 0, True, False, clear=4) == nothing + 10 + 4 * 11 + 3


def test_a_kernel_of_another_shape_is_refused(benchmark_module, schedule, tmp_path):
    write(tmp_path, "ours", 45, {10: 30, 35: 5}, [16])
    with pytest.raises(ValueError, match="this benchmark knows"):
        benchmark_module.LoopKernel(schedule.read_kernels(tmp_path, "v6e")["ours"])


def test_packed_documents_visit_the_tiles_where_they_meet(benchmark_module, loop_kernel):
    tiles = {}
    for name in ("forward", "dkv"):
        for documents, lengths in benchmark_module.DOCUMENTS.items():
            row = benchmark_module.our_sequence(loop_kernel, name, 8192, 128, (512, 512), lengths)
            tiles[name, documents] = (row["full_tiles"], row["masked_tiles"])
    for name in ("forward", "dkv"):
        assert tiles[name, "causal"] == (120, 16)
        assert tiles[name, "8 equal"] == (8, 16)
        assert sum(tiles[name, "8 unequal"]) < 16 * 17 / 4


def test_without_the_compiler_it_says_what_to_install(benchmark_module, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["attention_schedule.py"])
    with pytest.raises(SystemExit) as stop:
        benchmark_module.main()
    assert stop.value.code == 2
    assert "jaxtrain[tpu]" in capsys.readouterr().err


@pytest.mark.parametrize("tile", ["512", "500x512", "0x128", "512x3072"])
def test_tiles_that_do_not_fit_are_refused(benchmark_module, monkeypatch, capsys, tile):
    monkeypatch.setattr(sys, "argv", ["attention_schedule.py", "--tiles", tile])
    with pytest.raises(SystemExit):
        benchmark_module.main()
    assert "multiples of 128" in capsys.readouterr().err
