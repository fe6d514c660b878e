"""Rotary position embeddings (RoFormer, 2104.09864) and the ways to stretch them to longer contexts."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

SCALINGS = ("none", "linear", "ntk", "llama3", "yarn", "longrope")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """How positions turn queries and keys.

    theta: base of the geometric series of wavelengths.
    scaling: "none"; "linear" divides positions by ``factor`` (2306.15595); "ntk" raises theta to
        ``theta * factor ** (H / (H - 2))`` so that only the slow dimensions stretch; "llama3" interpolates by
        wavelength (Llama 3.1, 2407.21783); "yarn" interpolates by wavelength and sharpens attention (2309.00071);
        "longrope" has a divisor for every pair, other ones in texts beyond the original context (2402.13753;
        ``Phi3Config`` alone, which says when).
    factor: longer context over the original one.
    fraction: the share of each head's dimensions, from the first, that is turned; the rest carries no position.
    original_max_positions: the context the model was first trained on (llama3, yarn and longrope).
    low_freq_factor, high_freq_factor: llama3's band, in turns per original context.
    beta_fast, beta_slow: yarn's band, likewise.
    mscale, mscale_all_dim: DeepSeek's way to sharpen attention under yarn, by ``m(a) = 0.1 * a * ln(factor) + 1``:
        cosine and sine by ``m(mscale) / m(mscale_all_dim)``, where both are given, and every logit by
        ``m(mscale_all_dim) ** 2``.
    short_factor, long_factor: longrope's divisors of the frequencies, one a turned pair, within and beyond the original
        context.  Equal ones make the rotation independent of the text's length.
    attention_factor: longrope's factor on cosine and sine; 0: ``sqrt(1 + ln(factor) / ln(original_max_positions))``.
    """

    theta: float = 10000.0
    scaling: str = "none"
    factor: float = 1.0
    fraction: float = 1.0
    original_max_positions: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    attention_factor: float = 0.0

    def __post_init__(self):
        if self.scaling not in SCALINGS:
            raise ValueError(f"Rope.scaling is {self.scaling!r}; one of {SCALINGS}")
        if self.theta <= 0 or self.factor < 1:
            raise ValueError(f"Rope needs theta > 0 and factor >= 1, found {self.theta} and {self.factor}")
        if self.scaling == "none" and self.factor != 1:
            raise ValueError(f"Rope.factor is {self.factor}, but Rope.scaling is 'none'")
        if not 0.0 < self.fraction <= 1.0:
            raise ValueError(f"Rope.fraction must be above 0 and at most 1, found {self.fraction}")
        if self.scaling in ("llama3", "yarn", "longrope") and self.original_max_positions < 1:
            raise ValueError(f"Rope.scaling {self.scaling!r} needs Rope.original_max_positions")
        if (self.mscale or self.mscale_all_dim) and self.scaling != "yarn":
            raise ValueError(f"Rope.mscale and mscale_all_dim belong to Rope.scaling 'yarn', found {self.scaling!r}")
        if self.scaling == "longrope":
            for name in ("short_factor", "long_factor"):
                if not getattr(self, name) or min(getattr(self, name)) <= 0:
                    raise ValueError(f"Rope.scaling 'longrope' needs Rope.{name}: a positive divisor for every pair")
            if len(self.short_factor) != len(self.long_factor):
                raise ValueError(
                    f"Rope.short_factor has {len(self.short_factor)} divisors, Rope.long_factor {len(self.long_factor)}"
                )
            if self.attention_factor == 0 and self.factor > 1 and self.original_max_positions < 2:
                raise ValueError("Rope.attention_factor does not follow from Rope.original_max_positions = 1; give it")
        elif self.short_factor or self.long_factor or self.attention_factor:
            raise ValueError(
                "Rope.short_factor, long_factor and attention_factor belong to Rope.scaling 'longrope', "
                f"found {self.scaling!r}"
            )

    def _sharpness(self, scale: float) -> float:
        return 0.1 * scale * math.log(self.factor) + 1.0

    def logit_scale(self) -> float:
        """What multiplies every attention logit besides: 1 but for DeepSeek's yarn.  ``LatentSpec`` alone reads it."""
        return self._sharpness(self.mscale_all_dim) ** 2

    def rotary_dim(self, head_dim: int) -> int:
        """How many of a head's dimensions are turned.  Raises ValueError where they do not make pairs, or where
        longrope has divisors for another number of pairs."""
        size = int(head_dim * self.fraction)
        if size < 2 or size % 2:
            raise ValueError(
                f"Rope.fraction={self.fraction} of head_dim={head_dim} is {size} dimensions; it must be even"
            )
        if self.scaling == "longrope" and len(self.short_factor) != size // 2:
            raise ValueError(
                f"Rope.short_factor and long_factor have {len(self.short_factor)} divisors, but a head of {head_dim} "
                f"has {size // 2} pairs to turn"
            )
        return size


