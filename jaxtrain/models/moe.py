"""Mixtures of experts: routing, dropless computation, and expert parallelism.

Tokens are sorted by expert and multiplied group by group, so that nothing is dropped or padded.  On a mesh every
device has some of the experts: it reads the tokens of the devices it shares them with, computes what its own experts
have to say about them, and the sums go back.  Weights stay where they are.

Letters: B rows, T tokens of a row, N = B * T tokens, D model width, E experts, K experts a token, F an expert's width,
M = N * K assignments of tokens to experts.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from jaxtrain.kernels.grouped_matmul.api import grouped_matmul
from jaxtrain.models import balance, quantize
from jaxtrain.models.functional import param
from jaxtrain.models.layers import ACTIVATIONS, ROWS, MLPSpec, normal
from jaxtrain.sharding import ShardingRules, free_axes, vary_like
from jaxtrain.types import Array

ROUTER = ("embed", "router")
INNER = ("experts", "embed", "mlp")
OUTER = ("experts", "mlp", "embed")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoESpec:
    """One mixture layer: ``sum of weight_e * expert_e(x)`` over the ``top_k`` experts that the router picks, where an
    expert is a SwiGLU of width ``d_ff``.

    scores: "softmax" over the experts, or "sigmoid" of each (DeepSeek-V3, 2412.19437).
    renormalize: the picked scores are divided by their sum.  scale: multiplies them after that.
    bias: experts are picked by ``score + bias`` and weighed by the score alone; the bias is no one's gradient, see
        ``balance.move_biases`` (2408.15664).
    groups, top_groups: experts stand in ``groups`` equal groups; a token picks from the ``top_groups`` whose two best
        experts have the largest sum.
    shared_d_ff: width of a SwiGLU that every token takes as well; 0: none.
    capacity_factor: 0 drops nothing.  Above it, an expert takes at most ``capacity_factor * tokens * top_k / experts``
        tokens (rounded up) of a call, the first ones in the batch's order (Switch, 2101.03961); a token that is turned
        away keeps its other experts, or passes by.  Cached decoding drops nothing.
    sequence_balance: also measures each sequence by itself, see ``balance``.
    """

    num_experts: int
    top_k: int
    d_ff: int
    scores: str = "softmax"
    renormalize: bool = True
    scale: float = 1.0
    bias: bool = False
    groups: int = 1
    top_groups: int = 1
    shared_d_ff: int = 0
    activation: str = "silu"
    capacity_factor: float = 0.0
    sequence_balance: bool = False

    def __post_init__(self):
        assert self.scores in ("softmax", "sigmoid"), self.scores
        E, G = self.num_experts, self.groups
        if not 1 <= self.top_k <= E or self.d_ff < 1 or self.shared_d_ff < 0:
            raise ValueError(f"{self.top_k} of {E} experts of width {self.d_ff}: choose 1 to {E}, and a width above 0")
        if E % G or not 1 <= self.top_groups <= G or (G > 1 and E // G < 2):
            raise ValueError(
                f"{E} experts in {G} groups, of which {self.top_groups} are used: groups must be equal, of at least 2 "
                "experts, and the used ones among them"
            )
        if self.top_k > self.top_groups * (E // G):
            raise ValueError(
                f"{self.top_k} experts a token, but {self.top_groups} of {G} groups hold {self.top_groups * (E // G)}"
            )
        if self.capacity_factor < 0:
            raise ValueError(f"capacity_factor must be at least 0 (0: nothing is dropped), is {self.capacity_factor}")

    def build(self, config: Any, rngs: nnx.Rngs) -> nnx.Module:
        return MoE(self, config, rngs)

    def flops_per_token(self, d_model: int, seq_len: int) -> float:
        """See ``flops.forward_flops_per_token``: the router, and the experts that a token takes."""
        return 2 * d_model * (self.num_experts + 3 * (self.top_k * self.d_ff + self.shared_d_ff))


class Router(nnx.Module):
    """Scores experts in float32: half a bit decides which expert a token goes to."""

    def __init__(self, spec: MoESpec, config: Any, rngs: nnx.Rngs):
        shape = (config.d_model, spec.num_experts)
        self.kernel = param(normal(rngs, shape, config.d_model**-0.5, config.param_dtype), *ROUTER)
        # In float32 whatever the parameters are: steps of 0.001 would be lost on a bfloat16 of 1.
        self.bias = param(jnp.zeros((spec.num_experts,), jnp.float32), "router") if spec.bias else None


class Kernel(nnx.Module):
    """One matrix of every expert."""

    def __init__(self, rngs: nnx.Rngs, shape: tuple[int, ...], names: tuple[str, ...], std: float, dtype: Any):
        self.kernel = param(normal(rngs, shape, std, dtype), *names)


class Experts(nnx.Module):
    """The matrices of all experts: gate and up ``[E, D, F]``, down ``[E, F, D]``."""

    def __init__(self, spec: MoESpec, config: Any, rngs: nnx.Rngs):
        E, D, F = spec.num_experts, config.d_model, spec.d_ff
        self.gate = Kernel(rngs, (E, D, F), INNER, D**-0.5, config.param_dtype)
        self.up = Kernel(rngs, (E, D, F), INNER, D**-0.5, config.param_dtype)
        self.down = Kernel(rngs, (E, F, D), OUTER, (F * 2 * config.num_layers) ** -0.5, config.param_dtype)


class MoE(nnx.Module):
    """See ``MoESpec``."""

    def __init__(self, spec: MoESpec, config: Any, rngs: nnx.Rngs):
        self.router = Router(spec, config, rngs)
        self.experts = Experts(spec, config, rngs)
        if spec.shared_d_ff:
            shared = MLPSpec(d_ff=spec.shared_d_ff, activation=spec.activation)
            self.shared = shared.build(config, rngs)
        self.spec = spec
        self.compute = config.compute_dtype
        self.quantize = config.quantize

    def __call__(self, x, *, segments, constrain, decoding: bool = False):
        """``[B, T, D]`` or ``[B * T, D]``, and what the layer has to say about its balance, see ``balance.measure``."""
        weights = {
            "router": self.router.kernel[...].astype(jnp.float32),
            **{name: getattr(self.experts, name).kernel[...].astype(self.compute) for name in ("gate", "up", "down")},
        }
        if self.spec.bias:
            weights["bias"] = jax.lax.stop_gradient(self.router.bias[...].astype(jnp.float32))
        spec = dataclasses.replace(self.spec, capacity_factor=0.0) if decoding else self.spec
        y, said = sparse(spec, x, segments, weights, constrain.rules, self.quantize)
        if self.spec.shared_d_ff:
            y = y + self.shared(x, constrain=constrain)[0]
        return constrain(y, (*ROWS[y.ndim], "act_embed")), said


class Layout(NamedTuple):
    """Mesh axes: of the tokens' rows and positions, of experts, and those over which matrices' sides are split here.

    A side that is split over another kind of axis is whole here: the compiler gathers it.
    """

    rows: tuple[str, ...] = ()
    sequence: tuple[str, ...] = ()
    experts: tuple[str, ...] = ()
    embed: tuple[str, ...] = ()
    mlp: tuple[str, ...] = ()

    @classmethod
    def of(cls, rules: ShardingRules) -> Layout:
        def axes(name):
            entry = rules.spec((name,))[0] or ()
            return (entry,) if isinstance(entry, str) else entry

        rows, sequence, experts, embed, mlp = map(axes, ("batch", "sequence", "experts", "embed", "mlp"))
        tokens = {*rows, *sequence}
        return cls(
            rows=rows,
            sequence=sequence,
            experts=experts,
            embed=embed if tokens >= set(embed) else (),
            mlp=mlp if not tokens & set(mlp) else (),
        )

    @property
    def tokens(self) -> tuple[str, ...]:
        return (*self.rows, *self.sequence)

    @property
    def exchanged(self) -> tuple[str, ...]:
        """Axes over which both tokens and experts are split."""
        return tuple(axis for axis in self.experts if axis in self.tokens)

    @property
    def summed(self) -> tuple[str, ...]:
        """Axes over which devices have the same tokens, and a part each of what is computed for them."""
        return (*(axis for axis in self.experts if axis not in self.tokens), *self.mlp)


def exchanged(rules: ShardingRules, mesh: Any) -> int:
    """Among how many devices tokens go to each other's experts.  Each has room for all that all of them may send it;
    where experts are chosen evenly, it gets one part of so many."""
    return math.prod(mesh.shape[axis] for axis in Layout.of(rules).exchanged)


def sparse(
    spec: MoESpec,
    x: Array,
    segments: Array,
    weights: dict[str, Array],
    rules: ShardingRules,
    quantized: str = quantize.NONE,
):
    """The routed part, ``(y, balance)``: on a mesh under a ``shard_map`` that splits tokens and weights.

    x: ``[B, T, D]`` or ``[B * T, D]``.  segments: int32 ``[B, T]``.
    weights: "router" ``[D, E]`` and "bias" ``[E]`` in float32, "gate", "up" and "down" as in ``Experts``.
    """
    shape, (B, T) = x.shape, segments.shape
    x = x.reshape(B, T, -1)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        y, said = _local(spec, Layout(), T, quantized, x, segments, weights)
        return y.reshape(shape), said
    layout = Layout.of(rules)
    # A shard_map wants even parts; elsewhere the compiler sees to it.
    uneven = [
        (0, -size % math.prod(mesh.shape[axis] for axis in axes))
        for size, axes in ((B, layout.rows), (T, layout.sequence))
    ]
    if any(map(any, uneven)):
        x, segments = jnp.pad(x, (*uneven, (0, 0))), jnp.pad(segments, uneven)
    tokens = PartitionSpec(layout.rows, layout.sequence, None)
    inner = PartitionSpec(layout.experts, layout.embed, layout.mlp)
    specs = {
        "router": PartitionSpec(layout.embed, None),
        "bias": PartitionSpec(None),
        "gate": inner,
        "up": inner,
        "down": PartitionSpec(layout.experts, layout.mlp, layout.embed),
    }
    positions = PartitionSpec(layout.rows, layout.sequence)
    y, said = jax.shard_map(
        partial(_local, spec, layout, segments.shape[1], quantized),
        in_specs=(tokens, positions, {name: specs[name] for name in weights}),
        out_specs=(tokens, PartitionSpec()),
        axis_names=free_axes(mesh),
    )(x, segments, weights)
    return y[:B, :T].reshape(shape), said


def _local(
    spec: MoESpec,
    layout: Layout,
    length: int,
    quantized: str,
    x: Array,
    segments: Array,
    weights: dict[str, Array],
):
    """One device's ``x [B, T, D]``; ``length`` is the T of whole rows.  Without axes, everything."""
    K, E = spec.top_k, spec.num_experts
    x_ND = x.reshape(-1, x.shape[-1])
    valid_N1 = segments.reshape(-1, 1) > 0
    router_DE = _gather(weights["router"], layout.embed, 0)
    logits_NE = jnp.matmul(x_ND.astype(jnp.float32), router_DE, precision=jax.lax.Precision.HIGHEST)
    shares_NK, picked_NK, scores_NE = route(spec, logits_NE, weights.get("bias"))
    # Padding goes to no expert: number E.
    picked_NK = jnp.where(valid_N1, picked_NK, E)
    chosen_NE = jnp.sum(jax.nn.one_hot(picked_NK, E, dtype=jnp.float32), axis=1)
    dropped = jnp.zeros(())
    if spec.capacity_factor:
        kept_NK = within_capacity(spec, layout, segments.shape, chosen_NE, picked_NK)
        dropped = jnp.sum((~kept_NK & valid_N1).astype(jnp.float32))
        picked_NK = jnp.where(kept_NK, picked_NK, E)
    said = balance.measure(
        logits_NE, scores_NE, chosen_NE, segments, K, length if spec.sequence_balance else 0, layout.sequence
    )
    said = {name: vary_like(sums, x_ND) for name, sums in {**said, "dropped": dropped}.items()}
    said = _sum(said, layout.tokens)

    x_ND, shares_NK, picked_NK = (_gather(a, layout.exchanged, 0) for a in (x_ND, shares_NK, picked_NK))
    gate, up, down = (
        _gather(weights[name], layout.embed, 2 if name == "down" else 1) for name in ("gate", "up", "down")
    )
    here = gate.shape[0]
    first = jax.lax.axis_index(layout.experts) * here if layout.experts else 0
    mine_M = picked_NK.reshape(-1) - first
    mine_M = jnp.where((mine_M >= 0) & (mine_M < here), mine_M, here)
    order_M = jnp.argsort(mine_M)  # stable; what is others' comes last
    inverse_M = jnp.argsort(order_M)
    sizes_E = jnp.zeros((here + 1,), jnp.int32).at[mine_M].add(1)[:here]
    rows_MD = _dispatch(K, x_ND, order_M, inverse_M)
    act = ACTIVATIONS[spec.activation]
    product = grouped_matmul if quantized == quantize.NONE else partial(quantize.grouped_matmul, quantized)
    h_MF = act(product(rows_MD, gate, sizes_E)) * product(rows_MD, up, sizes_E)
    out_MD = _combine(product(h_MF, down, sizes_E), order_M, inverse_M)
    out_NKD = out_MD.reshape(-1, K, out_MD.shape[-1]).astype(jnp.float32)
    y_ND = jnp.sum(out_NKD * shares_NK[..., None], axis=1).astype(x.dtype)
    if layout.exchanged:
        y_ND = jax.lax.psum_scatter(y_ND, layout.exchanged, scatter_dimension=0, tiled=True)
    return _sum(y_ND, layout.summed).reshape(x.shape), said


