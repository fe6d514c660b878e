"""Multi-head latent attention (DeepSeek-V2, 2405.04434): keys and values are read from one small vector a token.

Training expands the latent into keys and values of every head.  Decoding moves the expansion to the other side of
both products: queries are brought into the latent's space, and what attention says there is read out for values, so
that the cache is latents and nothing is ever expanded for a token that has been read.

Letters: B rows, T tokens, S cache slots, D model width, N heads, C size of the latent, R rotated part of queries and
keys, P their part without positions, H = P + R, V size of values.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtrain.kernels.attention import api
from jaxtrain.models.cache import Entry, slot_positions, write
from jaxtrain.models.layers import Linear, NormSpec, linear_kinds
from jaxtrain.models.rope import Rope, apply_rope
from jaxtrain.types import Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentSpec:
    """One layer's latent attention.

    query_rank: size of the latent that queries are read from; 0: they are read from the residual stream.
    latent_size: C.  plain_dim, rope_dim, value_dim: P, R and V of every head.
    bias: on what reads the residual stream and on the output.
    norm: of the latents.
    """

    num_heads: int
    query_rank: int
    latent_size: int
    plain_dim: int
    rope_dim: int
    value_dim: int
    rope: Rope
    bias: bool = False
    norm: NormSpec = NormSpec()

    @property
    def scale(self) -> float:
        """Of the logits: ``H ** -0.5``, times the square of yarn's factor where ``rope`` has one for all dimensions."""
        return (self.plain_dim + self.rope_dim) ** -0.5 * self.rope.logit_scale()

    def build(self, config: Any, rngs: nnx.Rngs) -> nnx.Module:
        return LatentAttention(self, config, rngs)

    def flops_per_token(self, d_model: int, seq_len: int) -> float:
        """See ``flops.forward_flops_per_token``; with keys and values expanded, as in training."""
        N, C, Q, R, V = self.num_heads, self.latent_size, self.query_rank, self.rope_dim, self.value_dim
        H = self.plain_dim + R
        queries = Q * (d_model + N * H) if Q else d_model * N * H
        matrices = queries + d_model * (C + R) + C * N * (self.plain_dim + V) + N * V * d_model
        return 2 * matrices + 2 * N * (H + V) * (seq_len + 1) / 2

    def rope_table(self) -> tuple[Rope, int]:
        """Which table of ``rope.rope_tables`` this layer reads: its Rope, and the size of what is rotated."""
        return self.rope, self.rope_dim

    def cache_shapes(self, length: int) -> dict[str, tuple[int, ...]]:
        """A row's part of every array of the layer's cache, for texts of up to ``length`` tokens."""
        return {"latent": (1, length, self.latent_size), "rope_key": (1, length, self.rope_dim)}


