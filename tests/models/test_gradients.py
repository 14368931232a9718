"""Gradients of a masked loss with respect to every parameter equal PyTorch's autograd."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from ares_jax.checkpoints import save_hf
from ares_jax.params import to_flat, with_params
from tests import digits
from tests.models.oracle import Shape, batch_of, examples, logits, make_pair

WIDE = Shape(tied=False, heads=7, kv_heads=1, vision_layers=4, full_attention_layers=(1, 3))


@pytest.mark.parametrize(
    "shape, remat, blocks", [(Shape(), "full", False), (WIDE, "none", False), (WIDE, "none", True), (Shape(), "dots", True)]
)
def test_gradients_of_every_parameter(tmp_path, monkeypatch, shape, remat, blocks):
    tiles = digits.attend_in_blocks(monkeypatch, block=16) if blocks else set()
    pair, prompt = make_pair(tmp_path / "hf", shape), examples()["mixture"]
    rng, tokens = np.random.default_rng(2), prompt.tokens
    weight = rng.normal(size=len(tokens) - 1).astype(np.float32) * (rng.random(len(tokens) - 1) < 0.5)  # masked half
    template, batch = pair.ours, batch_of([prompt], row_tokens=len(tokens))
    template.text.remat = template.visual.remat = remat

    def loss(flat):
        log_probs = jax.nn.log_softmax(logits(with_params(template, flat), batch)[0])
        return jnp.sum(weight * jnp.take_along_axis(log_probs[:-1], tokens[1:, None], axis=1)[:, 0])

    # Gradients are shaped as parameters, so exporting them names and turns them as transformers has them.
    save_hf(with_params(template, jax.jit(jax.grad(loss))(to_flat(template))), tmp_path / "gradients")
    assert len(tiles) == 2 * blocks  # text and images
    ours = load_file(tmp_path / "gradients" / "model.safetensors")

    log_probs = torch.log_softmax(pair.theirs(**prompt.for_torch()).logits[0], -1)[:-1]
    (log_probs.gather(1, torch.tensor(tokens)[1:, None])[:, 0] * torch.tensor(weight)).sum().backward()
    theirs = {name: p.grad.numpy() for name, p in pair.theirs.named_parameters()}

    assert set(ours) == set(theirs)
    for name, expected in theirs.items():
        error, norm = np.linalg.norm(ours[name] - expected), np.linalg.norm(expected)
        assert norm > 0 and error < 1e-3 * norm, (name, error, norm)
