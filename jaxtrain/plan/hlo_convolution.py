"""Operations of a convolution, as which TPUs' compiler writes products of matrices."""

from __future__ import annotations

import functools
import re

import numpy as np


def convolution_flops(left: tuple[int, ...], right: tuple[int, ...], out: tuple[int, ...], attributes: str) -> float:
    """2 FLOPs for every product of an element of the input with one of the kernel: padding and dilation have none.

    TPUs' compiler writes products of matrices as convolutions, batches of them as windows that meet one element each.
    """
    inputs, kernel, outputs = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", attributes).groups()
    window = dict(re.findall(r"(\w+)=([\dx_-]+)", (re.search(r"window=\{([^}]*)\}", attributes) or ["", ""])[1]))
    groups = {
        kind: int(found[1]) if (found := re.search(rf"{kind}_group_count=(\d+)", attributes)) else 1
        for kind in ("feature", "batch")
    }
    total = (
        left[inputs.index("f")]
        / groups["feature"]
        * out[outputs.index("f")]
        * left[inputs.index("b")]
        / groups["batch"]
    )
    for number in range(len(left) - 2):

        def setting(name: str, default: str, number: int = number) -> str:
            return window[name].split("x")[number] if name in window else default

        low = int(setting("pad", "0_0").split("_")[0])
        total *= _meetings(
            left[inputs.index(str(number))],
            right[kernel.index(str(number))],
            out[outputs.index(str(number))],
            int(setting("stride", "1")),
            low,
            int(setting("lhs_dilate", "1")),
            int(setting("rhs_dilate", "1")),
        )
    return 2.0 * total


@functools.cache
def _meetings(size: int, kernel: int, out: int, stride: int, low: int, dilate: int, kernel_dilate: int) -> int:
    """How many pairs of a place of the output and one of the kernel meet an element of the input, in one dimension."""
    places = np.arange(out) * stride - low
    count = 0
    for k in range(kernel):
        at = places + k * kernel_dilate
        count += int(((at >= 0) & (at % dilate == 0) & (at < size * dilate)).sum())
    return count
