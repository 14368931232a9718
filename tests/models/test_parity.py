"""Against transformers' PyTorch Qwen2.5-VL with the same random weights, float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from ares_jax.checkpoints import load_hf
from ares_jax.checkpoints.params import to_flat, with_params
from ares_jax.models.qwen2_5_vl import VisionInputs
from data_pipeline.mrope import mrope_positions
from data_pipeline.packing import Segment, pack
from data_pipeline.vision_layout import vision_layout

IMAGE, VIDEO, START, END = 60, 61, 62, 63
VOCAB = 64
GRIDS = [(1, 4, 6), (1, 12, 20)]  # the second has several attention windows, and none of full size at its edges


def make_torch(tmp_path, *, tied: bool, kv_heads: int):
    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=kv_heads, max_position_embeddings=512, tie_word_embeddings=tied,
            rope_parameters={"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4},
        ),
        vision_config=dict(
            hidden_size=32, intermediate_size=48, depth=3, num_heads=2, out_hidden_size=64, fullatt_block_indexes=[1],
            window_size=112,
        ),
        image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END,
        tie_word_embeddings=tied,
    )  # fmt: skip
    model = Qwen2_5_VLForConditionalGeneration(config).float().eval()
    with torch.no_grad():  # biases start at 0 and norms at 1: make every parameter matter
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "hf")
    return model


def example(rng, grids):
    """Returns token ids with an image block for every grid, and random patches."""
    tokens = list(rng.integers(0, 50, 5))
    for t, h, w in grids:
        tokens += [START, *[IMAGE] * (t * h * w // 4), END, *rng.integers(0, 50, 4)]
    count = sum(t * h * w for t, h, w in grids)
    return np.array(tokens), rng.normal(size=(count, 1176)).astype(np.float32), np.array(grids, int).reshape(-1, 3)


def torch_logits(model, tokens, patches, grids):
    arguments = {"input_ids": torch.tensor(tokens)[None]}
    if len(grids):
        kinds = torch.tensor((tokens == IMAGE).astype(int))[None]
        arguments |= dict(pixel_values=torch.tensor(patches), image_grid_thw=torch.tensor(grids), mm_token_type_ids=kinds)
    return model(**arguments).logits[0]


def our_logits(model, tokens, patches, grids):
    positions, _ = mrope_positions(tokens, grids, image_token_id=IMAGE)
    layout = vision_layout(grids)
    vision = None
    if len(grids):
        vision = VisionInputs(patches[None], layout.position_hw[None], layout.window_ids[None], layout.frame_ids[None])
    hidden = model(tokens[None], positions[None], np.ones((1, len(tokens)), np.int32), vision)
    return (hidden @ model.head.T)[0]


@pytest.mark.parametrize("tied, kv_heads", [(True, 2), (False, 1)])
def test_logits_equal_pytorch(tmp_path, tied, kv_heads):
    theirs = make_torch(tmp_path, tied=tied, kv_heads=kv_heads)
    ours = load_hf(tmp_path / "hf")
    rng = np.random.default_rng(0)
    for grids in ([], GRIDS[:1], GRIDS[1:], GRIDS):
        inputs = example(rng, grids)
        with torch.no_grad():
            expected = torch_logits(theirs, *inputs).numpy()
        np.testing.assert_allclose(our_logits(ours, *inputs), expected, atol=2e-4, rtol=0)


def test_gradients_equal_pytorch(tmp_path):
    theirs = make_torch(tmp_path, tied=True, kv_heads=2)
    template = load_hf(tmp_path / "hf")
    tokens, patches, grids = example(np.random.default_rng(1), GRIDS[:1])
    weight = np.random.default_rng(2).normal(size=len(tokens)).astype(np.float32)

    def loss(flat):
        log_probs = jax.nn.log_softmax(our_logits(with_params(template, flat), tokens, patches, grids))
        return jnp.sum(weight[1:] * jnp.take_along_axis(log_probs[:-1], tokens[1:, None], axis=1)[:, 0])

    ours = jax.jit(jax.grad(loss))(to_flat(template))
    log_probs = torch.log_softmax(torch_logits(theirs, tokens, patches, grids), -1)[:-1]
    (log_probs.gather(1, torch.tensor(tokens)[1:, None])[:, 0] * torch.tensor(weight[1:])).sum().backward()
    grads = {name: p.grad.numpy() for name, p in theirs.named_parameters()}
    layers = "model.language_model.layers.{}.self_attn.q_proj.weight"
    pairs = [
        (ours["text.embedding"], grads["model.language_model.embed_tokens.weight"]),
        (ours["visual.patch_embed"].T, grads["model.visual.patch_embed.proj.weight"].reshape(32, -1)),
        (ours["visual.merger_in_bias"], grads["model.visual.merger.mlp.0.bias"]),
        *[(ours["text.layers.q_kernel"][i].T, grads[layers.format(i)]) for i in range(3)],
        *[(ours["visual.layers.qkv_bias"][i], grads[f"model.visual.blocks.{i}.attn.qkv.bias"]) for i in range(3)],
    ]
    for mine, other in pairs:
        assert np.linalg.norm(mine - other) < 1e-3 * np.linalg.norm(other)


def test_packed_segments_give_what_each_gives_alone(tmp_path):
    make_torch(tmp_path, tied=True, kv_heads=2)
    model = load_hf(tmp_path / "hf")
    rng = np.random.default_rng(3)
    examples = [example(rng, grids) for grids in (GRIDS[:1], [], GRIDS)]
    segments = [
        Segment(t, mrope_positions(t, g, image_token_id=IMAGE)[0], p, g, {"name": np.full(len(t), i)})
        for i, (t, p, g) in enumerate(examples)
    ]  # fmt: skip
    (batch,) = pack(segments, row_tokens=160, row_patches=400, rows=2)
    vision = VisionInputs(batch["patches"], batch["patch_positions"], batch["patch_window_ids"], batch["patch_frame_ids"])
    hidden = model(batch["tokens"], batch["positions"], batch["segment_ids"], vision)
    packed = np.asarray(hidden @ model.head.T)
    for name, inputs in enumerate(examples):
        here = (batch["segment_ids"] > 0) & (batch["name"] == name)
        np.testing.assert_allclose(packed[here], our_logits(model, *inputs), atol=1e-4)


def test_paged_decode_equals_the_whole_forward(tmp_path):
    make_torch(tmp_path, tied=True, kv_heads=2)
    model = load_hf(tmp_path / "hf")
    tokens, patches, grids = example(np.random.default_rng(4), GRIDS[:1])
    tokens = np.concatenate([tokens, np.random.default_rng(5).integers(0, 50, 9)]).astype(np.int32)
    expected = our_logits(model, tokens, patches, grids)
    prompt = len(tokens) - 9
    positions, delta = mrope_positions(tokens[:prompt], grids, image_token_id=IMAGE)
    layout = vision_layout(grids)
    vision = VisionInputs(patches[None], layout.position_hw[None], layout.window_ids[None], layout.frame_ids[None])
    _, kv = model.prefill(tokens[None, :prompt], positions[None], np.ones((1, prompt), np.int32), vision)
    size = 4
    table = np.array([[7, 3, 5, 1, 9, 2, 8, 4]], np.int32)  # pages in no order
    pages = np.zeros((3, 10, size, 4, 16), np.float32)
    for i in range(prompt):
        pages[:, table[0, i // size], i % size] = kv[:, 0, i]
    for i in range(prompt, len(tokens)):
        hidden, pages = model.decode(
            jnp.array(tokens[i : i + 1]), jnp.array([i + delta]), jnp.asarray(pages), jnp.asarray(table), jnp.array([i])
        )
        np.testing.assert_allclose((hidden @ model.head.T)[0], expected[i], atol=1e-4)
