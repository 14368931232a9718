"""Thresholds on window entropy (sections 3.2.1 and App. D, H of the paper)."""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float
from ml_collections import ConfigDict

from ares_jax.sampling.rollout_tree import RolloutTree


def batch_threshold(entropies: Sequence[Float[np.ndarray, "N"]], *, definition: str, quantile: float, window: int) -> float:
    """Returns tau of one batch, in nats; NaN if no trajectory has a token (or a complete window).

    Args:
      entropies: of the tokens, one array a trajectory.
      definition: "trajectory": the mean over trajectories of the quantile of token entropies (the paper);
        "window_median": the median over trajectories of the quantile of window means (the released code).
    """
    if definition == "trajectory":
        values = [np.quantile(h, quantile) for h in entropies if len(h)]
        return float(np.mean(values)) if values else math.nan
    if definition == "window_median":
        values = [
            np.quantile(np.lib.stride_tricks.sliding_window_view(h, window).mean(axis=1), quantile)
            for h in entropies
            if len(h) >= window
        ]
        return float(np.median(values)) if values else math.nan
    raise ValueError(f"tau_definition={definition!r} is not one of trajectory, window_median")


def trees_threshold(trees: Sequence[RolloutTree], aepo: ConfigDict) -> float:
    """Returns `batch_threshold` of the roots: a branch begins where entropy is high, and repeats its parent's tokens."""
    roots = [leaf.entropies for tree in trees for leaf in tree.leaves if leaf.parent < 0]
    return batch_threshold(roots, definition=aepo.tau_definition, quantile=aepo.tau_quantile, window=aepo.window)


def smoothed(previous: float, value: float, decay: float) -> float:
    """Returns the exponential moving average; NaN stands for "nothing yet" on either side."""
    if math.isnan(value):
        return previous
    return value if math.isnan(previous) else decay * previous + (1 - decay) * value


def validated(
    means: Float[np.ndarray, "N"], complete: Bool[np.ndarray, "N"], trigger: Bool[np.ndarray, "N"], tau: float
) -> Bool[np.ndarray, "N"]:
    """Says where a validated high-entropy window starts: complete, mean at least tau, a trigger token at its start."""
    return complete & trigger & (means >= tau)
