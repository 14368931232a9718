"""The text decoder: grouped-query attention with biases, multimodal rotary positions, SwiGLU."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from ares_jax.models.lora import PROJECTIONS, Lora, factors
from ares_jax.models.qwen2_5_vl.attention import self_attention
from ares_jax.models.qwen2_5_vl.config import TextConfig
from ares_jax.models.qwen2_5_vl.layers import (
    Initializer,
    linear,
    linear_by_output,
    matmul,
    rms_norm,
    run_layers,
    scan_layers,
)
from ares_jax.models.qwen2_5_vl.paged import append_and_attend, copied_heads, keys_and_values
from ares_jax.models.qwen2_5_vl.rotary import apply_rotary, cos_sin, mrope_angles
from ares_jax.parallel.sharding import constrain

_ACTIVATION = ("rows", "tokens", "width")


class TextDecoder(nnx.Module):
    """Stacked parameters: the leading axis of every array under `layers` is the layer."""

    def __init__(self, config: TextConfig, init: Initializer, *, dtype: jnp.dtype, remat: str, lora: Lora | None = None):
        c, n = config, config.num_layers
        self.config, self.dtype, self.remat, self.lora = config, dtype, remat, lora
        width, inner, query, kv = c.hidden_size, c.intermediate_size, c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        self.embedding = init.normal((c.vocab_size, width), ("vocab", "embed"), fan_in=width)
        self.layers = nnx.Dict(
            norm1=init.ones((n, width), ("layers", "embed")),
            q_kernel=init.normal((n, width, query), ("layers", "embed", "heads"), fan_in=width),
            q_bias=init.zeros((n, query), ("layers", "heads")),
            k_kernel=init.normal((n, width, kv), ("layers", "embed", "kv_heads"), fan_in=width),
            k_bias=init.zeros((n, kv), ("layers", "kv_heads")),
            v_kernel=init.normal((n, width, kv), ("layers", "embed", "kv_heads"), fan_in=width),
            v_bias=init.zeros((n, kv), ("layers", "kv_heads")),
            out_kernel=init.normal((n, query, width), ("layers", "heads", "embed"), fan_in=query * 2 * n),
            norm2=init.ones((n, width), ("layers", "embed")),
            gate_kernel=init.normal((n, width, inner), ("layers", "embed", "mlp"), fan_in=width),
            up_kernel=init.normal((n, width, inner), ("layers", "embed", "mlp"), fan_in=width),
            down_kernel=init.normal((n, inner, width), ("layers", "mlp", "embed"), fan_in=inner * 2 * n),
        )
        self.norm = init.ones((width,), ("embed",))
        if lora:
            self._add_lora(lora, init.stored_as(jnp.float32))  # small, and so are its steps, which bfloat16 would lose

    def _add_lora(self, lora: Lora, init: Initializer) -> None:
        for name in PROJECTIONS:
            kernel = self.layers[f"{name}_kernel"]
            (n, inputs, outputs), (_, from_axis, to_axis) = kernel.get_value().shape, kernel.get_metadata("logical_axes")
            a, b = factors(f"{name}_kernel")
            self.layers[a] = init.normal((n, inputs, lora.rank), ("layers", from_axis, "rank"), fan_in=inputs)
            self.layers[b] = init.zeros((n, lora.rank, outputs), ("layers", "rank", to_axis))

    def embed(self, tokens: Int[Array, "..."]) -> Float[Array, "... D"]:
        return self.embedding[...].astype(self.dtype)[tokens]

    @jax.named_scope("text")
    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B 3 T"],
        segment_ids: Int[Array, "B T"],
        leaf_spans: Int[Array, "B 2 T"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Returns the normalised hidden states."""
        rotation = cos_sin(self._angles(positions))

        def layer(x, p):
            p = self._cast(p)
            query, key, value = self._project(x, p, rotation)
            return self._finish(x, self_attention(query, key, value, segment_ids, leaf_spans, causal=True), p), None

        x, _ = scan_layers(layer, x, self._stacked(), remat=self.remat)
        return rms_norm(x, self.norm[...], self.config.rms_norm_eps)

    @jax.named_scope("text")
    def prefill(
        self,
        x: Float[Array, "B Q D"],
        positions: Int[Array, "B 3 T"],
        segment_ids: Int[Array, "B T"],
        kv_pages: Float[Array, "L N S 2C H"],
        pages: Int[Array, "B M"],
        first: Int[Array, ""],
        count: int,
        layers: Sequence[dict[str, jax.Array]] | None = None,
        start: Int[Array, ""] | None = None,
        end: bool = False,
    ) -> tuple[Float[Array, "B Q D"] | None, Float[Array, "L N S 2C H"]]:
        """Runs `count` layers from layer `first` on, and writes their keys and values into `pages` (0: not needed).

        `layers`: those `count` layers, cut as for `decode`. `start`: x are whole pages of Q tokens from there on; those
        before are in the pages already. Without it x is all of the rows. `end`: the model's last layer is among them, of
        which nothing but keys and values is needed; x is None.
        """
        angles, written = self._angles(positions), pages
        if start is not None:
            angles = jax.lax.dynamic_slice_in_dim(angles, start, x.shape[1], axis=1)
            size = kv_pages.shape[2]
            written = jax.lax.dynamic_slice_in_dim(pages, start // size, x.shape[1] // size, axis=1)
        rotation = cos_sin(angles)

        def layer(carry, stacked):
            x, kv_pages = carry
            p, index = stacked
            p = self._cast(p)
            query, key, value = self._project(x, p, rotation)
            kv = copied_heads(_interleave(key, value), kv_pages.shape[3] // 2)
            paged = kv.reshape(-1, *kv_pages.shape[2:]).astype(kv_pages.dtype)
            kv_pages = kv_pages.at[index, written.reshape(-1)].set(paged)
            if start is not None:
                key, value = keys_and_values(kv_pages, index, pages, start + x.shape[1])
            return self._finish(x, self_attention(query, key, value, segment_ids, causal=True, start=start), p), kv_pages

        carry = x, kv_pages
        if layers is None:
            stacked = self._stacked(), jnp.arange(self.config.num_layers)
            carry = run_layers(layer, carry, stacked, first, count - end)
            if end:  # out of the loop, so that the compiler leaves out what is not returned
                carry = run_layers(layer, carry, stacked, first + count - 1, 1)
        else:
            for offset, p in enumerate(layers):
                carry = layer(carry, (p, first + offset))
        x, kv_pages = carry
        return None if end else x, kv_pages

    def _finish(
        self, x: Float[Array, "B T D"], mixed: Float[Array, "B T N H"], p: dict[str, jax.Array]
    ) -> Float[Array, "B T D"]:
        """Returns a layer's output."""
        mixed = self._linear(mixed.reshape(*x.shape[:2], -1), p, "out")
        return constrain(self._mlp(x + mixed, p), *_ACTIVATION)

    def decode(
        self,
        x: Float[Array, "B D"],
        positions: Int[Array, "B"],
        kv_pages: Float[Array, "L N S 2K H"],
        page_table: Int[Array, "B M"],
        lengths: Int[Array, "B"],
        layers: Sequence[dict[str, jax.Array]] | None = None,
        attention: str = "",
    ) -> tuple[Float[Array, "B D"], Float[Array, "L N S 2K H"]]:
        """One token a row; its text position is the same on all three axes. `attention`: see `paged_implementation`.

        `layers`: the stacked parameters cut into layers beforehand. CPUs and GPUs copy a layer out of its stack before
        they multiply with it, which makes a step half as long again. `x_by_output` [F, D] may stand for `x_kernel` [D, F].
        """
        rows = x.shape[0]
        rotation = cos_sin(self._angles(jnp.broadcast_to(positions[:, None, None], (rows, 3, 1))))

        # The cache is carried whole and written in place: as scanned input and output it would be copied at every step.
        def layer(carry, stacked):
            x, pages = carry
            p, index = stacked
            p = self._cast(p)
            query, key, value = self._project(x[:, None], p, rotation)
            mixed, pages = append_and_attend(
                query[:, 0], _interleave(key, value)[:, 0], pages, index, page_table, lengths, attention
            )
            return (self._mlp(x + self._linear(mixed.reshape(rows, -1), p, "out"), p), pages), None

        if layers is None:
            stacked = self._stacked(), jnp.arange(self.config.num_layers)
            (x, kv_pages), _ = jax.lax.scan(layer, (x, kv_pages), stacked)
        else:
            for index, p in enumerate(layers):
                (x, kv_pages), _ = layer((x, kv_pages), (p, index))
        return rms_norm(x, self.norm[...], self.config.rms_norm_eps), kv_pages

    def _angles(self, positions: Int[Array, "B 3 T"]) -> Float[Array, "B T F"]:
        c = self.config
        return mrope_angles(positions, head_dim=c.head_dim, section=c.mrope_section, theta=c.rope_theta)

    def _stacked(self) -> dict[str, jax.Array]:
        return {name: value[...] for name, value in self.layers.items()}

    def _cast(self, p: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return jax.tree.map(lambda a: a.astype(self.dtype), p)

    @jax.named_scope("project")
    def _project(self, x, p, rotation):
        c = self.config
        h = rms_norm(x, p["norm1"], c.rms_norm_eps)
        query, key, value = (self._linear(h, p, name).reshape(*h.shape[:-1], -1, c.head_dim) for name in "qkv")
        return apply_rotary(query, rotation), apply_rotary(key, rotation), value

    @jax.named_scope("mlp")
    def _mlp(self, x, p):
        h = rms_norm(x, p["norm2"], self.config.rms_norm_eps)
        return x + self._linear(jax.nn.silu(self._linear(h, p, "gate")) * self._linear(h, p, "up"), p, "down")

    def _linear(self, x, p, name):
        bias, by_output = p.get(f"{name}_bias"), p.get(f"{name}_by_output")
        if by_output is not None:
            out = linear_by_output(x, by_output, bias)
        else:
            kernel = p[f"{name}_kernel"]
            out = matmul(x, kernel) if bias is None else linear(x, kernel, bias)
        if not self.lora:
            return out
        a, b = factors(f"{name}_kernel")
        return out + self.lora.scale * matmul(matmul(x, p[a]), p[b])


def _interleave(key: Float[Array, "B T K H"], value: Float[Array, "B T K H"]) -> Float[Array, "B T 2K H"]:
    stacked = jnp.stack([key, value], axis=3)
    return stacked.reshape(*key.shape[:2], -1, key.shape[3])
