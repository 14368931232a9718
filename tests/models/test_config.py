"""`config.json`: missing fields mean what they mean to transformers, and what is not implemented is refused."""

import pytest
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from ares_jax.errors import UserError
from ares_jax.models.qwen2_5_vl import Qwen25VLConfig
from ares_jax.models.qwen2_5_vl import config as shapes
from ares_jax.models.qwen2_5_vl.model import abstract_model
from ares_jax.params import count_parameters, to_flat
from tests.models.oracle import Shape, torch_config

PUBLISHED = {  # Qwen2.5-VL-3B-Instruct's, flat, as it was before transformers 4.52
    "model_type": "qwen2_5_vl", "vision_start_token_id": 151652, "vision_end_token_id": 151653, "vision_token_id": 151654,
    "image_token_id": 151655, "video_token_id": 151656, "hidden_act": "silu", "hidden_size": 2048,
    "intermediate_size": 11008, "max_position_embeddings": 128000, "max_window_layers": 70, "num_attention_heads": 16,
    "num_hidden_layers": 36, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "sliding_window": 32768, "tie_word_embeddings": True, "use_sliding_window": False, "vocab_size": 151936,
    "vision_config": {
        "depth": 32, "hidden_act": "silu", "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "in_chans": 3,
        "out_hidden_size": 2048, "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14, "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31], "tokens_per_second": 2, "temporal_patch_size": 2,
    },
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
}  # fmt: skip


def test_the_published_layout_and_transformers_reading_of_it_agree():
    ours, theirs = Qwen25VLConfig.from_hf(PUBLISHED), Qwen2_5_VLConfig(**PUBLISHED)
    assert Qwen25VLConfig.from_hf(theirs.to_dict()) == ours
    assert Qwen25VLConfig.from_hf(ours.to_hf()) == ours
    assert Qwen25VLConfig.from_hf(Qwen2_5_VLConfig(**ours.to_hf()).to_dict()) == ours


def test_the_named_shapes_are_the_published_ones():
    assert shapes.PUBLISHED["3b"] == Qwen25VLConfig.from_hf(PUBLISHED)
    # `total_size` of the published safetensors indices, in bfloat16.
    for name, size in (("3b", 7_509_245_952), ("7b", 16_584_333_312)):
        assert 2 * count_parameters(to_flat(abstract_model(shapes.PUBLISHED[name]))) == size


# hidden, intermediate, layers, heads, key/value heads, billions of parameters that the Hub shows
@pytest.mark.parametrize("name, size", [("32b", (5120, 27_648, 64, 40, 8, 33.5)), ("72b", (8192, 29_568, 80, 64, 8, 73.4))])
def test_the_larger_shapes_have_as_many_parameters_as_pytorchs(name, size):
    hidden, inner, layers, heads, kv_heads, billions = size
    vision = {**PUBLISHED["vision_config"], "out_hidden_size": hidden, "intermediate_size": 3456}
    published = {
        **PUBLISHED, "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": 152_064, "tie_word_embeddings": False,
        "vision_config": vision,
    }  # fmt: skip
    with torch.device("meta"):
        theirs = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**published))
    assert shapes.PUBLISHED[name] == Qwen25VLConfig.from_hf(published)
    count = count_parameters(to_flat(abstract_model(shapes.PUBLISHED[name])))
    assert count == sum(parameter.numel() for parameter in theirs.parameters()) and round(count / 1e9, 1) == billions


def test_missing_fields_are_transformers_defaults():
    full = torch_config(Shape()).to_dict()
    for part, name in [("vision_config", "tokens_per_second"), ("text_config", "rms_norm_eps"),
                       ("vision_config", "fullatt_block_indexes")]:  # fmt: skip
        config = {**full, part: {key: value for key, value in full[part].items() if key != name}}
        assert Qwen25VLConfig.from_hf(config) == Qwen25VLConfig.from_hf(Qwen2_5_VLConfig(**config).to_dict()), name


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rope_scaling": {"type": "yarn", "mrope_section": [16, 24, 24]}}, "text rope type is 'yarn'"),
        ({"use_sliding_window": True}, "use_sliding_window is True"),
        ({"hidden_act": "gelu"}, "text hidden_act is 'gelu'"),
        ({"vision_config": {**PUBLISHED["vision_config"], "window_size": 224}}, "vision window_size is 224; only 112"),
        ({"vision_config": {**PUBLISHED["vision_config"], "patch_size": 16}}, "vision patch_size is 16; only 14"),
        ({"model_type": "qwen2_vl"}, "model_type is 'qwen2_vl'"),
    ],
)
def test_what_is_not_implemented_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        Qwen25VLConfig.from_hf({**PUBLISHED, **change})
