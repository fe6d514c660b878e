"""What a program is traced for: the devices of the current mesh, or else this process's own."""

from __future__ import annotations

import jax


def target() -> tuple[str, str]:
    """Platform ("cpu", "tpu", "gpu") and kind ("TPU v5 lite", "NVIDIA H100 80GB HBM3") of the devices traced for.

    The mesh comes first: a program may be compiled ahead of time for devices that this machine does not have.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        return {"cuda": "gpu"}.get(device.platform, device.platform), device.device_kind
    own = jax.devices()[0]
    return own.platform, own.device_kind
