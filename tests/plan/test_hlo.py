"""The walk over compiled programs, against counts by hand: on programs that this machine's CPU backend compiles, and on
lines of the text that TPUs' compiler writes."""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtrain.kernels.attention.ring import Deal
from jaxtrain.kernels.grouped_matmul.blocked import outer_product
from jaxtrain.plan.hlo import Collective, Done, Loop, Program, Start, Work, priced, walk
from jaxtrain.plan.hlo_convolution import convolution_flops
from jaxtrain.plan.hlo_text import axes_of, groups_of, shapes

SIZES = {"fsdp": 4, "tensor": 2}


@pytest.fixture(scope="module")
def mesh():
    return Mesh(np.array(jax.devices()).reshape(4, 2), tuple(SIZES))


def walked(function, *shapes, mesh=None, specs=None, out=None):
    """``function`` compiled for arguments of these shapes, walked."""
    place = [None] * len(shapes) if mesh is None else [NamedSharding(mesh, spec) for spec in specs]
    args = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=s) for shape, s in zip(shapes, place, strict=True)]
    jitted = jax.jit(function, out_shardings=None if out is None else NamedSharding(mesh, out))
    return walk(jitted.lower(*args).compile().as_text(), None if mesh is None else dict(mesh.shape))


def test_a_product():
    assert walked(jnp.matmul, (8, 32), (32, 16)).totals().flops == 2 * 8 * 32 * 16


def test_a_batch_of_products():
    product = walked(lambda x, y: jnp.einsum("bij,bjk->bik", x, y), (3, 8, 32), (3, 32, 16))
    assert product.totals().flops == 3 * 2 * 8 * 32 * 16


@pytest.mark.parametrize("turns", [1, 7])
def test_a_scan_counts_every_turn(turns):
    def scan(x, matrices):
        return jax.lax.scan(lambda x, m: (jnp.tanh(x @ m), None), x, matrices)[0]

    totals = walked(scan, (8, 16), (turns, 16, 16)).totals()
    assert totals.flops == turns * 2 * 8 * 16 * 16
    assert totals.transcendentals == turns * 8 * 16


def test_scans_within_scans_multiply():
    def inner(x, matrices):
        return jax.lax.scan(lambda x, m: (x @ m, None), x, matrices)[0]

    def outer(x, matrices):
        return jax.lax.scan(lambda x, some: (inner(x, some), None), x, matrices)[0]

    program = walked(outer, (8, 16), (3, 5, 16, 16))
    assert program.totals().flops == 3 * 5 * 2 * 8 * 16 * 16
    assert program.unknown == ()


def test_a_gradient_counts_both_passes():
    def loss(x, matrices):
        return jnp.sum(jax.lax.scan(lambda x, m: (x @ m, None), x, matrices)[0] ** 2)

    forward = 5 * 2 * 8 * 16 * 16
    assert walked(jax.grad(loss, 1), (8, 16), (5, 16, 16)).totals().flops == pytest.approx(3 * forward, rel=0.15)


def test_a_loop_by_steps_of_three():
    def loop(x):
        return jax.lax.while_loop(lambda c: c[0] < 20, lambda c: (c[0] + 3, c[1] @ c[1]), (jnp.int32(2), x))[1]

    assert walked(loop, (16, 16)).totals().flops == 6 * 2 * 16**3


def test_a_loop_of_unknown_length_is_named():
    def loop(x, limit):
        return jax.lax.while_loop(lambda c: jnp.sum(c) < limit, lambda c: c @ c, x)

    program = walked(loop, (16, 16), ())
    assert len(program.unknown) == 1
    assert program.totals().flops == 2 * 16**3


