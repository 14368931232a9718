"""Attention over whole sequences. Softmax in float32."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from ares_jax.models.qwen2_5_vl import splash
from ares_jax.models.qwen2_5_vl.blockwise import attention_mask, blockwise_attention
from ares_jax.models.qwen2_5_vl.dense import dense_attention
from ares_jax.parallel.sharding import mesh_axes, platform

LONGEST_DENSE = 1024  # tokens of a row whose mask and scores are made whole
LONGEST_CUDNN = 16_384  # tokens of a row whose mask is made whole, 512 MiB: cuDNN makes no scores


def implementation(
    platform: str, dtype: jnp.dtype, length: int, head_size: int, *, causal: bool, queries: int | None = None
) -> str:
    """Returns the one that attends rows of this length: "dense", "cudnn", "splash" or "blockwise".

    Args:
      queries: of a row that one device attends at once; without it, all.
    """
    fits = length <= LONGEST_CUDNN and length % 2 == 0 and head_size <= 128 and head_size % 8 == 0
    if platform == "gpu" and dtype != jnp.float32 and fits:
        return "cudnn"
    if length <= LONGEST_DENSE:
        return "dense"
    # Splash makes a mask of the whole row: a text's fits, an image's does not, and windows leave most of its tiles out.
    if platform == "tpu" and causal and splash.takes(queries or length, length, head_size):
        return "splash"
    return "blockwise"


def self_attention(
    query: Float[Array, "B Q N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    groups: Int[Array, "B T"],
    leaf_spans: Int[Array, "B 2 T"] | None = None,
    *,
    causal: bool,
    start: Int[Array, ""] | None = None,
) -> Float[Array, "B Q N H"]:
    """Attention within the groups of each row, as `causal_mask` or, without `causal`, `same_group_mask` says.

    `start`: the queries are those of the Q tokens from there on; without it, of the whole row. What stands at padding
    (group 0) means nothing anywhere.
    """
    (rows, length, heads, size), kv_heads = query.shape, key.shape[2]
    by_row, by_head = mesh_axes("rows", rows), mesh_axes("heads", heads)
    # Without a key/value head for each part, every part of the query heads takes a copy of the one that it reads.
    parts = math.prod(by_head.values())
    if parts % kv_heads == 0 and parts > kv_heads:
        key, value = (jnp.repeat(x, parts // kv_heads, axis=2) for x in (key, value))
    elif kv_heads % parts:
        by_head = {}
    # Where heads cannot be split (7B has 28 and 4), the tensor axis splits the queries instead.
    by_token = mesh_axes("tokens", length) if by_head else mesh_axes("attended_tokens", length)
    unit = math.prod(by_token.values())
    kind = implementation(platform(), query.dtype, key.shape[1], size, causal=causal, queries=length // unit)
    marks = token_marks(groups, leaf_spans)
    mine = marks if start is None else jax.lax.dynamic_slice_in_dim(marks, start, length, axis=2)
    if kind in ("dense", "cudnn"):
        if start is None:
            mask = causal_mask(groups, leaf_spans) if causal else same_group_mask(groups)
        else:
            mask = jax.vmap(functools.partial(attention_mask, causal=causal))(mine, marks)
        return attention(query, key, value, mask, cudnn=kind == "cudnn")
    if kind == "blockwise":
        local = functools.partial(blockwise_attention, causal=causal)
    else:
        same = unit == 1 and start is None
        local = functools.partial(splash.splash_attention, segments_only=leaf_spans is None and same)
    if jax.sharding.get_abstract_mesh().empty:
        return local(query, key, value, mine, marks)
    # Every device attends its own queries of its own rows and heads, and skips the tiles that those do not need.
    row, token, head = (tuple(axes) or None for axes in (by_row, by_token, by_head))
    queries, keys = PartitionSpec(row, token, head), PartitionSpec(row, None, head)
    specs = queries, keys, keys, PartitionSpec(row, None, token), PartitionSpec(row)
    # The loops begin with zeros that vary over no axis: the check of varying axes would refuse them.
    return jax.shard_map(local, in_specs=specs, out_specs=queries, check_vma=False)(query, key, value, mine, marks)


def token_marks(groups: Int[Array, "B T"], leaf_spans: Int[Array, "B 2 T"] | None) -> Int[Array, "B 4 T"]:
    """Returns what decides who sees whom: place, group, first and last leaf of every token."""
    rows, length = groups.shape
    place = jnp.broadcast_to(jnp.arange(length), (rows, 1, length))
    spans = jnp.zeros((rows, 2, length), jnp.int32) if leaf_spans is None else leaf_spans
    return jnp.concatenate([place, groups[:, None], spans], axis=1).astype(jnp.int32)


@jax.named_scope("attention")
def attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    mask: Bool[Array, "B T S"],
    *,
    cudnn: bool = False,
) -> Float[Array, "B T N H"]:
    """Grouped-query attention: query head n reads key/value head n // (N / K). A row that sees nothing gives anything."""
    if cudnn:
        return jax.nn.dot_product_attention(query, key, value, mask=mask[:, None], implementation="cudnn")
    return dense_attention(query, key, value, mask)


def causal_mask(segment_ids: Int[Array, "B T"], leaf_spans: Int[Array, "B 2 T"] | None = None) -> Bool[Array, "B T T"]:
    """A token sees itself and what stands before it in its own segment.

    With `leaf_spans` (first and last leaf below each token) a segment is a tree: a token sees its ancestors only.
    """
    length = segment_ids.shape[1]
    mask = same_group_mask(segment_ids) & jnp.tril(jnp.ones((length, length), bool))
    if leaf_spans is None:
        return mask
    first, last = leaf_spans[:, 0], leaf_spans[:, 1]
    return mask & (first[:, None, :] <= first[:, :, None]) & (last[:, :, None] <= last[:, None, :])


def same_group_mask(ids: Int[Array, "B P"]) -> Bool[Array, "B P P"]:
    """Positions of the same group see each other (padding, group 0, sees itself: harmless and never NaN)."""
    return ids[:, :, None] == ids[:, None, :]
