"""The policy's updates of one iteration: minibatches of trees, packed into micro-batches, one after the other."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from ares_jax.aepo.batch import learner_segments
from ares_jax.aepo.learner import Learner
from ares_jax.aepo.state import AepoState
from ares_jax.models.flops import update_flops
from ares_jax.run.run import Run
from ares_jax.sampling.rollout_tree import RolloutTree
from ares_jax.training.run import TrainingRun
from data_pipeline.packing import MicroBatches, Segment


class Updated(NamedTuple):
    """What the updates of one iteration gave."""

    sums: dict[str, np.ndarray]  # of `Learner.update`, over all updates
    loss: float  # mean over the updates, as the next two
    grad_norm: float
    padding: float
    flops: float  # of this process's trees


def update_policy(
    learner: Learner, run: Run, training: TrainingRun, kept: Sequence[RolloutTree], state: AepoState
) -> Updated:
    """Updates `training.state` on the trees, in `aepo.minibatches` parts and in random order."""
    a = run.config.aepo
    rng = np.random.default_rng([run.config.seed, training.step])
    order = np.array_split(rng.permutation(len(kept)), min(a.minibatches, len(kept)))
    parts = [[kept[i] for i in part] for part in order]
    # The ratio of all updates is to the policy before the first of them.
    old: list[list[np.ndarray] | None] = [None] * len(parts)
    if a.old_log_probs == "recomputed":  # the first update's own; the others are packed twice, as all in one take memory
        params = training.state.params
        old[1:] = [learner.log_probs(params, packed(run, part, state)[1]) for part in parts[1:]]
    sums: dict[str, np.ndarray] = {}
    losses, norms, padding, flops, skipped = [], [], [], 0.0, int(training.state.skipped)
    passes = (training.reference is not None) + (a.old_log_probs == "recomputed")
    for part, before in zip(parts, old, strict=True):
        segments, batches = packed(run, part, state)
        frozen = run.config.optimizer.freeze_vision
        flops += update_flops(run.model.config, segments, fixed_passes=passes, freeze_vision=frozen)
        padding.append(batches.padding)
        training.state, metrics = learner.update(training.state, batches, training.reference, before)
        losses.append(metrics.pop("loss"))
        norms.append(metrics.pop("grad_norm"))
        if (now := int(metrics.pop("skipped"))) > skipped:
            skipped = now
            tqdm.write(f"aepo: step {training.step + 1}: gradient not finite; update left out, {skipped} so far")
        sums = metrics if not sums else {name: sums[name] + metrics[name] for name in sums}
    return Updated(sums, float(np.mean(losses)), float(np.mean(norms)), float(np.mean(padding)), flops)


def packed(run: Run, part: Sequence[RolloutTree], state: AepoState) -> tuple[list[Segment], MicroBatches]:
    """Returns this process's trees of a minibatch, and its rows of the micro-batches that hold them."""
    segments = learner_segments(part, state, run.config.aepo, process=jax.process_index())
    return segments, run.pack(segments)
