"""Qwen2.5-VL: image features stand in for the image tokens, then the text decoder runs."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from ares_jax.models.lora import Lora, is_lora
from ares_jax.models.qwen2_5_vl.config import Qwen25VLConfig
from ares_jax.models.qwen2_5_vl.layers import Initializer
from ares_jax.models.qwen2_5_vl.text import TextDecoder
from ares_jax.models.qwen2_5_vl.vision import VisionInputs, VisionTower
from ares_jax.params import to_flat


class Qwen25VL(nnx.Module):
    """B rows of T tokens, P pixel patches a row; K key/value heads of size H; pages of S tokens."""

    def __init__(
        self,
        config: Qwen25VLConfig,
        *,
        rngs: nnx.Rngs,
        dtype: jnp.dtype = jnp.float32,
        param_dtype: jnp.dtype = jnp.float32,
        remat: str = "none",
        lora: Lora | None = None,
    ):
        """`dtype` is the arithmetic's, `param_dtype` the storage's; `remat` names what the backward pass computes again
        (`layers.REMAT`). `lora` adds its parameters, always float32, beside the text decoder's projections."""
        init = Initializer(rngs, param_dtype)
        self.config, self.lora = config, lora
        self.visual = VisionTower(config.vision, config.text.hidden_size, init, dtype=dtype, remat=remat)
        self.text = TextDecoder(config.text, init, dtype=dtype, remat=remat, lora=lora)
        if not config.tie_word_embeddings:
            shape = (config.text.vocab_size, config.text.hidden_size)
            self.lm_head = init.normal(shape, ("vocab", "embed"), fan_in=shape[1])

    @property
    def head(self) -> Float[Array, "V D"]:
        """The output embedding, in the type of the arithmetic."""
        weight = self.text.embedding if self.config.tie_word_embeddings else self.lm_head
        return weight[...].astype(self.text.dtype)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B 3 T"],
        segment_ids: Int[Array, "B T"],
        vision: VisionInputs | None = None,
        leaf_spans: Int[Array, "B 2 T"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Returns the final hidden states. Attention is causal within a segment; segment 0 is padding.

        `leaf_spans`: the segments are trees; the numbers of the first and the last leaf below each token.
        """
        features = None if vision is None else self.visual(vision)
        return self.text(self.embed(tokens, features), positions, segment_ids, leaf_spans)

    def decode(
        self,
        tokens: Int[Array, "B"],
        positions: Int[Array, "B"],
        kv_pages: Float[Array, "L N S 2K H"],
        page_table: Int[Array, "B M"],
        lengths: Int[Array, "B"],
        layers: Sequence[dict[str, jax.Array]] | None = None,
        attention: str = "",
    ) -> tuple[Float[Array, "B D"], Float[Array, "L N S 2K H"]]:
        """Appends one token a row at slot `lengths` of its pages; returns the hidden states and the cache.

        Page 0 is trash: table entries that are not in use hold 0. `layers`, `attention`: see `TextDecoder.decode`.
        """
        return self.text.decode(self.text.embed(tokens), positions, kv_pages, page_table, lengths, layers, attention)

    def embed(
        self,
        tokens: Int[Array, "B T"],
        features: Float[Array, "B F D"] | None,
        start: Int[Array, ""] | None = None,
        count: int = 0,
    ) -> Float[Array, "B Q D"]:
        """Returns what the text decoder begins with: tokens, and image features in the place of image tokens.

        `start`: of `count` tokens from there on; without it, of all.
        """

        def part(x):
            return x if start is None else jax.lax.dynamic_slice_in_dim(x, start, count, axis=1)

        x = self.text.embed(part(tokens))
        if features is None:
            return x
        features = features.astype(x.dtype)
        c = self.config
        is_visual = (tokens == c.image_token_id) | (tokens == c.video_token_id)
        # The n-th visual token of a row takes the n-th feature of the row.
        index = part(jnp.clip(jnp.cumsum(is_visual, axis=1) - 1, 0, features.shape[1] - 1))
        return jnp.where(part(is_visual)[..., None], jnp.take_along_axis(features, index[..., None], axis=1), x)


def abstract_model(
    config: Qwen25VLConfig, *, dtype=jnp.float32, param_dtype=jnp.float32, remat: str = "none", lora: Lora | None = None
) -> Qwen25VL:
    """Returns the model with shapes in place of arrays: to restore into, to compile ahead of time."""
    types = {"dtype": dtype, "param_dtype": param_dtype}
    return nnx.eval_shape(lambda: Qwen25VL(config, rngs=nnx.Rngs(0), **types, remat=remat, lora=lora))


def new_model(
    config: Qwen25VLConfig, seed: int, *, dtype=jnp.float32, param_dtype=jnp.float32, remat: str = "none"
) -> Qwen25VL:
    """Returns a model with random weights."""

    @jax.jit
    def parameters():
        model = Qwen25VL(config, rngs=nnx.Rngs(seed), dtype=dtype, param_dtype=param_dtype, remat=remat)
        return nnx.state(model)

    model = abstract_model(config, dtype=dtype, param_dtype=param_dtype, remat=remat)
    nnx.update(model, parameters())
    return model


def new_lora(config: Qwen25VLConfig, seed: int, lora: Lora) -> dict[str, jax.Array]:
    """Returns LoRA's parameters, flat. They change nothing yet: one factor of each pair is 0."""

    @jax.jit  # the compiler leaves out what is not returned
    def parameters():
        flat = to_flat(Qwen25VL(config, rngs=nnx.Rngs(seed), lora=lora))
        return {name: value for name, value in flat.items() if is_lora(name)}

    return parameters()
