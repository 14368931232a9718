"""One text and one vision layer at the real widths of the 3B and the 7B model: the errors of long sums show here only."""

import gc
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from tests.models.oracle import LARGE, Pair, Shape, batch_of, make_example, torch_config

# hidden, intermediate, query heads, key/value heads; the vision towers differ in what they hand over only
WIDTHS = {"3B": (2048, 11008, 16, 2), "7B": (3584, 18944, 28, 4)}


@pytest.mark.parametrize("name, full_attention", [("3B", (0,)), ("7B", ())])
def test_single_layers(tmp_path, name, full_attention):
    hidden, inner, heads, kv_heads = WIDTHS[name]
    rope = {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6}
    text = dict(
        hidden_size=hidden, intermediate_size=inner, num_attention_heads=heads, num_key_value_heads=kv_heads,
        num_hidden_layers=1, rope_parameters=rope,
    )  # fmt: skip
    vision = dict(hidden_size=1280, intermediate_size=3420, num_heads=16, depth=1, out_hidden_size=hidden)
    shape = Shape(full_attention_layers=full_attention, tied=name == "3B")
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)  # halves file and memory; float32 holds these numbers exactly
    try:
        theirs = Qwen2_5_VLForConditionalGeneration(torch_config(shape, text=text, vision=vision)).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    theirs.save_pretrained(tmp_path / "hf")
    prompt = make_example(np.random.default_rng(0), LARGE)
    try:
        expected = Pair(theirs.float(), "").their_logits(prompt)
        theirs = None
        gc.collect()
        found = Pair(theirs, str(tmp_path / "hf")).our_logits(batch_of([prompt], row_tokens=80, row_patches=240))[0]
    finally:
        for file in Path(tmp_path).rglob("*.safetensors"):
            file.unlink()
    assert expected.std() > 0.3
    np.testing.assert_allclose(found[: len(expected)], expected, atol=2e-4, rtol=0)
