"""Floating-point operations that a model's mathematics asks for, counted by hand."""

from __future__ import annotations

from jaxtrain.models.decoder import DecoderConfig


def forward_flops_per_token(config: DecoderConfig, seq_len: int) -> float:
    """Forward FLOPs a token, averaged over a row of ``seq_len`` tokens of one segment; a multiply-add is 2.

    Matrix products and causal attention (a token sees (T + 1) / 2 keys on average); lookups, norms and softmax are
    left out.
    """
    D, N, K, H, F = config.d_model, config.num_heads, config.num_kv_heads, config.head_dim, config.d_ff
    projections = 2 * D * H * (2 * N + 2 * K)
    attention = 2 * 2 * N * H * (seq_len + 1) / 2
    mlp = 2 * 3 * D * F
    heads = sum({"lm": 2 * D * config.vocab_size, "reward": 2 * D, "value": 2 * D}[head] for head in config.heads)
    return config.num_layers * (projections + attention + mlp) + heads


def train_flops_per_token(config: DecoderConfig, seq_len: int) -> float:
    """Forward and backward: three times the forward pass.  What remat computes again is not counted."""
    return 3 * forward_flops_per_token(config, seq_len)
