"""One text layer and both kinds of vision layer at the real widths of the 3B and the 7B model: the errors of long sums show
here only. Two prompts packed in one row; of the 3B model also the gradient of every parameter."""

import gc
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from ares_jax.checkpoints.names import slots
from ares_jax.params import to_flat, with_params
from data_pipeline.packing import pack
from tests.models.oracle import LARGE, SMALL, VOCAB, Pair, Shape, logits, make_example, torch_config

# hidden, intermediate, query heads, key/value heads; the vision towers differ in what they hand over only
WIDTHS = {"3B": (2048, 11008, 16, 2), "7B": (3584, 18944, 28, 4)}
BOUND = 2e-4


def their_model(folder, name):
    hidden, inner, heads, kv_heads = WIDTHS[name]
    rope = {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6}
    text = dict(
        hidden_size=hidden, intermediate_size=inner, num_attention_heads=heads, num_key_value_heads=kv_heads,
        num_hidden_layers=1, rope_parameters=rope,
    )  # fmt: skip
    vision = dict(hidden_size=1280, intermediate_size=3420, num_heads=16, depth=2, out_hidden_size=hidden)
    shape = Shape(full_attention_layers=(1,), tied=name == "3B")
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)  # halves file and memory; float32 holds these numbers exactly
    try:
        theirs = Qwen2_5_VLForConditionalGeneration(torch_config(shape, text=text, vision=vision)).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.ndim == 1:  # biases start at 0 and norms at 1: make them matter
                parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(folder)
    return theirs.float()


@pytest.mark.parametrize("name", ["3B", "7B"])
def test_single_layers(tmp_path, name):
    rng = np.random.default_rng(0)
    prompts = [make_example(rng, LARGE), make_example(rng, SMALL, (2, 4, 4, 0.5))]
    # Of the log-probability of each token but the first; half of them.
    weights = [rng.normal(size=len(p.tokens)) * (rng.random(len(p.tokens)) < 0.5) for p in prompts]
    for weight in weights:
        weight[0] = 0
    theirs, with_gradients = their_model(tmp_path / "hf", name), name == "3B"
    expected, gradients = [], {}
    for prompt, weight in zip(prompts, weights, strict=True):
        with torch.set_grad_enabled(with_gradients):
            found = theirs(**prompt.for_torch()).logits[0]
            if with_gradients:
                log_probs = torch.log_softmax(found, -1)[:-1].gather(1, torch.tensor(prompt.tokens)[1:, None])[:, 0]
                (log_probs * torch.tensor(weight[1:])).sum().backward()
        expected.append(found.detach().numpy())
    if with_gradients:
        gradients = {key: parameter.grad.numpy() for key, parameter in theirs.named_parameters()}
    theirs = None
    gc.collect()

    extras = [{"number": np.full(len(w), i), "weight": w.astype(np.float32)} for i, w in enumerate(weights)]
    segments = [prompt.segment(**extra) for prompt, extra in zip(prompts, extras, strict=True)]
    (batch,) = pack(segments, row_tokens=112, row_patches=304, rows=1)
    assert batch["segment_ids"].max() == 2
    try:
        ours = Pair(None, str(tmp_path / "hf"), jnp.float32).ours
    finally:
        for file in Path(tmp_path).rglob("*.safetensors"):
            file.unlink()

    def loss(flat):
        found = logits(with_params(ours, flat), batch)[0]
        log_probs = jnp.take_along_axis(jax.nn.log_softmax(found)[:-1], batch["tokens"][0, 1:, None], axis=1)[:, 0]
        return jnp.sum(log_probs * batch["weight"][0, 1:]), found

    run = jax.jit(jax.grad(loss, has_aux=True) if with_gradients else lambda flat: ({}, loss(flat)[1]))
    slopes, found = run(to_flat(ours))
    for number, values in enumerate(expected):
        assert values.shape[1] == VOCAB and values.std() > 0.3
        here = (batch["segment_ids"][0] > 0) & (batch["number"][0] == number)
        np.testing.assert_allclose(found[here], values, atol=BOUND, rtol=0)
    places = slots(ours.config) if with_gradients else {}
    assert set(places) == set(gradients)
    for key, slot in places.items():
        mine = np.asarray(slopes[slot.ours] if slot.layer is None else slopes[slot.ours][slot.layer])
        error, norm = np.linalg.norm(slot.to_theirs(mine) - gradients[key]), np.linalg.norm(gradients[key])
        assert norm > 0 and error < 1e-3 * norm, (key, error, norm)
