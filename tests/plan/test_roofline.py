"""Times by hand: what runs at once, and what waits."""

from __future__ import annotations

import pytest

from jaxtrain.plan.chips import CHIPS, parse_topology
from jaxtrain.plan.hlo import Collective, Done, Loop, Start, Work
from jaxtrain.plan.roofline import KERNEL_SHARE, Network, table_of_collectives, walk_times

V5P = CHIPS["v5p"]
NETWORK = Network(parse_topology("v5p:4x4x4"), {"data": 4, "fsdp": 16})
# A second each.
MATMUL, READ = Work("m", flops=V5P.flops), Work("r", bytes=V5P.hbm_rate)
GATHER = Collective("all-gather", 16 / 15 * 4 * V5P.link_rate, ("fsdp",), 16)


def test_an_instruction_takes_as_long_as_its_slower_part():
    both = Work("b", flops=V5P.flops, bytes=3 * V5P.hbm_rate)
    times = walk_times((MATMUL, READ, both), NETWORK)
    assert (times.matmul, times.memory, times.seconds) == (1, 1 + 3, 5)


def test_kernels_run_at_their_share():
    times = walk_times((Work("k", flops=V5P.flops, kernel=True),), NETWORK)
    assert times.kernels == times.seconds == 1 / KERNEL_SHARE


def test_what_overlaps_costs_only_the_rest():
    assert NETWORK.seconds(GATHER) == pytest.approx(1)
    half = Work("h", flops=V5P.flops / 2)
    waited = walk_times((Start("a", GATHER, False), MATMUL), NETWORK)
    assert (waited.exposed, waited.seconds) == pytest.approx((1, 2))
    behind = walk_times((Start("a", GATHER, True), half, Done("a")), NETWORK)
    assert (behind.exposed, behind.collectives, behind.seconds) == pytest.approx((0.5, 1, 1))
    long = walk_times((Start("a", GATHER, True), MATMUL, MATMUL, Done("a")), NETWORK)
    assert (long.exposed, long.seconds) == pytest.approx((0, 2))
    # Two at once share the links.
    two = (Start("a", GATHER, True), Start("b", GATHER, True), MATMUL, Done("a"), Done("b"))
    assert walk_times(two, NETWORK).seconds == pytest.approx(2)


def test_loops_multiply():
    body = (Start("a", GATHER, True), MATMUL, Done("a"))
    times = walk_times((Loop(7, body), READ), NETWORK)
    assert (times.matmul, times.collectives, times.exposed, times.seconds) == pytest.approx((7, 7, 0, 8))


@pytest.mark.parametrize(
    ("topology", "sizes", "axes", "links"),
    [
        ("v5p:4x4x4", {"data": 4, "fsdp": 16}, ("fsdp",), 4),
        ("v5p:4x4x4", {"data": 4, "fsdp": 16}, ("data",), 2),
        ("v5p:4x4x4", {"data": 4, "fsdp": 16}, ("data", "fsdp"), 6),
        ("v5p:4x4x4", {"data": 8, "fsdp": 8}, ("fsdp",), 1),  # parts of dimensions
        ("v5e:16x16", {"data": 16, "fsdp": 16}, ("fsdp",), 2),
        ("v5e:8x8", {"data": 8, "fsdp": 8}, ("fsdp",), 1),  # a line
    ],
)
def test_an_axis_has_the_links_of_its_dimensions(topology, sizes, axes, links):
    where = parse_topology(topology)
    assert Network(where, sizes).rate(axes) == links * where.chip.link_rate


def test_gpus_leave_their_host_by_its_network_cards():
    where = parse_topology("h100:64")
    assert Network(where, {"data": 8, "tensor": 8}).rate(("tensor",)) == where.chip.link_rate
    assert Network(where, {"data": 8, "tensor": 8}).rate(("data", "tensor")) == 8 * where.chip.network_rate


def test_slices_meet_over_the_network():
    network = Network(parse_topology("2*v5e:16x16"), {"data": 2, "fsdp": 256})
    assert network.rate(("data",)) == network.where.chip.network_rate
    assert network.rate(("fsdp",)) == 4 * network.where.chip.link_rate


def test_the_table_says_what_overlaps():
    small = Collective("all-reduce", 1e6, ("data",), 4)
    body = (Start("a", GATHER, True), MATMUL, Done("a"), Start("b", GATHER, True), Done("b"), Start("c", small, False))
    rows = table_of_collectives((Loop(3, body),), NETWORK)
    assert [(r["kind"], r["count"], r["asynchronous"], r["overlaps"]) for r in rows] == [
        ("all-gather", 3, True, True),
        ("all-gather", 3, True, False),
        ("all-reduce", 3, False, False),
    ]
    assert rows[0]["seconds"] == pytest.approx(3)
