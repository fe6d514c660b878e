"""What a decoder is: the part of its configuration that families share, and what a config says of every layer."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax

from jaxtrain.kernels.attention.api import BACKENDS
from jaxtrain.kernels.cross_entropy import api as cross_entropy
from jaxtrain.models import quantize
from jaxtrain.models.attention import AttentionSpec
from jaxtrain.models.balance import BalanceSpec
from jaxtrain.models.layers import MLPSpec, NormSpec
from jaxtrain.models.mtp import MTPSpec
from jaxtrain.models.rope import Rope

HEADS = ("lm", "reward", "value")
REMAT = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}
# What a layer computes, by the names that ``remat_save`` and ``remat_offload`` know: its input; queries, keys and
# values as attention reads them; its output with its log-sum-exp, and that output's projection; the matrix products of
# the feed-forward part.
REMAT_ATTENTION = ("query", "key", "value", "attention", "attention_out")
REMAT_NAMES = ("stream", *REMAT_ATTENTION, "mlp_gate", "mlp_up", "mlp_out")


def remat_policy(config: Any) -> Any:
    """For ``jax.checkpoint``, by a config's remat fields."""
    if not (config.remat_save or config.remat_offload):
        policy = REMAT[config.remat]
        quantized = config.remat == "dots" and config.quantize != quantize.NONE
        return quantize.saves_products(policy) if quantized else policy
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=list(config.remat_save),
        names_which_can_be_offloaded=list(config.remat_offload),
        offload_src="device",
        offload_dst="pinned_host",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """One layer: attention, then a feed-forward part, each added to the residual stream.

    norms: "pre" normalises what either reads, "post" what either adds; Gemma does both.
    """

    attention: Any
    mlp: Any
    norm: NormSpec
    norms: tuple[str, ...] = ("pre",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderSpec:
    """What a config means.

    stacks: by name in the parameters, the layers from first to last; those of one stack have parameters of the same
        shapes, and may differ in window or positions.
    embed_scale: multiplies embeddings.  learned_positions: a table of position embeddings is added to them.
    final_softcap: ``softcap * tanh(logits / softcap)`` on the next-token logits; 0: unchanged.
    balance: what training adds where layers are mixtures of experts.  mtp: layers that predict further tokens in
        training, each like the last of ``stacks``.
    """

    stacks: dict[str, tuple[LayerSpec, ...]]
    norm: NormSpec
    embed_scale: float = 1.0
    learned_positions: bool = False
    final_softcap: float = 0.0
    balance: BalanceSpec = BalanceSpec()
    mtp: MTPSpec | None = None

    @property
    def pipelined(self) -> str:
        """The stack that pipeline stages share out: the longest."""
        return max(self.stacks, key=lambda name: len(self.stacks[name]))

    def layers(self) -> tuple[LayerSpec, ...]:
        """All layers, from first to last."""
        return tuple(layer for layers in self.stacks.values() for layer in layers)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Sizes and choices of a decoder.  By itself, a Llama-style one; families add fields and say what they mean.

    head_dim: 0 means ``d_model / num_heads``.  max_positions: the longest segment.  heads: which outputs exist,
    of "lm", "reward" and "value".  dropout: on the embedding and both residual branches, in training only.
    remat: "none" keeps every activation for the backward pass, "dots" the matrix products, "full" only each
    layer's input.  remat_save, remat_offload: of ``REMAT_NAMES``, what "full" keeps after all, on the device or in the
    host's memory.  scan_unroll: layers compiled in line per loop turn; more is faster to run, slower to compile.
    attention, cross_entropy: backends, see ``api.py`` of each in ``kernels``.
    quantize: "int8" or "fp8" computes the layers' products with matrices, forward and backward, in 8 bits (see
        ``models.quantize``): projections of attention, feed-forward parts, experts; not attention itself, routers,
        norms, embeddings or heads.  Parameters and checkpoints stay as they are.
    pipeline_microbatches, pipeline_rounds: where ``MeshConfig.stage`` splits layers, into how many parts a batch is cut
    (0: as many as divide it, up to four a stage), and how often each passes every stage; see ``pipeline``.
    """

    vocab_size: int
    num_layers: int
    d_model: int
    num_heads: int
    num_kv_heads: int
    d_ff: int
    max_positions: int
    head_dim: int = 0
    rope: Rope = Rope()
    tie_embeddings: bool = True
    qk_norm: bool = False
    dropout: float = 0.0
    norm_eps: float = 1e-6
    init_std: float = 0.02
    heads: tuple[str, ...] = ("lm",)
    remat: str = "none"
    remat_save: tuple[str, ...] = ()
    remat_offload: tuple[str, ...] = ()
    scan_unroll: int = 1
    attention: str = "auto"
    cross_entropy: str = "auto"
    pipeline_microbatches: int = 0
    pipeline_rounds: int = 1
    compute_dtype: str = "float32"
    param_dtype: str = "float32"
    quantize: str = quantize.NONE

    def __post_init__(self):
        for name in ("vocab_size", "num_layers", "d_model", "num_heads", "num_kv_heads", "d_ff", "max_positions"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, found {getattr(self, name)}")
        if self.head_dim == 0:
            if self.d_model % self.num_heads:
                raise ValueError(f"d_model={self.d_model} is not a multiple of num_heads={self.num_heads}")
            object.__setattr__(self, "head_dim", self.d_model // self.num_heads)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: RoPE turns pairs")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), found {self.dropout}")
        if not 1 <= self.scan_unroll <= self.num_layers:
            raise ValueError(f"scan_unroll={self.scan_unroll} must be from 1 to num_layers={self.num_layers}")
        if not self.heads or set(self.heads) - set(HEADS) or len(set(self.heads)) != len(self.heads):
            raise ValueError(f"heads must name some of {HEADS} once each, found {self.heads}")
        if self.pipeline_microbatches < 0 or self.pipeline_rounds < 1:
            raise ValueError(
                "pipeline_microbatches must be at least 0 and pipeline_rounds at least 1, found "
                f"{self.pipeline_microbatches} and {self.pipeline_rounds}"
            )
        if self.remat not in REMAT:
            raise ValueError(f"remat={self.remat!r}; one of {tuple(REMAT)}")
        named = (*self.remat_save, *self.remat_offload)
        if set(named) - set(REMAT_NAMES) or len(set(named)) < len(named):
            raise ValueError(f"remat_save and remat_offload must name some of {REMAT_NAMES} once each, found {named}")
        if "stream" in self.remat_save:
            raise ValueError("remat_save: 'stream', the input of a layer, is kept anyway; remat_offload may move it")
        if named and self.remat != "full":
            raise ValueError(f"remat_save and remat_offload say what remat='full' keeps, but remat={self.remat!r}")
        if self.attention not in BACKENDS:
            raise ValueError(f"attention={self.attention!r}; one of {BACKENDS}")
        if self.cross_entropy not in cross_entropy.BACKENDS:
            raise ValueError(f"cross_entropy={self.cross_entropy!r}; one of {cross_entropy.BACKENDS}")
        quantize.check(self.quantize)
        for name in ("compute_dtype", "param_dtype"):
            if getattr(self, name) not in ("float32", "bfloat16"):
                raise ValueError(f"{name}={getattr(self, name)!r}; 'float32' or 'bfloat16'")

    def norm(self) -> NormSpec:
        """The norm of every layer and of the end."""
        return NormSpec(eps=self.norm_eps)

    def attention_spec(self, **changes: Any) -> AttentionSpec:
        """Grouped-query attention of the config's sizes, with ``changes``."""
        fields = {
            "num_heads": self.num_heads,
            "num_kv_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "rope": self.rope,
            "qk_norm": "head" if self.qk_norm else "none",
            "norm": self.norm(),
        }
        return AttentionSpec(**(fields | changes))

    def layer_spec(self) -> LayerSpec:
        """A layer, where all are alike."""
        return LayerSpec(attention=self.attention_spec(), mlp=MLPSpec(d_ff=self.d_ff), norm=self.norm())

    @functools.cache  # noqa: B019  (as many as there are configs)
    def spec(self) -> DecoderSpec:
        """What the layers are and what surrounds them."""
        return DecoderSpec(stacks={"layers": (self.layer_spec(),) * self.num_layers}, norm=self.norm())
