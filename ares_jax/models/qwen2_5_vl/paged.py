"""The paged cache, and one query token a row over it: kernels, or a gather of the pages. Softmax in float32.

The cache is [layers, pages, slots of a page, 2 x key/value heads, head size]: key of head k at 2k, value at 2k + 1. On a
mesh it is split by heads: each device attends with its own query heads, and nothing of the cache crosses devices.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from ares_jax.errors import UserError
from ares_jax.models.qwen2_5_vl import paged_gpu
from ares_jax.parallel.sharding import mesh_axes, platform

PAGED_ATTENTION = ("ragged", "triton", "gather")
TABLE_BYTES = 2**19  # of a page table given to one call of the kernel: it lies in scalar memory, 1 MiB
BLOCK_TOKENS = 512  # fetched at once, twice: a fetch overshoots a row's end by half of this on average
BLOCK_PAGES = 16  # at most: each page is a copy with its own scalar registers, of which there are 32


def paged_implementation(platform: str, dtype: jnp.dtype, kv_heads: int, head_size: int, wanted: str = "") -> str:
    """Returns "ragged" (JAX's kernel for TPUs), "triton" (ours for GPUs) or "gather".

    `wanted` (`sampler.paged_attention`) names one; "" takes "ragged" where it can be, otherwise "gather": "triton" was
    never timed. Raises `UserError` where what is wanted cannot be.
    """
    packed = 4 // jnp.dtype(dtype).itemsize  # values in a word
    words = 2 * kv_heads // packed
    tiled = 2 * kv_heads % packed == 0 and (words in (1, 2, 4) or words % 8 == 0)
    fits = dtype in (jnp.float32, jnp.bfloat16) and head_size % 128 == 0 and tiled
    possible = ["gather"]
    if platform == "tpu" and fits:
        possible.insert(0, "ragged")
    if platform == "gpu" and paged_gpu.fits(head_size):
        possible.append("triton")
    if wanted and wanted not in possible:
        raise UserError(
            f"sampler.paged_attention={wanted!r}: on a {platform}, with {kv_heads} key/value heads of size {head_size} in "
            f"{jnp.dtype(dtype).name} on a device, give {' or '.join(map(repr, possible))}"
        )
    return wanted or possible[0]


def cached_heads(heads: int, kv_heads: int, parts: int) -> int:
    """Returns the key/value heads that the cache of `parts` devices holds.

    With more devices than key/value heads each device has a copy of the one that its query heads read. Where the query
    heads cannot be split (7B has 28) the cache holds what it would on one device, and every device has all of it.
    """
    return parts if parts % kv_heads == 0 and heads % parts == 0 else kv_heads


def cache_spec(kv_heads: int) -> PartitionSpec:
    """Returns how the mesh in use splits a cache with so many (`cached_heads`) key/value heads."""
    return PartitionSpec(None, None, None, tuple(mesh_axes("kv_heads", kv_heads)) or None)


def copied_heads(kv: Float[Array, "... 2K H"], cache_heads: int) -> Float[Array, "... 2C H"]:
    """Returns keys and values with each head as often as the cache holds it."""
    copies = 2 * cache_heads // kv.shape[-2]
    if copies == 1:
        return kv
    pairs = kv.reshape(*kv.shape[:-2], -1, 2, kv.shape[-1])
    return jnp.repeat(pairs, copies, axis=-3).reshape(*kv.shape[:-2], -1, kv.shape[-1])


def keys_and_values(
    kv_pages: Float[Array, "L N S 2C H"], layer: Int[Array, ""], pages: Int[Array, "B M"], length: Int[Array, ""]
) -> tuple[Float[Array, "B T C H"], Float[Array, "B T C H"]]:
    """Returns the first `length` tokens that a layer holds in the pages of every row, and zeros up to T = M S.

    What others left behind them may be NaN, and that times a weight of 0 is NaN. On a mesh each device has its own heads.
    """
    heads = kv_pages.shape[3] // 2
    rows = kv_pages[layer, pages].reshape(pages.shape[0], -1, heads, 2, kv_pages.shape[4])
    rows = jnp.where((jnp.arange(rows.shape[1]) < length)[:, None, None, None], rows, 0)
    return rows[..., 0, :], rows[..., 1, :]


def append_and_attend(
    query: Float[Array, "B N H"],
    kv: Float[Array, "B 2K H"],
    kv_pages: Float[Array, "L N S 2C H"],
    layer: Int[Array, ""],
    page_table: Int[Array, "B M"],
    lengths: Int[Array, "B"],
    wanted: str = "",
) -> tuple[Float[Array, "B N H"], Float[Array, "L N S 2C H"]]:
    """Stores one token a row behind its `lengths` tokens and attends to all of them. Returns that and the cache.

    `wanted`: see `paged_implementation`.
    """
    kv = copied_heads(kv, kv_pages.shape[3] // 2)

    def local(query, kv, kv_pages, layer, page_table, lengths):
        kv_pages = write_page_slot(kv_pages, layer, kv, page_table, lengths)
        return paged_attention(query, kv_pages, layer, page_table, lengths + 1, wanted), kv_pages

    arguments = (query, kv, kv_pages, jnp.asarray(layer), page_table, lengths)
    if jax.sharding.get_abstract_mesh().empty:
        return local(*arguments)
    cache = cache_spec(kv_pages.shape[3] // 2)
    rows, whole = PartitionSpec(None, cache[3]), PartitionSpec()
    specs = (rows, rows, cache, whole, whole, whole)
    return jax.shard_map(local, in_specs=specs, out_specs=(rows, cache), check_vma=False)(*arguments)


def write_page_slot(
    kv_pages: Float[Array, "L N S 2K H"],
    layer: Int[Array, ""],
    kv: Float[Array, "B 2K H"],
    page_table: Int[Array, "B M"],
    lengths: Int[Array, "B"],
) -> Float[Array, "L N S 2K H"]:
    """Stores one token a row at its logical slot `lengths`. Rows whose table holds page 0 write to that page: trash."""
    size = kv_pages.shape[2]
    page = jnp.take_along_axis(page_table, (lengths // size)[:, None], axis=1)[:, 0]
    return kv_pages.at[layer, page, lengths % size].set(kv.astype(kv_pages.dtype))


@jax.named_scope("paged_attention")
def paged_attention(
    query: Float[Array, "B N H"],
    kv_pages: Float[Array, "L N S 2K H"],
    layer: Int[Array, ""],
    page_table: Int[Array, "B M"],
    lengths: Int[Array, "B"],
    wanted: str = "",
) -> Float[Array, "B N H"]:
    """One query token a row over the first `lengths` (at least 1) tokens of its pages."""
    kind = paged_implementation(platform(), kv_pages.dtype, kv_pages.shape[3] // 2, kv_pages.shape[4], wanted)
    attend = {"ragged": ragged_attention, "triton": paged_gpu.attend_pages, "gather": gathered_attention}[kind]
    return attend(query, kv_pages, layer, page_table, lengths)


def ragged_attention(
    query: Float[Array, "B N H"],
    kv_pages: Float[Array, "L N S 2K H"],
    layer: Int[Array, ""],
    page_table: Int[Array, "B M"],
    lengths: Int[Array, "B"],
) -> Float[Array, "B N H"]:
    """As `paged_attention`, by JAX's kernel, which reads no page beyond a row's length, but for the rest of a block."""
    (rows, width), (_, pages, slots, _, size) = page_table.shape, kv_pages.shape
    # All layers are one cache to the kernel, and a layer an offset of page numbers: a slice of it would be a copy.
    cache, table = kv_pages.reshape(-1, *kv_pages.shape[2:]), page_table + layer * pages
    at_once = max(1, TABLE_BYTES // (4 * -(-width // 128) * 128))
    out = []
    for begin in range(0, rows, at_once):
        part = slice(begin, begin + at_once)
        count = lengths[part].shape[0]
        # A block of queries attends all keys of each of its rows: more than one would be work for nothing.
        attended = ragged_paged_attention(
            query[part], cache, lengths[part], table[part], jnp.arange(count + 1, dtype=jnp.int32),
            jnp.array([count], jnp.int32), sm_scale=size**-0.5, num_queries_per_block=1,
            num_kv_pages_per_block=min(width, BLOCK_PAGES, max(1, BLOCK_TOKENS // slots)),
        )  # fmt: skip
        out.append(attended)
    return out[0] if len(out) == 1 else jnp.concatenate(out)


def gathered_attention(
    query: Float[Array, "B N H"],
    kv_pages: Float[Array, "L N S 2K H"],
    layer: Int[Array, ""],
    page_table: Int[Array, "B M"],
    lengths: Int[Array, "B"],
) -> Float[Array, "B N H"]:
    """As `paged_attention`; every row reads all the pages of its table."""
    rows, heads, size = query.shape
    groups = kv_pages.shape[3] // 2
    head = jnp.arange(groups)[None, :, None]
    # One gather each brings keys and values into the order that the products need: no transposed copy.
    key, value = (kv_pages[layer, page_table[:, None], :, 2 * head + i].reshape(rows, groups, -1, size) for i in range(2))
    grouped = query.reshape(rows, groups, heads // groups, size)
    scores = jnp.einsum("BKGH,BKSH->BKGS", grouped, key, preferred_element_type=jnp.float32)
    visible = jnp.arange(key.shape[2]) < lengths[:, None]
    scores = jnp.where(visible[:, None, None], scores * size**-0.5, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(query.dtype)
    value = jnp.where(visible[:, None, :, None], value, 0)  # others may have left NaN there
    mixed = jnp.einsum("BKGS,BKSH->BKGH", weights, value, preferred_element_type=jnp.float32)
    return mixed.astype(query.dtype).reshape(rows, heads, size)