def inverse_wavelengths(rope: Rope, head_dim: int, *, long: bool = False) -> tuple[np.ndarray, float]:
    """Radians per position, float64 ``[R / 2]`` for the R turned dimensions, and the factor on cosine and sine (1 but
    for yarn and longrope).

    long: whether the text is beyond ``rope.original_max_positions`` (longrope).
    """
    size = rope.rotary_dim(head_dim)
    exponents = np.arange(0, size, 2) / size
    inverse = rope.theta**-exponents
    if rope.scaling == "linear":
        return inverse / rope.factor, 1.0
    if rope.scaling == "ntk":
        return (rope.theta * rope.factor ** (size / (size - 2))) ** -exponents, 1.0
    if rope.scaling == "llama3":
        turns = rope.original_max_positions * inverse / (2 * math.pi)
        smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        keep = np.clip(smooth, 0.0, 1.0)
        return inverse * (keep + (1 - keep) / rope.factor), 1.0
    if rope.scaling == "yarn":

        def dimension(turns: float) -> float:
            wavelength = rope.original_max_positions / (turns * 2 * math.pi)
            return size * math.log(wavelength) / (2 * math.log(rope.theta))

        low = max(math.floor(dimension(rope.beta_fast)), 0)
        high = min(math.ceil(dimension(rope.beta_slow)), size - 1)
        ramp = np.clip((np.arange(size // 2) - low) / max(high - low, 1e-3), 0.0, 1.0)
        amplitude = rope._sharpness(1.0)
        if rope.mscale and rope.mscale_all_dim:
            amplitude = rope._sharpness(rope.mscale) / rope._sharpness(rope.mscale_all_dim)
        return inverse * (1 - ramp + ramp / rope.factor), amplitude
    if rope.scaling == "longrope":
        amplitude = rope.attention_factor
        if not amplitude and rope.factor > 1:
            amplitude = math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_max_positions))
        return inverse / np.asarray(rope.long_factor if long else rope.short_factor), amplitude or 1.0
    return inverse, 1.0


def rope_tables(
    rope: Rope, positions_BT: jax.Array, head_dim: int, *, long_BT: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine, float32 ``[B, T, 1, R / 2]``.  bfloat16 would lose whole turns at long positions.

    long_BT: bool, broadcast to ``[B, T]``: which tokens belong to texts beyond the original context (longrope).
    Raises ValueError for longrope without it.
    """
    inverse, amplitude = inverse_wavelengths(rope, head_dim)
    inverse = jnp.asarray(inverse, jnp.float32)
    if rope.scaling == "longrope":
        if long_BT is None:
            raise ValueError("Rope.scaling 'longrope' depends on the text's length, which Phi3Config alone looks at")
        beyond = jnp.asarray(inverse_wavelengths(rope, head_dim, long=True)[0], jnp.float32)
        inverse = jnp.where(long_BT[..., None, None], beyond, inverse)
    angles = positions_BT.astype(jnp.float32)[..., None, None] * inverse
    return jnp.cos(angles) * amplitude, jnp.sin(angles) * amplitude


def apply_rope(x_BTNH: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turns pairs (i, i + R/2), the half-split layout of Hugging Face's Llama, in float32; what lies beyond the R
    dimensions of the tables stays."""
    half = cos.shape[-1]
    first, second, rest = jnp.split(x_BTNH, (half, 2 * half), axis=-1)
    first, second = first.astype(jnp.float32), second.astype(jnp.float32)
    # Each half is cast by itself: the gradient of a cast of both would be all of it in float32, in memory.
    turned = [half.astype(x_BTNH.dtype) for half in (first * cos - second * sin, second * cos + first * sin)]
    return jnp.concatenate([*turned, rest] if rest.shape[-1] else turned, axis=-1)