class LatentAttention(nnx.Module):
    """See ``LatentSpec``."""

    def __init__(self, spec: LatentSpec, config: Any, rngs: nnx.Rngs):
        D, N, C, R = config.d_model, spec.num_heads, spec.latent_size, spec.rope_dim
        P, V, Q = spec.plain_dim, spec.value_dim, spec.query_rank
        kinds = linear_kinds(config)
        reads = dict(std=D**-0.5, bias=spec.bias, **kinds)
        if Q:
            self.query_down = Linear(rngs, (D,), (Q,), ("embed", "rank"), **reads)
            self.query_norm = spec.norm.build(Q, config.param_dtype)
            names = ("rank_inputs", "q_heads", "head_dim")
            self.query_up = Linear(rngs, (Q,), (N, P + R), names, std=Q**-0.5, **kinds)
        else:
            self.query = Linear(rngs, (D,), (N, P + R), ("embed", "q_heads", "head_dim"), std=D**-0.5, **kinds)
        self.latent = Linear(rngs, (D,), (C,), ("embed", "rank"), **reads)
        self.latent_norm = spec.norm.build(C, config.param_dtype)
        self.rope_key = Linear(rngs, (D,), (R,), ("embed", "rank"), **reads)
        names = ("rank_inputs", "q_heads", "head_dim")
        self.expand = Linear(rngs, (C,), (N, P + V), names, std=C**-0.5, **kinds)
        outer = dict(std=(N * V * 2 * config.num_layers) ** -0.5, bias=spec.bias, **kinds)
        self.out = Linear(rngs, (N, V), (D,), ("q_heads", "head_dim", "embed"), **outer)
        self.spec = spec
        self.backend = config.attention

    def __call__(self, x, *, ropes, positions, segments, constrain, cache=None):
        """``x``: ``[B, T, D]`` or ``[B * T, D]``, and so is the first result; the second is the layer's new cache.

        ropes: tables by ``LatentSpec.rope_table``.
        cache: (the layer's ``Entry``, int32 ``[B]`` tokens read before), or None to attend within x.
        """
        spec, rope, shape = self.spec, ropes[self.spec.rope_table()], positions.shape
        q = self.query_up(self.query_norm(self.query_down(x))) if spec.query_rank else self.query(x)
        q_BTNH = constrain(q.reshape(*shape, *q.shape[-2:]), ("batch", "sequence", "act_heads", None))
        plain_BTNP, turned_BTNR = jnp.split(q_BTNH, (spec.plain_dim,), axis=-1)
        turned_BTNR = apply_rope(turned_BTNR, *rope)
        latent_BTC = self.latent_norm(self.latent(x)).reshape(*shape, -1)
        rope_BTR = apply_rope(self.rope_key(x).reshape(*shape, 1, -1), *rope)[:, :, 0]
        if cache is None:
            keys, held, entry = (latent_BTC, rope_BTR), (positions, segments), None
        else:
            old, lengths = cache
            new = {"latent": latent_BTC[:, None], "rope_key": rope_BTR[:, None]}
            slots = old["latent"].shape[2]
            entry = {name: write(old[name], new[name], positions, segments) for name in new} if slots else new
            if shape[1] == 1 and slots:
                out_BNV = self.decode(plain_BTNP[:, 0], turned_BTNR[:, 0], entry, segments, lengths)
                return self.out(out_BNV.reshape(*x.shape[:-1], *out_BNV.shape[-2:])), entry
            keys, held = (latent_BTC, rope_BTR), (positions, segments)
            if slots:
                held_BS = slot_positions(lengths, slots)
                # What a row has read is of the same segment as what it reads now.
                seen_BS = (held_BS >= 0) * jnp.max(segments, axis=1, keepdims=True)
                keys = tuple(
                    jnp.concatenate([old[name][:, 0].astype(k.dtype), k], axis=1)
                    for name, k in zip(("latent", "rope_key"), keys, strict=True)
                )
                held = tuple(jnp.concatenate(pair, axis=1) for pair in ((held_BS, positions), (seen_BS, segments)))
        out_BTNV = self.attend(plain_BTNP, turned_BTNR, *keys, positions, segments, *held, constrain.rules)
        return self.out(out_BTNV.reshape(*x.shape[:-1], *out_BTNV.shape[-2:])), entry

    def attend(
        self, plain_BTNP, turned_BTNR, latent_BSC, rope_BSR, positions, segments, k_positions, k_segments, rules
    ):
        """With keys and values of every head, ``[B, T, N, V]``."""
        spec = self.spec
        plain_BSNP, v_BSNV = jnp.split(self.expand(latent_BSC), (spec.plain_dim,), axis=-1)
        rope_BSNR = jnp.broadcast_to(rope_BSR[:, :, None], (*plain_BSNP.shape[:-1], spec.rope_dim))
        return api.attention(
            jnp.concatenate([plain_BTNP, turned_BTNR], axis=-1),
            jnp.concatenate([plain_BSNP, rope_BSNR], axis=-1),
            v_BSNV,
            q_positions=positions,
            k_positions=k_positions,
            q_segments=segments,
            k_segments=k_segments,
            in_order=latent_BSC.shape[1] == plain_BTNP.shape[1],
            scale=spec.scale,
            backend=self.backend,
            rules=rules,
        )

    def decode(self, plain_BNP: Array, turned_BNR: Array, entry: Entry, segments: Array, lengths: Array) -> Array:
        """One token a row, which the cache already holds, in the latent's space, ``[B, N, V]``."""
        spec = self.spec
        kernel_CNE = self.expand.kernel[...].astype(plain_BNP.dtype)
        keys_CNP, values_CNV = jnp.split(kernel_CNE, (spec.plain_dim,), axis=-1)
        latent_BSC, rope_BSR = entry["latent"][:, 0], entry["rope_key"][:, 0]
        held_BS = slot_positions(lengths + (segments[:, 0] > 0), latent_BSC.shape[1])
        visible_BS = (held_BS >= 0) & (segments > 0)
        scale = jnp.asarray(spec.scale, plain_BNP.dtype)
        query_BNC = jnp.einsum("bnp,cnp->bnc", plain_BNP * scale, keys_CNP)
        logits_BNS = jnp.einsum("bnc,bsc->bns", query_BNC, latent_BSC, preferred_element_type=jnp.float32)
        logits_BNS += jnp.einsum("bnr,bsr->bns", turned_BNR * scale, rope_BSR, preferred_element_type=jnp.float32)
        logits_BNS = jnp.where(visible_BS[:, None], logits_BNS, -math.inf)
        # A row of padding sees nothing: no NaN from it.
        top_BN1 = jax.lax.stop_gradient(jnp.max(logits_BNS, axis=-1, keepdims=True, initial=-1e30))
        weights_BNS = jnp.exp(logits_BNS - top_BN1)
        weights_BNS /= jnp.maximum(jnp.sum(weights_BNS, axis=-1, keepdims=True), 1e-30)
        read_BNC = jnp.einsum("bns,bsc->bnc", weights_BNS.astype(latent_BSC.dtype), latent_BSC)
        return jnp.einsum("bnc,cnv->bnv", read_BNC.astype(values_CNV.dtype), values_CNV)
