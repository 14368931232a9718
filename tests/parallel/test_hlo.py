"""What is counted in a compiled program's text, against sums by hand."""

import jax
import jax.numpy as jnp
import pytest

from ares_jax.parallel.sharding import make_mesh
from ares_jax.planning import aot, hlo

LAYERS, ROWS, WIDTH = 7, 512, 512


def layers_of(mesh, dtype):
    """Returns seven layers of two products, rows and weights split over `fsdp`: each layer's weights are gathered."""
    rows, weights = jax.NamedSharding(mesh, jax.P("fsdp")), jax.NamedSharding(mesh, jax.P(None, "fsdp"))
    x = jax.ShapeDtypeStruct((ROWS, WIDTH), dtype, sharding=rows)
    w = jax.ShapeDtypeStruct((LAYERS, WIDTH, WIDTH), dtype, sharding=weights)

    def layers(x, w):
        return jax.lax.scan(lambda x, w: (jax.lax.with_sharding_constraint(jnp.tanh(x @ w) @ w, rows), None), x, w)[0]

    return jax.jit(layers).lower(x, w)


@pytest.mark.parametrize("kind", ["cpu", "tpu"])
def test_a_loop_counts_as_often_as_it_runs(kind):
    if kind == "cpu":
        parts, size, compiled = 8, 4, layers_of(make_mesh(fsdp=8), jnp.float32).compile()
        counted = hlo.work(compiled.as_text())
        assert (
            counted.bytes > LAYERS * WIDTH * WIDTH * size
        )  # the gathered weights are written; on a TPU so small, not in HBM
        assert counted.flops > 3 * compiled.cost_analysis()["flops"]
    else:
        parts, size, devices = 4, 2, aot.topology_devices("v5e:2x2")
        counted = aot.compile_lowered(layers_of(make_mesh(fsdp=4, devices=devices), jnp.bfloat16), {}).work
    assert counted.flops == LAYERS * 2 * 2 * (ROWS // parts) * WIDTH * WIDTH
    assert counted.collective == {"all-gather": LAYERS * WIDTH * WIDTH * size * (parts - 1) / parts}
    assert counted.unknown_loops == 0


def test_products_that_a_tpu_makes_convolutions_of():
    """A batch dimension becomes a window with holes: only its places with numbers count."""
    text = """HloModule m

ENTRY %main (a: bf16[4,32,64], b: bf16[4,64,16]) -> bf16[4,32,16] {
  %a = bf16[4,32,64]{2,1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[4,64,16]{2,1,0:T(8,128)(2,1)} parameter(1)
  ROOT %c = bf16[4,32,16]{2,1,0} convolution(%a, %b), window={size=4 stride=3 pad=0_0 lhs_dilate=4}, dim_labels=0bf_0io->0bf
}
"""
    assert hlo.work(text).flops == 2 * 4 * 32 * 64 * 16
    assert hlo.work(text).bytes == 2 * (4 * 32 * 64 + 4 * 64 * 16 + 4 * 32 * 16)


def test_a_loop_that_may_end_early_counts_at_most_and_an_unlimited_one_is_left_out():
    def until(x, *, steps):
        def going(carry):
            return (carry[0] < steps) & (carry[1][0, 0] < 9) if steps else carry[1][0, 0] < 9

        return jax.lax.while_loop(going, lambda carry: (carry[0] + 1, carry[1] @ carry[1]), (0, x))[1]

    for steps, times, unknown in ((5, 5, 0), (0, 0, 1)):
        function = jax.jit(lambda x, steps=steps: until(x, steps=steps))
        counted = hlo.work(function.lower(jax.ShapeDtypeStruct((32, 32), jnp.float32)).compile().as_text())
        assert (counted.flops, counted.unknown_loops) == (times * 2 * 32**3, unknown)


def test_a_loop_of_the_compilers_own_may_count_by_two():
    """As those do in which it makes a product of what it gathers meanwhile, window by window."""
    text = """HloModule m

%body (p: (u32[], f32[32,32])) -> (u32[], f32[32,32]) {
  %p = (u32[], f32[32,32]{1,0}) parameter(0)
  %i = u32[] get-tuple-element(%p), index=0
  %two = u32[] constant(2)
  %next = u32[] add(%i, %two)
  %x = f32[32,32]{1,0} get-tuple-element(%p), index=1
  %y = f32[32,32]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %t = (u32[], f32[32,32]{1,0}) tuple(%next, %y)
}

%condition (p: (u32[], f32[32,32])) -> pred[] {
  %p = (u32[], f32[32,32]{1,0}) parameter(0)
  %i = u32[] get-tuple-element(%p), index=0
  %limit = u32[] constant(7)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

ENTRY %main (x: f32[32,32]) -> (u32[], f32[32,32]) {
  %x = f32[32,32]{1,0} parameter(0)
  %zero = u32[] constant(0)
  %start = (u32[], f32[32,32]{1,0}) tuple(%zero, %x)
  ROOT %loop = (u32[], f32[32,32]{1,0}) while(%start), condition=%condition, body=%body
}
"""
    assert hlo.work(text).flops == 4 * 2 * 32**3


@pytest.mark.parametrize(
    "groups, size",
    [
        ("replica_groups={}", 8), ("replica_groups={{0,1,2,3},{4,5,6,7}}", 4), ("replica_groups=[4,2]<=[8]", 2),
        ("replica_groups=mesh['data'=2,'fsdp'=4] {'fsdp'}", 4),
        ("replica_groups=mesh['a'=1,'b'=2,'c'=4], device_ids=([2,2,2]T(1,0,2)) {'b'}", 2), ("use_global_device_ids=true", 8),
    ],
)  # fmt: skip
def test_a_collective_is_among_the_devices_that_it_names_or_all(groups, size):
    text = f"""HloModule m, num_partitions=8

ENTRY %main (a: f32[64]) -> f32[64] {{
  %a = f32[64]{{0}} parameter(0)
  ROOT %r = f32[64]{{0}} all-reduce(%a), channel_id=1, {groups}, to_apply=%add
}}
"""
    assert hlo.work(text).collective == {"all-reduce": 2 * 64 * 4 * (size - 1) / size}


def test_a_collective_among_devices_that_cannot_be_read_is_not_guessed():
    text = """HloModule m, num_partitions=8

ENTRY %main (a: f32[64]) -> f32[64] {
  %a = f32[64]{0} parameter(0)
  ROOT %r = f32[64]{0} all-reduce(%a), channel_id=1, replica_groups=<new>, to_apply=%add
}
"""
    with pytest.raises(ValueError, match="replica_groups cannot be read in: .*<new>"):
        hlo.work(text)


def test_what_is_cut_out_of_a_large_array_or_written_into_it_counts_as_the_piece():
    big = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)

    def piece(x, i):
        return jax.lax.dynamic_update_slice(x, 2 * jax.lax.dynamic_slice(x, (i, 0), (1, 1024)), (i + 1, 0))

    text = jax.jit(piece, donate_argnums=0).lower(big, jax.ShapeDtypeStruct((), jnp.int32)).compile().as_text()
    assert hlo.work(text).bytes < 64 * 1024