def test_a_loop_of_unknown_length_turns_as_often_as_is_said():
    def loop(x, limit, stack):
        x = jax.lax.scan(lambda x, m: (x @ m, None), x, stack)[0]
        return jax.lax.while_loop(lambda c: jnp.sum(c) < limit, lambda c: c @ c, x)

    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((16, 16), (), (5, 16, 16))]
    program = walk(jax.jit(loop).lower(*args).compile().as_text(), turns=9)
    assert program.unknown == ()
    assert program.totals().flops == (9 + 5) * 2 * 16**3  # the scan says its own length


def test_a_sum_of_parts_among_zeros_is_an_emulated_gather(mesh):
    def by_sum(x):
        whole = jnp.zeros((16, 8), x.dtype)
        at = jax.lax.axis_index("fsdp") * 4
        return jax.lax.psum(jax.lax.dynamic_update_slice(whole, x, (at, 0)), "fsdp")

    def collectives(function, spec):
        mapped = jax.shard_map(function, mesh=mesh, in_specs=P("fsdp"), out_specs=spec, check_vma=False)
        found = walked(mapped, (16, 8), mesh=mesh, specs=[P("fsdp")]).collectives()
        return [(start.collective.kind, start.collective.emulated) for start, _ in found]

    assert collectives(by_sum, P()) == [("all-reduce", True)]
    assert collectives(lambda x: jax.lax.psum(x, "fsdp"), P()) == [("all-reduce", False)]


def test_a_slice_of_a_stack_is_not_the_stack():
    def loop(x, stack):
        def body(i, x):
            return x + jax.lax.dynamic_index_in_dim(stack, i, keepdims=False)

        return jax.lax.fori_loop(0, 64, body, x)

    number = 4 * 128 * 128
    touched = walked(loop, (128, 128), (64, 128, 128)).totals().bytes
    # Each turn reads x and a slice and writes x: not 64 times all 64 slices.
    assert touched == pytest.approx(64 * 3 * number, rel=0.1)


def test_gathered_weights_and_split_products(mesh):
    # Rows over fsdp, weights' inputs over fsdp and outputs over tensor: the weights are gathered.
    product = walked(
        lambda x, w: x @ jax.lax.with_sharding_constraint(w, NamedSharding(mesh, P(None, "tensor"))),
        (64, 32),
        (32, 16),
        mesh=mesh,
        specs=[P("fsdp", None), P("fsdp", "tensor")],
        out=P("fsdp", "tensor"),
    )
    assert product.totals().flops == 2 * 64 * 32 * 16 / 8
    found = [(start.collective, times) for start, times in product.collectives()]
    assert [(c.kind, c.axes, c.members, c.bytes, times) for c, times in found] == [
        ("all-gather", ("fsdp",), 4, 4 * 32 * 16 / 2, 1)
    ]


def test_sums_in_a_loop(mesh):
    def turns(x):
        return jax.lax.scan(lambda x, _: (jax.lax.psum(jnp.tanh(x), "tensor"), None), x, None, length=3)[0]

    mapped = jax.shard_map(turns, mesh=mesh, in_specs=P("fsdp"), out_specs=P("fsdp"), check_vma=False)
    ((start, times),) = walked(mapped, (64, 32), mesh=mesh, specs=[P("fsdp")]).collectives()
    assert (start.collective.kind, start.collective.axes, times) == ("all-reduce", ("tensor",), 3)
    assert start.collective.bytes == 4 * 64 * 32 / 4


def test_a_permutation_names_its_axis(mesh):
    def shift(x):
        return jax.lax.ppermute(x, "fsdp", [(i, (i + 1) % 4) for i in range(4)])

    mapped = jax.shard_map(shift, mesh=mesh, in_specs=P("fsdp", "tensor"), out_specs=P("fsdp", "tensor"))
    program = walked(mapped, (64, 32), mesh=mesh, specs=[P("fsdp", "tensor")])
    ((start, times),) = program.collectives()
    assert (start.collective.kind, start.collective.axes, times) == ("collective-permute", ("fsdp",), 1)
    assert start.collective.bytes == start.collective.wire_bytes == 4 * 64 * 32 / 8


