"""Attention of one query token a row over its pages, for GPUs: a Pallas kernel through Triton, on the cache as it is.

JAX's own kernel for GPUs wants keys and values apart and heads before pages: a transposed copy of the cache. Here a program
has the query heads of one key/value head of a row, and a share of its tokens, whose pages it finds in the table; the shares
are merged by XLA, as their numbers are few. Interpreted and lowered to Triton in the tests; never run on a GPU.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from kernels.logits import precision

TOKENS = 64  # attended at a time; pages may be of any size
SHARES = 8  # of a row's tokens: few rows would leave most of a GPU idle
LEAST = 16  # rows of a matrix product
LOWEST = -3.0e38  # stands for -inf where -inf - -inf would be NaN


def fits(head_size: int) -> bool:
    """Returns whether the kernel is made for heads of this size: Triton's blocks are powers of two."""
    return head_size >= LEAST and head_size & (head_size - 1) == 0


def attend_pages(
    query: Float[Array, "B N H"],
    kv_pages: Float[Array, "L N S 2K H"],
    layer: Int[Array, ""],
    page_table: Int[Array, "B M"],
    lengths: Int[Array, "B"],
    *,
    interpret: bool = False,
) -> Float[Array, "B N H"]:
    """As `paged.paged_attention`; a program reads no token beyond a row's length, but for the rest of a block."""
    (rows, heads, size), slots, groups = query.shape, kv_pages.shape[2], kv_pages.shape[3] // 2
    group = heads // groups
    padded = max(LEAST, pl.next_power_of_2(group))
    blocks = pl.cdiv(page_table.shape[1] * slots, TOKENS)
    each = pl.cdiv(blocks, SHARES)
    shares = pl.cdiv(blocks, each)
    grouped = jnp.pad(query.reshape(rows, groups, group, size), ((0, 0), (0, 0), (0, padded - group), (0, 0)))

    def whole(x):
        return pl.BlockSpec(x.shape, lambda *_: (0,) * x.ndim)

    def out(*last):
        block = pl.BlockSpec((None, None, None, *last), lambda b, k, share: (share, b, k, *(0 for _ in last)))
        return block, jax.ShapeDtypeStruct((shares, rows, groups, *last), jnp.float32)

    specs, shapes = zip(out(padded, size), out(padded), out(padded), strict=True)
    layer = jnp.asarray(layer, jnp.int32)[None]
    summed, total, top = pl.pallas_call(
        functools.partial(_attend, each=each, page_size=slots),
        grid=(rows, groups, shares),
        in_specs=[
            pl.BlockSpec((None, None, padded, size), lambda b, k, share: (b, k, 0, 0)),
            *map(whole, (kv_pages, layer, page_table, lengths)),
        ],
        out_specs=specs,
        out_shape=shapes,
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="attend_pages",
    )(grouped, kv_pages, layer, page_table, lengths)
    weights = jnp.exp(top - top.max(axis=0))
    mixed = jnp.sum(summed * weights[..., None], axis=0) / jnp.sum(total * weights, axis=0)[..., None]
    return mixed[:, :, :group].reshape(rows, heads, size).astype(query.dtype)


def _attend(query_ref, kv_ref, layer_ref, table_ref, length_ref, summed_ref, total_ref, top_ref, *, each, page_size):
    row, head, share = (pl.program_id(axis) for axis in range(3))
    query, length, layer = query_ref[...], length_ref[row], layer_ref[0]
    last_page = table_ref.shape[1] - 1

    def look(block, carry):
        summed, total, top = carry
        place = block * TOKENS + jnp.arange(TOKENS)
        seen = place < length
        page, slot = table_ref[row, jnp.minimum(place // page_size, last_page)], place % page_size
        key, value = (kv_ref[layer, page, slot, 2 * head + i, :].astype(query.dtype) for i in range(2))
        scores = plgpu.dot(query, key, trans_b=True, precision=precision(query)) * query.shape[1] ** -0.5
        scores = jnp.where(seen[None], scores, LOWEST)
        new = jnp.maximum(top, jnp.max(scores, axis=1))
        weights = jnp.where(seen[None], jnp.exp(scores - new[:, None]), 0.0)
        decay = jnp.exp(top - new)
        value = jnp.where(seen[:, None], value, 0)  # others may have left NaN there
        product = plgpu.dot(weights.astype(value.dtype), value, precision=precision(value))
        return summed * decay[:, None] + product, total * decay + jnp.sum(weights, axis=1), new

    nothing = jnp.zeros(query.shape, jnp.float32)
    zeros, lowest = jnp.zeros(query.shape[0], jnp.float32), jnp.full(query.shape[0], LOWEST, jnp.float32)
    end = jnp.minimum((share + 1) * each, (length + TOKENS - 1) // TOKENS)
    results = jax.lax.fori_loop(share * each, end, look, (nothing, zeros, lowest))
    for ref, result in zip((summed_ref, total_ref, top_ref), results, strict=True):
        ref[...] = result
