"""DeepSeek-V3 (2412.19437): latent attention, sigmoid routing, shared experts, and further tokens predicted."""

from __future__ import annotations

import dataclasses
import functools

from jaxtrain.models.balance import BalanceSpec
from jaxtrain.models.decoder_config import DecoderSpec, LayerSpec
from jaxtrain.models.latent import LatentSpec
from jaxtrain.models.layers import MLPSpec, NormSpec
from jaxtrain.models.moe import MoESpec
from jaxtrain.models.mtp import MTPSpec
from jaxtrain.models.sparse import MoEConfig

# Of the latents, whatever ``norm_eps`` is.
LATENT_EPS = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeepseekV3Config(MoEConfig):
    """d_ff: width of the MLP of the first ``num_dense_layers`` layers.  expert_d_ff: width of an expert.

    query_rank, latent_size, plain_dim, rope_dim, value_dim: see ``LatentSpec``; ``head_dim`` is their sum of plain and
        rope, and ``num_kv_heads`` must be ``num_heads``.
    attention_bias: on what reads the residual stream, and on the output.
    shared_experts: how many experts every token takes besides; one MLP of that many times ``expert_d_ff``.
    groups, top_groups, renormalize, routed_scale: see ``MoESpec``.
    router_bias_rate: how far an update moves the bias of an expert with too much or too little to do (the paper's
        gamma, 0.001).
    mtp_layers: further tokens predicted in training; 0: none.  mtp_coef: of their loss (the paper's lambda).
    """

    expert_d_ff: int
    latent_size: int
    plain_dim: int
    rope_dim: int
    value_dim: int
    query_rank: int = 0
    attention_bias: bool = False
    num_dense_layers: int = 0
    shared_experts: int = 1
    groups: int = 1
    top_groups: int = 1
    renormalize: bool = True
    routed_scale: float = 1.0
    router_bias_rate: float = 0.001
    mtp_layers: int = 0
    mtp_coef: float = 0.3
    tie_embeddings: bool = False

    def __post_init__(self):
        for name in ("expert_d_ff", "latent_size", "plain_dim", "rope_dim", "value_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, found {getattr(self, name)}")
        for name in ("query_rank", "shared_experts", "mtp_layers"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, found {getattr(self, name)}")
        if not 0 <= self.num_dense_layers < self.num_layers:
            raise ValueError(
                f"num_dense_layers={self.num_dense_layers} must leave one of the {self.num_layers} layers to experts"
            )
        if self.rope_dim % 2:
            raise ValueError(f"rope_dim={self.rope_dim} must be even: RoPE turns pairs")
        if self.num_kv_heads != self.num_heads:
            raise ValueError(
                f"num_kv_heads={self.num_kv_heads}, but every one of the {self.num_heads} heads has its own"
            )
        if self.head_dim not in (0, self.plain_dim + self.rope_dim):
            raise ValueError(f"head_dim={self.head_dim} must be plain_dim + rope_dim, or 0 to follow from them")
        if self.qk_norm:
            raise ValueError("qk_norm is not a part of latent attention, whose latents are normalised")
        object.__setattr__(self, "head_dim", self.plain_dim + self.rope_dim)
        super().__post_init__()

    def balance_spec(self) -> BalanceSpec:
        return dataclasses.replace(super().balance_spec(), bias_rate=self.router_bias_rate)

    def layer_spec(self, *, dense: bool = False) -> LayerSpec:
        attention = LatentSpec(
            num_heads=self.num_heads,
            query_rank=self.query_rank,
            latent_size=self.latent_size,
            plain_dim=self.plain_dim,
            rope_dim=self.rope_dim,
            value_dim=self.value_dim,
            rope=self.rope,
            bias=self.attention_bias,
            norm=NormSpec(eps=LATENT_EPS),
        )
        experts = MoESpec(
            num_experts=self.num_experts,
            top_k=self.top_k,
            d_ff=self.expert_d_ff,
            scores="sigmoid",
            renormalize=self.renormalize,
            scale=self.routed_scale,
            bias=True,
            groups=self.groups,
            top_groups=self.top_groups,
            shared_d_ff=self.shared_experts * self.expert_d_ff,
            capacity_factor=self.capacity_factor,
            sequence_balance=self.sequence_balance_coef > 0,
        )
        return LayerSpec(attention=attention, mlp=MLPSpec(d_ff=self.d_ff) if dense else experts, norm=self.norm())

    @functools.cache  # noqa: B019  (as many as there are configs)
    def spec(self) -> DecoderSpec:
        stacks = {"layers": (self.layer_spec(),) * (self.num_layers - self.num_dense_layers)}
        if self.num_dense_layers:
            stacks = {"dense_layers": (self.layer_spec(dense=True),) * self.num_dense_layers, **stacks}
        mtp = MTPSpec(depth=self.mtp_layers, coefficient=self.mtp_coef) if self.mtp_layers else None
        return dataclasses.replace(super().spec(), stacks=stacks, mtp=mtp)
