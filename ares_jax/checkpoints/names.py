"""Hugging Face's names and shapes of Qwen2.5-VL's tensors, and where each lives in our parameters.

Ours are stacked over layers and kernels are `[in, out]`; theirs are one tensor a layer and `[out, in]`, the patch embedding
a 3-D convolution.
"""

import functools
import re
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from ares_jax.models.qwen2_5_vl import Qwen25VLConfig
from ares_jax.models.qwen2_5_vl.model import abstract_model
from ares_jax.params import to_flat

EMBEDDING, HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"

_TEXT_LAYER = {
    "norm1": "input_layernorm.weight", "norm2": "post_attention_layernorm.weight",
    "q_kernel": "self_attn.q_proj.weight", "q_bias": "self_attn.q_proj.bias",
    "k_kernel": "self_attn.k_proj.weight", "k_bias": "self_attn.k_proj.bias",
    "v_kernel": "self_attn.v_proj.weight", "v_bias": "self_attn.v_proj.bias",
    "out_kernel": "self_attn.o_proj.weight", "gate_kernel": "mlp.gate_proj.weight",
    "up_kernel": "mlp.up_proj.weight", "down_kernel": "mlp.down_proj.weight",
}  # fmt: skip
_VISION_LAYER = {
    "norm1": "norm1.weight", "norm2": "norm2.weight", "qkv_kernel": "attn.qkv.weight", "qkv_bias": "attn.qkv.bias",
    "out_kernel": "attn.proj.weight", "out_bias": "attn.proj.bias", "gate_kernel": "mlp.gate_proj.weight",
    "gate_bias": "mlp.gate_proj.bias", "up_kernel": "mlp.up_proj.weight", "up_bias": "mlp.up_proj.bias",
    "down_kernel": "mlp.down_proj.weight", "down_bias": "mlp.down_proj.bias",
}  # fmt: skip
_LAYERS = {
    "text": ("model.language_model.layers.", _TEXT_LAYER),
    "visual": ("model.visual.blocks.", _VISION_LAYER),
}
_SINGLE = {
    "text.embedding": EMBEDDING, "text.norm": "model.language_model.norm.weight", "lm_head": HEAD,
    "visual.patch_embed": "model.visual.patch_embed.proj.weight",
    "visual.merger_norm": "model.visual.merger.ln_q.weight",
    "visual.merger_in_kernel": "model.visual.merger.mlp.0.weight",
    "visual.merger_in_bias": "model.visual.merger.mlp.0.bias",
    "visual.merger_out_kernel": "model.visual.merger.mlp.2.weight",
    "visual.merger_out_bias": "model.visual.merger.mlp.2.bias",
}  # fmt: skip


@dataclass(frozen=True)
class Slot:
    """The place of one of their tensors: our parameter, and the layer where that is stacked."""

    ours: str
    layer: int | None
    shape: tuple[int, ...]  # theirs

    def to_ours(self, theirs: np.ndarray) -> np.ndarray:
        """Returns a view in our layout, of one layer."""
        if self.ours == "visual.patch_embed":
            return theirs.reshape(theirs.shape[0], -1).T
        return theirs.T if self.ours.endswith("_kernel") else theirs

    def to_theirs(self, ours: np.ndarray) -> np.ndarray:
        """Returns the tensor, contiguous, from one layer of ours."""
        transposed = ours.T if self.ours.endswith("_kernel") or self.ours == "visual.patch_embed" else ours
        return np.ascontiguousarray(transposed).reshape(self.shape)


@functools.cache
def slots(config: Qwen25VLConfig) -> dict[str, Slot]:
    """Returns every tensor of the model by its name in the newer layout, layer after layer."""
    found = {}
    for name, value in to_flat(abstract_model(config, dtype=jnp.float32)).items():
        tower, _, leaf = name.partition(".layers.")
        if leaf:
            prefix, layer_names = _LAYERS[tower]
            shape = _their_shape(name, value.shape[1:], config)
            for layer in range(value.shape[0]):
                found[f"{prefix}{layer}.{layer_names[leaf]}"] = Slot(name, layer, shape)
        else:
            found[_SINGLE[name]] = Slot(name, None, _their_shape(name, value.shape, config))
    return dict(sorted(found.items(), key=lambda item: (item[1].ours.split(".")[0], item[1].layer or 0)))


def new_layout(name: str) -> str:
    """Returns a tensor's name in the layout of transformers 4.52 and later; older checkpoints hold shorter ones."""
    name = re.sub(r"^visual\.", "model.visual.", name)
    return re.sub(r"^model\.(?=layers\.|embed_tokens\.|norm\.)", "model.language_model.", name)


def _their_shape(name: str, shape: tuple[int, ...], config: Qwen25VLConfig) -> tuple[int, ...]:
    v = config.vision
    if name == "visual.patch_embed":
        return (v.hidden_size, v.in_channels, v.temporal_patch_size, v.patch_size, v.patch_size)
    return shape[::-1] if name.endswith("_kernel") else shape
