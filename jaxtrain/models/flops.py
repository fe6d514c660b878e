"""Floating-point operations that a model's mathematics asks for, counted by hand."""

from __future__ import annotations

from typing import Any

from jaxtrain.models.attention import AttentionSpec
from jaxtrain.models.decoder_config import DecoderConfig
from jaxtrain.models.layers import MLPSpec


def forward_flops_per_token(config: DecoderConfig, seq_len: int) -> float:
    """Forward FLOPs a token, averaged over a row of ``seq_len`` tokens of one segment; a multiply-add is 2.

    Matrix products and causal attention; lookups, biases, norms, activations and softmax are left out.  The sum over
    ``config.spec().layers()`` of both parts and over the heads.  A part that is neither an ``AttentionSpec`` nor an
    ``MLPSpec`` says itself what it takes: ``spec.flops_per_token(d_model, seq_len)``.
    """
    D = config.d_model
    layers = sum(
        part_flops_per_token(layer.attention, D, seq_len) + part_flops_per_token(layer.mlp, D, seq_len)
        for layer in config.spec().layers()
    )
    return layers + head_flops_per_token(config)


def head_flops_per_token(config: DecoderConfig) -> float:
    """The share of a model's heads in ``forward_flops_per_token``."""
    D = config.d_model
    return sum({"lm": 2 * D * config.vocab_size, "reward": 2 * D, "value": 2 * D}[head] for head in config.heads)


def train_flops_per_token(config: DecoderConfig, seq_len: int) -> float:
    """Forward and backward: three times the forward pass.  What remat computes again is not counted."""
    return 3 * forward_flops_per_token(config, seq_len)


def seen_keys(seq_len: int, window: int = 0) -> float:
    """How many keys a token of a causal row sees, itself included, on average: token t sees ``min(t, window)``."""
    if not 0 < window < seq_len:
        return (seq_len + 1) / 2
    return window - window * (window - 1) / (2 * seq_len)


def part_flops_per_token(spec: Any, d_model: int, seq_len: int) -> float:
    """Forward FLOPs a token of one part of a layer, see ``forward_flops_per_token``."""
    if isinstance(spec, AttentionSpec):
        N, K, H = spec.num_heads, spec.num_kv_heads, spec.head_dim
        return 2 * d_model * H * (2 * N + 2 * K) + 2 * 2 * N * H * seen_keys(seq_len, spec.window)
    if isinstance(spec, MLPSpec):
        return 2 * (3 if spec.gated else 2) * d_model * spec.d_ff
    return spec.flops_per_token(d_model, seq_len)
