"""Names of slices, and the table of chips."""

from __future__ import annotations

import pytest

from jaxtrain.plan.chips import CHIPS, GIB, parse_topology


@pytest.mark.parametrize(
    ("text", "chips", "devices", "links"),
    [
        ("v5p:4x4x4", 64, 64, 6),
        ("v5p:2x2x1", 4, 4, 2),  # lines of two
        ("v5p:4x4x8", 128, 128, 6),
        ("v5e:16x16", 256, 256, 4),
        ("v5e:4x8", 32, 32, 2),  # closes only at 16
        ("tpu7x:4x4x4", 64, 128, 6),
        ("2*v5e:16x16", 512, 512, 4),
    ],
)
def test_slices(text, chips, devices, links):
    found = parse_topology(text)
    assert (found.chips, found.devices) == (chips, devices)
    assert sum(found.links(size) for size in found.shape) == links


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("v5p", "KIND:SHAPE"),
        ("v9:4x4", "kinds are v4, v5e"),
        ("v5p:4x4", "3 dimensions, found 2"),
        ("v5e:4x4x4", "2 dimensions, found 3"),
        ("h100:8x8", "1 dimension, found 2"),
        ("v5p:0x4x4", "v5p:0x4x4"),
        ("0*v5e:4x4", "at least one slice"),
    ],
)
def test_other_names_are_refused(text, complaint):
    with pytest.raises(ValueError, match="--topology") as error:
        parse_topology(text)
    assert complaint in str(error.value)


def test_names():
    assert parse_topology("H100:64").chips == 64
    assert parse_topology("2*V5E:16x16").name == "v5e:16x16"


def test_no_chip_lets_programs_take_much_more_than_it_has():
    # v5p's data sheet rounds down.
    assert all(0.7 < chip.usable_bytes / chip.hbm_bytes < 1.01 for chip in CHIPS.values())
    assert CHIPS["v5e"].usable_bytes == 15.75 * GIB
    assert all(chip.flops > 100 * chip.hbm_rate > 1e3 * chip.network_rate for chip in CHIPS.values())
