"""Supervised fine-tuning on packed prompt-response segments; the loss is on the response alone."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int
from tqdm import tqdm

from ares_jax.checkpoints.params import to_flat
from ares_jax.metrics import MetricsWriter
from ares_jax.training import Update, initial_state, make_optimizer
from ares_jax.training.log_probs import token_statistics
from ares_jax.training.update import Params
from ares_jax.workspace import Workspace
from data_pipeline.packing import Segment, pack, response_segment
from data_pipeline.prompts import Prompt


def example(prompt: Prompt, response: Int[np.ndarray, "N"]) -> Segment:
    """Returns prompt and response as one segment; the extra `weight` is 1 on the response and 0 on the prompt."""
    return response_segment(prompt, response, {"weight": np.ones(len(response), np.float32)})


def fine_tune(
    workspace: Workspace,
    stage: str,
    start: Callable[[], Params],
    batches: Any,
    *,
    steps: int,
    learning_rate: float,
) -> int:
    """Trains `steps` updates into the checkpoints of `stage`, going on where an earlier run was cut off.

    Args:
      start: gives the weights to start from (called if there is no checkpoint yet).
      batches: iterator over lists of segments, with `get_state` and `set_state`.

    Returns the number of response tokens learned from.
    """
    config = workspace.config
    optimizer = make_optimizer(
        config.optimizer, learning_rate=learning_rate, steps=steps,
        warmup_steps=int(config.cold_start.warmup_fraction * steps), final_fraction=0.1,
    )  # fmt: skip
    statistics = token_statistics(
        workspace.model, jnp.asarray(workspace.banned), freeze_vision=config.optimizer.freeze_vision
    )

    def loss(params, batch):
        log_probs, _ = statistics(params, batch)
        return -jnp.sum(jnp.where(batch["weight"] > 0, batch["weight"] * log_probs, 0.0)), {}

    update = Update(loss, optimizer)
    checkpoints = workspace.checkpoints(stage)
    done = checkpoints.latest()
    if done is None:
        state, tokens = initial_state(start(), optimizer), 0
    else:
        template = jax.eval_shape(lambda p: initial_state(p, optimizer), to_flat(workspace.model))
        params, rest, extra = checkpoints.restore(done, template.params, template._replace(params={}))
        state = rest._replace(params=params)
        batches.set_state(extra["iterator"])
        tokens = extra["tokens"]
    first = int(state.step)
    writer = MetricsWriter(workspace.folder / stage, first)
    bar = tqdm(range(first, steps), desc=f"{stage}: fine-tuning", initial=first, total=steps, unit="step")
    for step in bar:
        segments = next(batches)
        weighted, count = normalized(segments)
        begin = time.time()
        state, metrics = update(state, pack(weighted, **workspace.config.packing))
        values = {name: float(value) for name, value in metrics.items()}
        tokens += count
        values["tokens_per_second"] = count / (time.time() - begin)
        writer.write(step + 1, values)
        bar.set_postfix(loss=f"{values['loss']:.3f}", tokens_per_s=f"{values['tokens_per_second']:.0f}")
        if (step + 1) % config.cold_start.save_every == 0 or step + 1 == steps:
            extra = {"iterator": batches.get_state(), "tokens": tokens}
            checkpoints.save(step + 1, state.params, state._replace(params={}), extra)
    checkpoints.wait()
    checkpoints.close()
    writer.close()
    return tokens


def normalized(segments: Sequence[Segment]) -> tuple[list[Segment], int]:
    """Returns the segments with weights that sum to 1 over all of them, and their number of response tokens."""
    count = int(sum(s.extras["weight"].sum() for s in segments))
    scaled = [
        Segment(s.token_ids, s.positions, s.patches, s.grid_thw, {"weight": s.extras["weight"] / count}) for s in segments
    ]
    return scaled, count
