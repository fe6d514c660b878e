"""The programs that ``attention_schedule.py`` compiles: our attention kernels and other people's, forward and backward.

    python benchmarks/attention_programs.py '["ours", "v6e", 8192, 128, [512, 512]]'

compiles one of them for a chip, a length, a head size and a tile, in a process of its own: the compiler reads only once
where to dump what it makes.  Prints the lengths at which our backward pass is one kernel.
"""

from __future__ import annotations

import json
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtrain.kernels.attention import tpu
from jaxtrain.kernels.attention.masks import Marks, Spec, make_marks, visible_share
from jaxtrain.sharding import AXES

TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}


def spec_and_marks(positions, segments, H: int, tile: tuple[int, int]) -> tuple[Spec, Marks]:
    """Of causal documents; positions and segments int32 ``[1, T]``."""
    marks, low, high = make_marks(positions, positions, segments, segments, causal=True)
    T = positions.shape[1]
    share = visible_share(T, T, causal=True)
    return Spec(scale=H**-0.5, low=low, high=high, in_order=True, share=share, tiles=tuple(tile)), marks


def _ours(q, k, v, *, tile, fused: bool | None):
    """Every kernel of ours; fused None: those alone that the backward pass takes at this length."""
    # Segments that the compiler does not know, as in training.
    segments = jnp.zeros((1, q.shape[2]), jnp.int32) + (q[:, 0, :, 0] < 2)
    spec, marks = spec_and_marks(jnp.arange(q.shape[2])[None], segments, q.shape[3], tile)
    out, lse = tpu.forward(spec, q, k, v, marks)
    args = (spec, q, k, v, marks, lse, jnp.sum(out, -1, dtype=jnp.float32), out)
    if fused is None:
        return out, tpu.backward(*args)
    return out, tpu._dq(*args), tpu._dkv(*args), tpu._dkv(*args, parts=1) if fused else ()


def one_backward(T: int, H: int, tile) -> bool:
    """Is our backward pass one kernel at this length?"""
    x = jax.ShapeDtypeStruct((1, 1, T, H), jnp.bfloat16)
    return "flash_backward" in str(jax.make_jaxpr(partial(_ours, tile=tile, fused=None))(x, x, x))


def ours(T: int, H: int, tile):
    return lambda q, k, v: _ours(q, k, v, tile=tile, fused=one_backward(T, H, tile)), (1, 1, T, H)


def splash(T: int, H: int, tile, fused: bool = False):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    Q, K = tile
    dq = {} if fused else {"block_q_dq": Q, "block_kv_dq": K}
    sizes = kernel.BlockSizes(
        block_q=Q, block_kv=K, block_kv_compute=K, block_q_dkv=Q, block_kv_dkv=K, block_kv_dkv_compute=K,
        use_fused_bwd_kernel=fused, **dq,
    )  # fmt: skip
    mask = masks.MultiHeadMask([masks.CausalMask((T, T))])
    return gradients(kernel.make_splash_mha_single_device(mask, block_sizes=sizes)), (1, T, H)


def flash_attention(T: int, H: int, tile):
    from jax.experimental.pallas.ops.tpu import flash_attention as module

    Q, K = tile
    sizes = module.BlockSizes(
        block_b=1, block_q=Q, block_k_major=K, block_k=K, block_q_dq=Q, block_k_major_dq=K, block_k_dq=K,
        block_q_major_dkv=Q, block_q_dkv=Q, block_k_major_dkv=K, block_k_dkv=K,
    )  # fmt: skip
    attend = partial(module.flash_attention, causal=True, sm_scale=H**-0.5, block_sizes=sizes)
    return gradients(attend), (1, 1, T, H)


def tokamax(T: int, H: int, tile):
    from tokamax._src.ops.experimental.tpu.splash_attention import splash_attention_kernel as kernel
    from tokamax._src.ops.experimental.tpu.splash_attention import splash_attention_mask as masks

    Q, K = tile
    config = kernel.SplashConfig(
        block_q=Q, block_kv=K, block_kv_compute=K, block_q_dkv=Q, block_kv_dkv=K, block_kv_dkv_compute=K
    )
    return gradients(kernel.make_splash_mha_single_device(masks.CausalMask((T, T)), config=config)), (1, T, H)


def gradients(attend):
    return jax.grad(lambda q, k, v: attend(q, k, v).astype(jnp.float32).sum(), (0, 1, 2))


# name -> function of length, head size and tile to (program of q, k, v; their shape).
PROGRAMS = {
    "ours": ours,
    "splash": splash,
    "splash_fused": partial(splash, fused=True),
    "flash": flash_attention,
    "tokamax": tokamax,
}


def main() -> None:
    name, chip, T, H, tile = json.loads(sys.argv[1])
    device = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip]).devices[0]
    mesh = Mesh(np.array([device]).reshape((1,) * len(AXES)), AXES)
    program, shape = PROGRAMS[name](T, H, tile)
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec()))
    with jax.set_mesh(mesh):
        jax.jit(program).lower(x, x, x).compile()
        lengths = [2048 * 2**i for i in range(7)] if name == "ours" else []
        print(json.dumps([T for T in lengths if one_backward(T, H, tile)]))


if __name__ == "__main__":
    main()
