"""Every test runs on eight virtual CPU devices, in float32 with exact matrix products."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    # On a busy machine a device may come later than the 40 s after which XLA aborts the process.
    devices = "--xla_force_host_platform_device_count=8 --xla_cpu_collective_call_terminate_timeout_seconds=1200"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {devices}".strip()
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")  # tests read XLA's warnings
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import pytest

jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Every compiled program holds a few memory maps, and Linux gives a process 65,530: XLA aborts without them."""
    yield
    jax.clear_caches()
