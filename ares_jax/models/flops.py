"""Floating-point operations of the model's matrix products, by hand: a compiler counts the body of a loop only once."""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ares_jax.models.qwen2_5_vl import Qwen25VLConfig
from ares_jax.models.qwen2_5_vl.model import abstract_model
from ares_jax.params import to_flat
from data_pipeline.packing import Segment

_WINDOW = 64  # patches of a window, 8 x 8
_RECOMPUTED = {"none": 0, "dots": 0, "full": 1, "offload": 1}  # forward passes again, by `model.remat`


class Flops(NamedTuple):
    """Operations of a pass: weights of the layers, attention, and the LM head."""

    weights: float
    attention: float
    head: float

    def times(self, factor: float) -> "Flops":
        return Flops(*(factor * x for x in self))


def forward_flops(config: Qwen25VLConfig, *, tokens: float, patches: float, context: float, frame: float) -> Flops:
    """Returns those of one pass over `tokens` tokens and `patches` pixel patches.

    Args:
      context: tokens that a token attends to on average; half a segment's length where it sees what stands before it.
      frame: patches of an image, which all attend to each other in the layers with full attention.
    """
    t, v = config.text, config.vision
    sizes = _sizes(config)
    text = sum(size for name, size in sizes.items() if name.startswith("text."))
    merger = sum(size for name, size in sizes.items() if name.startswith("visual.merger"))
    vision = sum(size for name, size in sizes.items() if name.startswith("visual.layers"))
    vision += v.patch_values * v.hidden_size
    full = len(v.full_attention_layers)
    seen = full * min(frame, patches) + (v.num_layers - full) * min(_WINDOW, patches)
    weights = 2 * text * tokens + 2 * vision * patches + 2 * merger * (patches / v.spatial_merge_size**2)
    attention = 4 * t.num_layers * t.num_heads * t.head_dim * tokens * context + 4 * v.hidden_size * patches * seen
    return Flops(weights, attention, 2 * t.hidden_size * t.vocab_size * tokens)


@functools.cache
def _sizes(config: Qwen25VLConfig) -> dict[str, int]:
    return {name: math.prod(value.shape) for name, value in to_flat(abstract_model(config)).items() if "kernel" in name}


def gradient_flops(forward: Flops, *, remat: str) -> Flops:
    """Returns those that a loss and its gradient are made of, with what is computed again.

    The head's logits always are, and so are the scores of attention, besides what `remat` says.
    """
    again = _RECOMPUTED[remat]
    return Flops((3 + again) * forward.weights, (3.5 + again) * forward.attention, 4 * forward.head)


def model_flops(forward: Flops) -> float:
    """Returns those of a loss and its gradient without anything computed twice: what MFU counts."""
    return 3 * sum(forward)


def update_flops(
    config: Qwen25VLConfig, segments: Sequence[Segment], *, fixed_passes: int = 0, freeze_vision: bool = False
) -> float:
    """Returns those of an update on these segments, padding and recomputation left out.

    Args:
      fixed_passes: passes over weights that are not trained, for log-probabilities.
      freeze_vision: the vision tower is not trained either.
    """
    tokens = sum(len(s.token_ids) for s in segments)
    patches = sum(len(s.patches) for s in segments)
    frames = np.concatenate([np.repeat(s.grid_thw[:, 1] * s.grid_thw[:, 2], s.grid_thw[:, 0]) for s in segments])
    frame = float(np.sum(frames.astype(float) ** 2)) / max(patches, 1)
    context = sum(map(_seen, segments)) / tokens
    text = sum(forward_flops(config, tokens=tokens, patches=0, context=context, frame=0))
    whole = sum(forward_flops(config, tokens=tokens, patches=patches, context=context, frame=frame))
    return 3 * text + (1 if freeze_vision else 3) * (whole - text) + fixed_passes * whole


def _seen(segment: Segment) -> int:
    """Returns how many pairs of tokens attend: a token sees itself and what leads to it."""
    count = len(segment.token_ids)
    back = segment.token_fields.get("predictor_offset", np.ones(count, int))
    depth = np.arange(1, count + 1)
    for start in np.flatnonzero(back != 1)[1 if back[0] != 1 else 0 :]:
        depth[start:] = depth[start - back[start]] + np.arange(1, count - start + 1)
    return int(depth.sum())
