"""Rotary position embeddings (RoFormer, 2104.09864) and the ways to stretch them to longer contexts."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

SCALINGS = ("none", "linear", "ntk", "llama3", "yarn")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """How positions turn queries and keys.

    theta: base of the geometric series of wavelengths.
    scaling: "none"; "linear" divides positions by ``factor`` (2306.15595); "ntk" raises theta to
        ``theta * factor ** (H / (H - 2))`` so that only the slow dimensions stretch; "llama3" interpolates by
        wavelength (Llama 3.1, 2407.21783); "yarn" interpolates by wavelength and sharpens attention (2309.00071).
    factor: longer context over the original one.
    original_max_positions: the context the model was first trained on (llama3 and yarn).
    low_freq_factor, high_freq_factor: llama3's band, in turns per original context.
    beta_fast, beta_slow: yarn's band, likewise.
    """

    theta: float = 10000.0
    scaling: str = "none"
    factor: float = 1.0
    original_max_positions: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0

    def __post_init__(self):
        if self.scaling not in SCALINGS:
            raise ValueError(f"Rope.scaling is {self.scaling!r}; one of {SCALINGS}")
        if self.theta <= 0 or self.factor < 1:
            raise ValueError(f"Rope needs theta > 0 and factor >= 1, found {self.theta} and {self.factor}")
        if self.scaling == "none" and self.factor != 1:
            raise ValueError(f"Rope.factor is {self.factor}, but Rope.scaling is 'none'")
        if self.scaling in ("llama3", "yarn") and self.original_max_positions < 1:
            raise ValueError(f"Rope.scaling {self.scaling!r} needs Rope.original_max_positions")


def inverse_wavelengths(rope: Rope, head_dim: int) -> tuple[np.ndarray, float]:
    """Radians per position, float64 ``[head_dim / 2]``, and the factor on cosine and sine (1 but for yarn)."""
    exponents = np.arange(0, head_dim, 2) / head_dim
    inverse = rope.theta**-exponents
    if rope.scaling == "linear":
        return inverse / rope.factor, 1.0
    if rope.scaling == "ntk":
        return (rope.theta * rope.factor ** (head_dim / (head_dim - 2))) ** -exponents, 1.0
    if rope.scaling == "llama3":
        turns = rope.original_max_positions * inverse / (2 * math.pi)
        smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        keep = np.clip(smooth, 0.0, 1.0)
        return inverse * (keep + (1 - keep) / rope.factor), 1.0
    if rope.scaling == "yarn":

        def dimension(turns: float) -> float:
            wavelength = rope.original_max_positions / (turns * 2 * math.pi)
            return head_dim * math.log(wavelength) / (2 * math.log(rope.theta))

        low = max(math.floor(dimension(rope.beta_fast)), 0)
        high = min(math.ceil(dimension(rope.beta_slow)), head_dim - 1)
        ramp = np.clip((np.arange(head_dim // 2) - low) / max(high - low, 1e-3), 0.0, 1.0)
        return inverse * (1 - ramp + ramp / rope.factor), 0.1 * math.log(rope.factor) + 1.0
    return inverse, 1.0


def rope_tables(rope: Rope, positions_BT: jax.Array, head_dim: int) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine, float32 ``[B, T, 1, H / 2]``.  bfloat16 would lose whole turns at long positions."""
    inverse, amplitude = inverse_wavelengths(rope, head_dim)
    angles = positions_BT.astype(jnp.float32)[..., None, None] * jnp.asarray(inverse, jnp.float32)
    return jnp.cos(angles) * amplitude, jnp.sin(angles) * amplitude


def apply_rope(x_BTNH: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turns pairs (i, i + H/2), the half-split layout of Hugging Face's Llama, in float32."""
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BTNH.dtype)
