"""JAX's splash attention, a Pallas kernel for TPUs: causal, within segments or along the branches of trees."""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask
from jaxtyping import Array, Float, Int

from ares_jax.models.qwen2_5_vl.blockwise import attention_mask

BLOCK = 512  # tokens a side of a tile
LANES = 128  # what the kernel wants a head's size to be a multiple of


def takes(queries: int, keys: int, head_size: int, block: int = BLOCK) -> bool:
    """Returns whether the kernel is made for rows of so many queries and keys, and heads of this size."""
    return queries % block == 0 and keys % block == 0 and head_size % LANES == 0


def splash_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    query_marks: Int[Array, "B 4 T"],
    key_marks: Int[Array, "B 4 S"],
    *,
    segments_only: bool,
    block: int = BLOCK,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Causal grouped-query attention, differentiable in query, key and value; `takes` says for which shapes.

    Args:
      query_marks, key_marks: place, group, first and last leaf of every token, as `blockwise.attention_mask` reads them.
      segments_only: the groups are no trees, and queries and keys are the same tokens. The mask is then computed tile by
        tile; otherwise it is made whole, T x S bytes a row, and tiles in which nobody sees anybody are left out.
    """
    sizes = splash_attention_kernel.BlockSizes(
        block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block
    )

    def kernel(mask):
        made = splash_attention_kernel.make_splash_mha(
            mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, residual_checkpoint_name="attention", interpret=interpret
        )
        # jax 0.10 makes an array of this flag, and then asks whether it is true.
        for name in ("fwd_mask_info", "dq_mask_info", "dkv_mask_info"):
            setattr(made, name, getattr(made, name)._replace(is_dynamic_mask=isinstance(mask, jax.Array)))
        return made

    by_head = tuple(x.swapaxes(1, 2) for x in ((query * query.shape[-1] ** -0.5).astype(query.dtype), key, value))
    if segments_only:
        causal = splash_attention_mask.CausalMask((query.shape[1], key.shape[1]))
        ids = splash_attention_kernel.SegmentIds(query_marks[:, 1], key_marks[:, 1])
        out = jax.vmap(kernel(splash_attention_mask.MultiHeadMask([causal] * query.shape[2])))(*by_head, ids)
    else:

        def row(operands):
            query, key, value, query_marks, key_marks = operands
            # One mask for all heads. Padding sees itself: a row of a mask must not be empty.
            return kernel(attention_mask(query_marks, key_marks, causal=True)[None])(query, key, value)

        out = jax.lax.map(row, (*by_head, query_marks, key_marks))
    return jnp.swapaxes(out, 1, 2)
