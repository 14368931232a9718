"""Where there is no pretrained vision tower: teach it the words of what it sees, before the decoder learns to reason.

Each merged vision token is drawn to the sum of the (fixed) text embeddings of its caption's words: where a scan is
ambiguous, to their mean over what it may be. It is the alignment stage of vision-language models in miniature, some
seconds for the digits task.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from ares_jax.models.qwen2_5_vl import VisionInputs
from ares_jax.params import Params, with_params
from ares_jax.run.run import Run
from data_pipeline.digits import captioned_cards
from data_pipeline.packing import Segment, pack

_IMAGES, _BATCH, _LEARNING_RATE = 2000, 64, 3e-3


def align_vision(run: Run, params: Params, steps: int) -> Params:
    """Returns the weights with the vision tower trained on captioned cards of the training scans."""
    if not steps:
        return params
    encoder, seed = run.encoder, run.config.seed
    segments = [_segment(encoder, *captioned_cards("train", seed, index)) for index in range(_IMAGES)]
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(_LEARNING_RATE))
    fixed = {name: value for name, value in params.items() if not name.startswith("visual.")}
    vision = {name: value for name, value in params.items() if name.startswith("visual.")}

    @jax.jit
    def update(vision, fixed, moments, batch):
        def loss(vision):
            model = with_params(run.model, {**fixed, **vision})
            inputs = VisionInputs(
                batch["patches"], batch["patch_positions"], batch["patch_window_ids"], batch["patch_frame_ids"]
            )
            words = jnp.stack([batch["word0"], batch["word1"]], axis=-1)  # one token a merged vision token
            error = model.visual(inputs)[:, : words.shape[1]] - model.text.embed(words).sum(axis=2)
            seen = batch["segment_ids"] > 0
            return jnp.sum(jnp.sum(error**2, axis=-1) * seen) / jnp.sum(seen)

        value, grads = jax.value_and_grad(loss)(vision)
        updates, moments = optimizer.update(grads, moments)
        return optax.apply_updates(vision, updates), moments, value

    moments = optimizer.init(vision)
    rng = np.random.default_rng([seed, 2])
    bar = tqdm(range(steps), desc="base: vision alignment", unit="step")
    for _ in bar:
        chosen = [segments[i] for i in rng.choice(_IMAGES, _BATCH, replace=False)]
        (batch,) = pack(chosen, row_tokens=16, row_patches=64, rows=_BATCH)
        vision, moments, value = update(vision, fixed, moments, batch)
        bar.set_postfix(loss=f"{value:.3f}")
    return {**fixed, **vision}


def _segment(encoder, image: np.ndarray, captions: Sequence[tuple[str, str]]) -> Segment:
    features = encoder.image_processor([image], return_tensors="np")
    words = np.array([encoder.tokenizer.convert_tokens_to_ids([f"Ġ{word}" for word in pair]) for pair in captions])
    tokens = len(captions)
    return Segment(
        np.zeros(tokens, np.int32), np.zeros((3, tokens), np.int32), features["pixel_values"].astype(np.float32),
        features["image_grid_thw"].astype(np.int32), {"word0": words[:, 0], "word1": words[:, 1]},
    )  # fmt: skip
