"""Operations by hand against what XLA counts where there is no loop, and against the mask."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ares_jax.models.flops import _seen, forward_flops, gradient_flops, model_flops, update_flops
from ares_jax.models.qwen2_5_vl import Qwen25VLConfig, TextConfig, VisionConfig, VisionInputs
from ares_jax.models.qwen2_5_vl.attention import causal_mask
from ares_jax.models.qwen2_5_vl.model import abstract_model
from ares_jax.parallel.chips import peak_flops, utilization
from data_pipeline.packing import response_segment
from data_pipeline.tree_layout import tree_layout
from data_pipeline.tree_segments import tree_segment
from tests import digits


def test_a_pass_costs_what_the_compiler_counts():
    """One layer each: XLA counts the body of the scan over layers once. It counts dense attention whole."""
    text = TextConfig(64, 256, 1024, 1, 4, 2, (8, 12, 12))
    config = Qwen25VLConfig(text, VisionConfig(128, 512, 1, 2, (0,)), 1, 2, 3, 4)
    tokens, patches = 128, 64
    model = abstract_model(config)
    ids = jax.ShapeDtypeStruct((1, patches), jnp.int32)
    vision = VisionInputs(
        jax.ShapeDtypeStruct((1, patches, 1176), jnp.float32), jax.ShapeDtypeStruct((1, patches, 2), jnp.int32), ids, ids
    )
    line = jax.ShapeDtypeStruct((1, tokens), jnp.int32)

    def forward(model, *inputs):
        hidden = model(*inputs)
        return hidden @ model.head.T

    positions = jax.ShapeDtypeStruct((1, 3, tokens), jnp.int32)
    counted = jax.jit(forward).lower(model, line, positions, line, vision).cost_analysis()["flops"]
    mine = forward_flops(config, tokens=tokens, patches=patches, context=tokens, frame=patches)
    assert sum(mine) == pytest.approx(counted, rel=0.03)
    assert gradient_flops(mine, remat="none")[0] == 3 * mine.weights < gradient_flops(mine, remat="full")[0]
    assert model_flops(mine) < sum(gradient_flops(mine, remat="none"))


def test_the_pairs_that_attend_are_those_of_the_mask():
    (prompt,) = digits.prompts(1)
    leaves = [np.arange(9), np.arange(7), np.arange(8), np.arange(5)]
    layout = tree_layout([-1, 0, 1, -1], [0, 3, 5, 0], list(map(len, leaves)))
    tokens = np.zeros(len(layout.first_leaf), int)
    tree = tree_segment(prompt, tokens, layout.first_leaf, layout.last_leaf, layout.predictor, {})
    spans = jnp.array([[tree.token_fields["first_leaf"], tree.token_fields["last_leaf"]]])
    ones = jnp.ones((1, len(tree.token_ids)), int)
    assert _seen(tree) == causal_mask(ones, spans).sum()
    line = response_segment(prompt, np.arange(5), {})
    assert _seen(line) == causal_mask(jnp.ones((1, len(line.token_ids)), int)).sum()
    config = digits.model().config
    whole, frozen, guided = (
        update_flops(config, [tree, line], freeze_vision=f, fixed_passes=n) for f, n in ((False, 0), (True, 0), (False, 1))
    )
    assert guided == pytest.approx(4 / 3 * whole) and whole / 3 < frozen < whole


def test_mfu_is_left_out_where_the_peak_is_not_known():
    assert utilization(1e12, 1.0, jax.devices()) == {}
    assert (peak_flops("TPU v5 lite"), peak_flops("TPU v5"), peak_flops("TPU v5p")) == (197e12, 459e12, 459e12)
    assert peak_flops("NVIDIA H200") == 989e12

    class Device:
        device_kind = "TPU v4"

    assert utilization(275e12, 1.0, [Device(), Device()]) == {"mfu": pytest.approx(0.5)}