def route(spec: MoESpec, logits_NE: Array, bias_E: Array | None) -> tuple[Array, Array, Array]:
    """Weights float32 ``[N, K]`` and numbers int32 ``[N, K]`` of the picked experts, and every expert's score
    ``[N, E]``, which sum to 1."""
    if spec.scores == "softmax":
        scores_NE = normalized_NE = jax.nn.softmax(logits_NE, axis=-1)
    else:
        scores_NE = jax.nn.sigmoid(logits_NE)
        normalized_NE = scores_NE / (jnp.sum(scores_NE, axis=-1, keepdims=True) + 1e-20)
    choice_NE = jax.lax.stop_gradient(scores_NE if bias_E is None else scores_NE + bias_E)
    if spec.groups > 1:
        choice_NGE = choice_NE.reshape(len(choice_NE), spec.groups, -1)
        best_NG = jnp.sum(jax.lax.top_k(choice_NGE, 2)[0], axis=-1)
        used_NG = jnp.sum(jax.nn.one_hot(jax.lax.top_k(best_NG, spec.top_groups)[1], spec.groups), axis=1) > 0
        choice_NE = jnp.where(used_NG[..., None], choice_NGE, -jnp.inf).reshape(choice_NE.shape)
    picked_NK = jax.lax.top_k(choice_NE, spec.top_k)[1]
    shares_NK = jnp.take_along_axis(scores_NE, picked_NK, axis=-1)
    if spec.renormalize:
        shares_NK = shares_NK / (jnp.sum(shares_NK, axis=-1, keepdims=True) + 1e-20)
    return shares_NK * spec.scale, picked_NK, normalized_NE


