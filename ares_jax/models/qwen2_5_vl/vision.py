"""The vision tower: pixel patches to one vector per merged token. Window attention, full attention in a few layers."""

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jaxtyping import Array, Float, Int

from ares_jax.models.qwen2_5_vl.attention import self_attention
from ares_jax.models.qwen2_5_vl.config import VisionConfig
from ares_jax.models.qwen2_5_vl.layers import Initializer, linear, matmul, rms_norm, run_layers, scan_layers
from ares_jax.models.qwen2_5_vl.rotary import apply_rotary, cos_sin, vision_angles
from ares_jax.parallel.sharding import constrain

_EPS = 1e-6
_ACTIVATION = ("rows", "tokens", "width")


@struct.dataclass
class VisionInputs:
    """The patches of each row of a batch, in the image processor's order, and `data_pipeline.vision_layout` of them."""

    patches: Float[Array, "B P 1176"]
    position_hw: Int[Array, "B P 2"]
    window_ids: Int[Array, "B P"]
    frame_ids: Int[Array, "B P"]


class VisionTower(nnx.Module):
    """Stacked parameters: the leading axis of every array under `layers` is the layer."""

    def __init__(self, config: VisionConfig, out_size: int, init: Initializer, *, dtype: jnp.dtype, remat: str):
        c, n = config, config.num_layers
        self.config, self.dtype, self.remat = config, dtype, remat
        width, inner, merged = c.hidden_size, c.intermediate_size, c.hidden_size * c.spatial_merge_size**2
        self.patch_embed = init.normal((c.patch_values, width), ("patch", "vision"), fan_in=c.patch_values)
        self.layers = nnx.Dict(
            norm1=init.ones((n, width), ("layers", "vision")),
            qkv_kernel=init.normal((n, width, 3 * width), ("layers", "vision", "vision_heads"), fan_in=width),
            qkv_bias=init.zeros((n, 3 * width), ("layers", "vision_heads")),
            out_kernel=init.normal((n, width, width), ("layers", "vision_heads", "vision"), fan_in=width * 2 * n),
            out_bias=init.zeros((n, width), ("layers", "vision")),
            norm2=init.ones((n, width), ("layers", "vision")),
            gate_kernel=init.normal((n, width, inner), ("layers", "vision", "vision_mlp"), fan_in=width),
            gate_bias=init.zeros((n, inner), ("layers", "vision_mlp")),
            up_kernel=init.normal((n, width, inner), ("layers", "vision", "vision_mlp"), fan_in=width),
            up_bias=init.zeros((n, inner), ("layers", "vision_mlp")),
            down_kernel=init.normal((n, inner, width), ("layers", "vision_mlp", "vision"), fan_in=inner * 2 * n),
            down_bias=init.zeros((n, width), ("layers", "vision")),
        )
        self.merger_norm = init.ones((width,), ("vision",))
        self.merger_in_kernel = init.normal((merged, merged), ("vision", "vision_mlp"), fan_in=merged)
        self.merger_in_bias = init.zeros((merged,), ("vision_mlp",))
        self.merger_out_kernel = init.normal((merged, out_size), ("vision_mlp", "embed"), fan_in=merged)
        self.merger_out_bias = init.zeros((out_size,), ("embed",))

    @jax.named_scope("vision")
    def __call__(self, inputs: VisionInputs) -> Float[Array, "B M D"]:
        """Returns the features of the merged tokens, M = P / 4, in the order of their patches; padding gives anything."""
        layer = self._layer(inputs)
        x = self.embed_patches(inputs)
        x, _ = scan_layers(lambda *state: (layer(*state), None), x, self._stacked(), remat=self.remat)
        return self.merge_patches(x)

    def embed_patches(self, inputs: VisionInputs) -> Float[Array, "B P W"]:
        """Returns what the first layer takes."""
        return matmul(inputs.patches.astype(self.dtype), self.patch_embed[...].astype(self.dtype))

    @jax.named_scope("vision")
    def run_layers(
        self, x: Float[Array, "B P W"], inputs: VisionInputs, first: Int[Array, ""], count: int
    ) -> Float[Array, "B P W"]:
        """Runs `count` layers from layer `first` on."""
        return run_layers(self._layer(inputs), x, self._stacked(), first, count)

    def _stacked(self):
        c = self.config
        full = jnp.array([layer in c.full_attention_layers for layer in range(c.num_layers)])
        return {name: value[...] for name, value in self.layers.items()}, full

    def _layer(self, inputs: VisionInputs):
        c = self.config
        rows, count = inputs.frame_ids.shape
        rotation = cos_sin(vision_angles(inputs.position_hw, head_dim=c.head_dim))

        def layer(x, stacked):
            p, full = stacked
            p = jax.tree.map(lambda a: a.astype(self.dtype), p)
            h = rms_norm(x, p["norm1"], _EPS)
            qkv = linear(h, p["qkv_kernel"], p["qkv_bias"]).reshape(rows, count, 3, c.num_heads, c.head_dim)
            query, key = apply_rotary(qkv[:, :, 0], rotation), apply_rotary(qkv[:, :, 1], rotation)
            groups = jnp.where(full, inputs.frame_ids, inputs.window_ids)
            mixed = self_attention(query, key, qkv[:, :, 2], groups, causal=False)
            x = x + linear(mixed.reshape(x.shape), p["out_kernel"], p["out_bias"])
            h = rms_norm(x, p["norm2"], _EPS)
            h = jax.nn.silu(linear(h, p["gate_kernel"], p["gate_bias"])) * linear(h, p["up_kernel"], p["up_bias"])
            return constrain(x + linear(h, p["down_kernel"], p["down_bias"]), *_ACTIVATION)

        return layer

    def merge_patches(self, x: Float[Array, "B P W"]) -> Float[Array, "B M D"]:
        """Returns the features that the last layer's output makes."""
        merged = x.shape[1] // self.config.spatial_merge_size**2
        x = rms_norm(x, self.merger_norm[...], _EPS).reshape(x.shape[0], merged, -1)
        inner, outer = (
            [value[...].astype(self.dtype) for value in pair]
            for pair in ((self.merger_in_kernel, self.merger_in_bias), (self.merger_out_kernel, self.merger_out_bias))
        )
        return linear(jax.nn.gelu(linear(x, *inner), approximate=False), *outer)
