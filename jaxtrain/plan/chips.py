"""What each kind of chip can do: the one table of constants that plans are made with, and the names of slices.

Sources, by letter in the table:

- C: Google Cloud's pages of each kind (docs.cloud.google.com/tpu/docs/v4, v5e, v5p, v6e, tpu7x): peak FLOPs, HBM and
  its bandwidth, chips a host, DCN of tpu7x.
- S: "How to Scale Your Model" (jax-ml.github.io/scaling-book/tpus, "TPU specs"): interconnect a link and direction, DCN
  a chip, and where a torus closes (a whole axis of 16 on v5e and v6e, axes that are multiples of 4 elsewhere).
- L: what libtpu's compiler said was "available HBM" when it refused a program that was too large (libtpu 0.0.42 and
  0.0.50; v4 with its two cores as one device, as jobs run there).
- N: NVIDIA's data sheets of A100 80GB SXM, H100 SXM and H200 SXM (dense bfloat16), and of DGX A100 and DGX H100: links
  within a host, and 8 x 200 or 400 Gb/s between hosts.
"""

from __future__ import annotations

import dataclasses
import math
import re

GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One kind of chip.  Rates are per chip and second, bytes are bytes.

    flops: peak bfloat16 operations of the matrix units.  hbm_bytes: of the data sheet.  usable_bytes: what a program
        may take; of GPUs, JAX's default share of the memory (XLA_PYTHON_CLIENT_MEM_FRACTION, 0.75).
    hbm_rate: of the memory.
    link_rate: of one interconnect link in one direction; of a GPU, of all its links to the switch in one direction.
    torus: dimensions of the interconnect, with two links each; 0: a switch that joins the chips of a host.
    whole_axis: a torus axis closes where its length is a multiple of this.
    network_rate: into the data-centre network.  chips_per_host: that share a host.
    devices: JAX devices of one chip; memory and rates are split among them.
    topology: options that make libtpu describe it so.
    """

    name: str
    flops: float
    hbm_bytes: int
    usable_bytes: int
    hbm_rate: float
    link_rate: float
    torus: int
    whole_axis: int
    network_rate: float
    chips_per_host: int
    devices: int = 1
    topology: tuple[tuple[str, str], ...] = ()

    @property
    def is_tpu(self) -> bool:
        return self.torus > 0


def _tpu(name, tflops, hbm, usable, hbm_rate, link, torus, whole, network, host, **more) -> Chip:
    return Chip(
        name=name,
        flops=tflops * 1e12,
        hbm_bytes=hbm * GIB,
        usable_bytes=int(usable * GIB),
        hbm_rate=hbm_rate * 1e9,
        link_rate=link * 1e9,
        torus=torus,
        whole_axis=whole,
        network_rate=network * 1e9,
        chips_per_host=host,
        **more,
    )


def _gpu(name, tflops, hbm, hbm_rate, link, network) -> Chip:
    return Chip(
        name=name,
        flops=tflops * 1e12,
        hbm_bytes=int(hbm * 1e9),
        usable_bytes=int(0.75 * hbm * 1e9),
        hbm_rate=hbm_rate * 1e9,
        link_rate=link * 1e9,
        torus=0,
        whole_axis=1,
        network_rate=network * 1e9,
        chips_per_host=8,
    )


MEGACORE = (("chip_config_name", "megacore"),)
CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        # TFLOP/s (C), HBM GiB (C), usable GiB (L), HBM GB/s (C), link GB/s (S), torus and its closing (S),
        # DCN GB/s (S), chips a host (C)
        _tpu("v4", 275, 32, 30.75, 1228, 45, 3, 4, 6.25, 4, topology=MEGACORE),
        _tpu("v5e", 197, 16, 15.75, 819, 45, 2, 16, 3.125, 8),
        _tpu("v5p", 459, 95, 95.74, 2765, 90, 3, 4, 6.25, 4),
        _tpu("v6e", 918, 32, 31.25, 1638, 90, 2, 16, 12.5, 8),
        _tpu("tpu7x", 2307, 192, 2 * 94.75, 7380, 90, 3, 4, 12.5, 4, devices=2),
        # TFLOP/s, HBM GB, HBM GB/s, NVLink GB/s, network GB/s (all N)
        _gpu("a100", 312, 80, 2039, 300, 25),
        _gpu("h100", 989, 80, 3350, 450, 50),
        _gpu("h200", 989, 141, 4800, 450, 50),
    )
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slice:
    """Chips of one kind that are joined.

    shape: chips along each dimension of the torus; of GPUs, (their number,).
    slices: how many of them, joined by the data-centre network.
    """

    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chips(self) -> int:
        return math.prod(self.shape) * self.slices

    @property
    def devices(self) -> int:
        """JAX devices of all slices."""
        return self.chips * self.chip.devices

    @property
    def name(self) -> str:
        """As libtpu names one slice, ``v5p:4x4x4``."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    def links(self, size: int) -> int:
        """Links a chip has along a dimension of the torus: two where it closes, one where it is a line."""
        if size == 1:
            return 0
        return 2 if size % self.chip.whole_axis == 0 else 1


def parse_topology(text: str) -> Slice:
    """``v5p:4x4x4``, ``v5e:16x16``, ``h100:64``, or ``2*v5e:16x16`` for two slices.

    Raises ValueError, saying what a name looks like, for anything else.
    """
    found = re.fullmatch(r"(?:(\d+)\*)?(\w+):(\d+(?:x\d+)*)", text.strip().lower())
    kinds = ", ".join(CHIPS)
    if not found or found[2] not in CHIPS:
        raise ValueError(
            f"--topology {text!r}: expected KIND:SHAPE such as v5p:4x4x4, v5e:16x16, h100:64 or 2*v5e:16x16 (two "
            f"slices); kinds are {kinds}"
        )
    chip, shape = CHIPS[found[2]], tuple(int(size) for size in found[3].split("x"))
    wanted = max(chip.torus, 1)
    if len(shape) != wanted or min(shape) < 1:
        raise ValueError(
            f"--topology {text!r}: {chip.name} has {wanted} dimension{'s' if wanted > 1 else ''}, found {len(shape)}: "
            f"{'x'.join(map(str, shape))}"
        )
    slices = int(found[1] or 1)
    if slices < 1:
        raise ValueError(f"--topology {text!r}: there must be at least one slice")
    return Slice(chip=chip, shape=shape, slices=slices)