def within_capacity(spec: MoESpec, layout: Layout, shape: tuple[int, int], chosen_NE: Array, picked_NK: Array) -> Array:
    """bool ``[N, K]``: is the expert not yet full, in the order of the whole batch's tokens?

    chosen_NE: 1.0 where a token picked an expert; no padding.  shape: of this device's part of the batch, ``[B, T]``.
    """
    chosen_BTE = chosen_NE.reshape(*shape, -1)
    rows_BE, before_BE = _before(jnp.sum(chosen_BTE, axis=1), layout.sequence)
    all_E, before_E = _before(jnp.sum(rows_BE, axis=0), layout.rows)
    before_BE += before_E + jnp.cumsum(rows_BE, axis=0) - rows_BE
    before_NE = (before_BE[:, None] + jnp.cumsum(chosen_BTE, axis=1) - chosen_BTE).reshape(chosen_NE.shape)
    capacity = jnp.ceil(spec.capacity_factor * jnp.sum(all_E) / spec.num_experts)
    before_NK = jnp.take_along_axis(before_NE, jnp.minimum(picked_NK, spec.num_experts - 1), axis=-1)
    return (before_NK < capacity) & (picked_NK < spec.num_experts)


def _before(x: Array, axes: tuple[str, ...]) -> tuple[Array, Array]:
    """The sum of x over all devices along ``axes``, and over those before this one."""
    if not axes:
        return x, jnp.zeros_like(x)
    all_of_them = jax.lax.all_gather(x, axes)
    earlier = jnp.arange(len(all_of_them)) < jax.lax.axis_index(axes)
    return jnp.sum(all_of_them, axis=0), jnp.tensordot(earlier.astype(x.dtype), all_of_them, 1)