@pytest.mark.parametrize(
    ("text", "axes", "members"),
    [
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", ("tensor",), 2),
        ("replica_groups={{0,2,4,6},{1,3,5,7}}", ("fsdp",), 4),
        ("replica_groups=[4,2]<=[8]", ("tensor",), 2),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", ("fsdp",), 4),
        ("replica_groups=[1,8]<=[8]", ("fsdp", "tensor"), 8),
        ("replica_groups=mesh['a'=4,'b'=2] {'a'}, use_global_device_ids=true", ("fsdp",), 4),
        ("replica_groups=mesh['a'=4,'b'=2] {'a','b'}", ("fsdp", "tensor"), 8),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}", ("tensor",), 2),
        ("replica_groups=mesh['a'=8] {'a':(2)4}", ("fsdp", "tensor"), 4),
        ("channel_id=1, use_global_device_ids=true", ("fsdp", "tensor"), 8),
    ],
)
def test_groups_of_devices(text, axes, members):
    groups = groups_of(text, 8)
    assert sorted(groups.reshape(-1)) == list(range(8))
    assert groups.shape[1] == members
    assert axes_of(groups, SIZES) == axes


def test_shapes_know_their_memory():
    found = shapes("(bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, /*index=1*/f32[]{:T(128)}, pred[3]{0}, s4[10]{0})")
    assert [(x.bytes, x.space) for x in found] == [(2048, 1), (4, 0), (3, 0), (5, 0)]


def test_convolutions_count_what_meets():
    # [batch, features] x [inputs, outputs]: a product of matrices.
    assert convolution_flops((8, 32), (32, 16), (8, 16), ", dim_labels=bf_io->bf") == 2 * 8 * 32 * 16
    # TPUs' form of a product over the heads: each of 8 places of the window meets one, the rest is padding.
    heads = ", window={size=8 pad=7_7 rhs_reversal=1}, dim_labels=bf0_0oi->b0f"
    assert convolution_flops((64, 32, 1), (8, 16, 32), (64, 8, 16), heads) == 2 * 64 * 32 * 8 * 16
    # A window of two without padding adds two products.
    assert convolution_flops((64, 2, 32), (2, 32, 16), (64, 16, 1), ", window={size=2}, dim_labels=b0f_0io->bf0") == (
        2 * 2 * 64 * 32 * 16
    )
    # An ordinary one with stride 2: of 5 places, at 0, 2 and 4 of an input of 5 padded by one, the ends meet two of 3.
    strided = ", window={size=3 pad=1_1 stride=2}, dim_labels=b0f_0io->b0f"
    assert convolution_flops((1, 5, 4), (3, 4, 6), (1, 3, 6), strided) == 2 * 4 * 6 * (2 + 3 + 2)


def test_a_ring_computes_a_part_of_its_pairs():
    """Of four devices each two pairs of chunks in four turns and one more, of 16; the branches say so themselves."""
    deal = Deal(("fsdp",), 4, 2)

    def pairs(x, meet):
        return jax.lax.scan(lambda x, met: (deal.cond(met, lambda x: (x @ x,), x)[0], None), x, meet)[0]

    args = jax.ShapeDtypeStruct((16, 16), jnp.float32), jax.ShapeDtypeStruct((16,), jnp.bool_)
    program = walk(jax.jit(pairs).lower(*args).compile().as_text())
    assert program.totals().flops == 9 * 2 * 16**3


def test_blocks_of_a_mixtures_rows_turn_as_often_as_their_part_needs():
    """Among four devices that have room for each other's rows, which are chosen evenly."""
    M, K, N, E, size = 4096, 16, 8, 4, 64
    types = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((M, K), (M, N))]
    sizes = jax.ShapeDtypeStruct((E,), jnp.int32)
    outer = jax.jit(functools.partial(outer_product, rows=size))
    text = outer.lower(*types, sizes).compile().as_text()
    for routed, turns in ((1.0, M // size + E), (0.25, (M // size + E) // 4)):
        program = walk(text, routed=routed)
        assert program.unknown == ()
        assert program.totals().flops == turns * 2 * size * K * N


def test_a_mixtures_kernel_finds_its_part_of_the_rows():
    flash = 'custom_call_target="tpu_custom_call", backend_config={"cost_estimate"'
    text = TPU.replace(flash, f'metadata={{op_name="jit(step)/ragged_dot_general"}}, {flash}')
    assert text != TPU
    assert walk(text, SIZES, routed=0.25).totals().kernel_flops == walk(TPU, SIZES).totals().kernel_flops / 4


def test_kernels_that_declare_nothing_share_what_is_counted_by_hand():
    """As on GPUs."""
    kernel, other = Work("pallas_call.1", bytes=8.0, kernel=True), Work("sort", bytes=8.0, kernel=True)
    program = priced(Program((Loop(3, (kernel, other)), Work("pallas_call", kernel=True)), (), ()), 100.0)
    assert program.totals().kernel_flops == 100.0
    assert [item.flops for item in program.items[0].items] == [25.0, 0.0]


# What TPUs' compiler writes, cut down to the forms that CPU programs lack.
TPU = Path(__file__).with_name("tpu_forms.hlo").read_text(encoding="utf-8")


def test_the_tpu_compilers_own_forms():
    program = walk(TPU, SIZES)
    loop, copied, scattered, work = program.items
    assert isinstance(loop, Loop) and loop.turns == 5  # 2, 4, 6, 8 and 10
    gather = Collective("all-gather", 2 * 16 * 16, ("fsdp",), 4)
    (started,) = [item for item in loop.items if isinstance(item, Start)]
    assert (started.collective, started.asynchronous) == (gather, True)
    assert [item.key for item in loop.items if isinstance(item, Done)] == [started.key]
    kernels = [item for item in loop.items if isinstance(item, Work) and item.kernel]
    assert [(k.flops, k.bytes, k.transcendentals) for k in kernels] == [(1000, 256, 7), (0, 2 * 2 * 4 * 16, 0)]
    assert program.unpriced == ("bare (tpu_custom_call)",)
    assert copied.bytes == 4 * 16 * 16  # read from HBM, written into the chip's own memory
    assert scattered.collective == Collective("reduce-scatter", 4 * 16 * 16, ("fsdp",), 4)
    assert not scattered.asynchronous
    assert isinstance(work, Work)
    assert program.totals().kernel_flops == 5 * 1000
    assert gather.wire_bytes == 2 * 16 * 16 * 3 / 4


SPARSE_CORES = """HloModule step, is_scheduled=true, num_partitions=8

%gathered (p.1: bf16[4,16]) -> bf16[16,16] {
  %p.1 = bf16[4,16]{1,0} parameter(0)
  ROOT %all-gather.1 = bf16[16,16]{1,0} all-gather(%p.1), replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}
}, execution_thread="sparsecore"

%scattered (p.2: f32[16,16]) -> f32[4,16] {
  %p.2 = f32[16,16]{1,0} parameter(0)
  ROOT %reduce-scatter.1 = f32[4,16]{1,0} reduce-scatter(%p.2), replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}
}, execution_thread="sparsecore"

%copied (p.3: f32[16,16]) -> f32[16,16] {
  %p.3 = f32[16,16]{1,0} parameter(0)
  ROOT %copy.1 = f32[16,16]{0,1} copy(%p.3)
}, execution_thread="sparsecore"

ENTRY %main (x: bf16[4,16], y: f32[16,16]) -> f32[4,16] {
  %x = bf16[4,16]{1,0} parameter(0)
  %y = f32[16,16]{1,0} parameter(1)
  %ready = token[] after-all()
  %gather-start = ((bf16[4,16], token[]), bf16[16,16]) call-start(%x, %ready), to_apply=%gathered
  %sum-start = ((), (), (s32[1]{0:S(2)})) call-start(), to_apply=%scattered
  %negated = f32[16,16]{1,0} negate(%y)
  %gather-done = bf16[16,16]{1,0} call-done(%gather-start)
  %sum-update = ((f32[16,16]{1,0}), f32[4,16]{1,0}) call-update(%sum-start, %negated)
  %copy-start = ((f32[16,16]), f32[16,16]) call-start(%y), to_apply=%copied
  %copy-done = f32[16,16]{0,1} call-done(%copy-start)
  ROOT %sum-done = f32[4,16]{1,0} call-done(%sum-update)
}
"""


def test_what_sparse_cores_do_meanwhile_begins_when_it_has_its_operands():
    started, negated, gathered, scattering, copied, copy_done, scattered = walk(SPARSE_CORES, SIZES).items
    assert started == Start("gather-start", Collective("all-gather", 2 * 16 * 16, ("fsdp",), 4), True)
    assert gathered == Done("gather-start")
    assert isinstance(negated, Work)
    # Made ready before, it waits for what is to be summed.
    assert scattering == Start("sum-start", Collective("reduce-scatter", 4 * 16 * 16, ("fsdp",), 4), True)
    assert scattered == Done("sum-start")
    assert (copied.name, copied.bytes, copy_done) == ("copy.1", 2 * 4 * 16 * 16, Done("copy-start"))


def megascale(rendezvous=None):
    """What the compiler writes of a transfer between slices."""
    told = {"host_transfer_handler_name": "xla_megascale_runtime"}
    if rendezvous:
        told |= {"host_transfer_rendezvous": rendezvous, "megascale_reduce_operation": "SUM"}
        told |= {"megascale_target": "{1,2}x{0:3}", "megascale_transfer_type": "ALL_REDUCE"}
    attributes = ",".join(f'_xla_{name}="{value}"' for name, value in told.items())
    return f"is_host_transfer=true, frontend_attributes={{{attributes}}}"


MEGASCALE = f"""HloModule two_slices, is_scheduled=true, num_partitions=8

ENTRY %main (x: bf16[32,8,128]) -> bf16[32,8,128] {{
  %x = bf16[32,8,128]{{2,1,0}} parameter(0)
  %after-all = token[] after-all()
  %send = (bf16[32,8,128]{{2,1,0}}, u32[], token[]) send(%x, %after-all), channel_id=3, {megascale("sum_0")}
  %recv = (bf16[32,8,128]{{2,1,0}}, u32[], token[]) recv(%after-all), channel_id=2, {megascale("sum_0")}
  %send-done = token[] send-done(%send), channel_id=3, {megascale()}
  %recv-done = (bf16[32,8,128]{{2,1,0}}, token[]) recv-done(%recv), channel_id=2, {megascale()}
  ROOT %y = bf16[32,8,128]{{2,1,0}} get-tuple-element(%recv-done), index=0
}}
"""


def test_collectives_between_slices_go_through_the_host():
    sizes = {"data": 4, "fsdp": 4, "tensor": 1, "context": 1, "expert": 1, "stage": 1}
    started, done = walk(MEGASCALE, sizes, slices=2).items
    assert started.collective == Collective("all-reduce", 2 * 32 * 8 * 128, ("data",), 2)
    assert started.asynchronous
    assert done == Done(started.key)


def test_an_all_reduce_goes_around_twice():
    assert Collective("all-reduce", 100.0, ("fsdp",), 4).wire_bytes == 150.0
    assert Collective("reduce-scatter", 100.0, ("fsdp",), 4).wire_bytes == 75.0
    assert Collective("all-gather", 100.0, (), 1).wire_bytes == 0.0


def test_text_that_is_no_program():
    with pytest.raises(ValueError, match="no ENTRY"):
        walk("HloModule nothing\n")