def _gather(x: Array, axes: tuple[str, ...], dim: int) -> Array:
    return jax.lax.all_gather(x, axes, axis=dim, tiled=True) if axes else x


def _sum(x: Any, axes: tuple[str, ...]) -> Any:
    return jax.lax.psum(x, axes) if axes else x


# Both ways a permutation is read, never written: a scatter of rows is slow everywhere.
@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dispatch(K: int, x_ND: Array, order_M: Array, inverse_M: Array) -> Array:
    """The rows of x by expert: assignment m is of token ``m // K``."""
    return x_ND[order_M // K]


def _dispatch_forward(K, x_ND, order_M, inverse_M):
    return _dispatch(K, x_ND, order_M, inverse_M), inverse_M


def _dispatch_backward(K, inverse_M, grad_MD):
    grad_NKD = grad_MD[inverse_M].reshape(-1, K, grad_MD.shape[-1])
    return jnp.sum(grad_NKD.astype(jnp.float32), axis=1).astype(grad_MD.dtype), None, None


_dispatch.defvjp(_dispatch_forward, _dispatch_backward)


@jax.custom_vjp
def _combine(out_MD: Array, order_M: Array, inverse_M: Array) -> Array:
    """Results by expert, back in the order of assignments."""
    return out_MD[inverse_M]


_combine.defvjp(
    lambda out_MD, order_M, inverse_M: (_combine(out_MD, order_M, inverse_M), order_M),
    lambda order_M, grad_MD: (grad_MD[order_M], None, None),
)
