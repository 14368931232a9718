"""From scored trees to the learner's batch: one packed segment a leaf, with everything the loss needs at each token."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float
from ml_collections import ConfigDict

from ares_jax.aepo.advantage import group_normalized
from ares_jax.aepo.entropy_bonus import token_bonus
from ares_jax.aepo.kl import token_weights
from ares_jax.aepo.loss import reduction_weights
from ares_jax.aepo.scoring import ScoredGroup
from ares_jax.aepo.state import AepoState
from ares_jax.aepo.tree import token_advantages
from ares_jax.sampling.trajectory import Trajectory
from data_pipeline.packing import Segment, response_segment


def inside_windows(starts: Bool[np.ndarray, "N"], window: int) -> Bool[np.ndarray, "N"]:
    """Returns which tokens lie in a window that starts at one of `starts`."""
    inside = np.zeros(len(starts), bool)
    for offset in range(min(window, len(starts))):
        inside[offset:] |= starts[: len(starts) - offset]
    return inside


def learner_segments(scored: Sequence[ScoredGroup], state: AepoState, aepo: ConfigDict) -> list[Segment]:
    """Returns one segment a leaf, prompt and response. Its extras, 0 on the prompt and on tokens owned by another leaf:

    weight: of the token in the loss; sums to 1 over all segments (float32).
    advantage: of the token, shared tokens with the mean of the leaves below (float32).
    old_log_prob: of the sampler (float32).
    kl_weight: of the KL term at the token, beta_t (float32).
    bucket: 1, 2, 3 for easy, medium, hard (int32).
    in_window: 1 inside a validated window (int32).
    """
    ids = np.repeat(np.arange(len(scored)), [len(s.rewards) for s in scored])
    advantages = np.asarray(group_normalized(np.concatenate([s.rewards for s in scored]), ids, baseline=aepo.baseline))
    leaves: list[tuple[ScoredGroup, Trajectory, np.ndarray]] = []
    owned: list[np.ndarray] = []
    for number, s in enumerate(scored):
        group = s.group.leaves
        values, mine = token_advantages(
            [len(leaf.token_ids) for leaf in group], [leaf.parent for leaf in group],
            [leaf.branch_position for leaf in group], advantages[ids == number], tree=aepo.tree,
        )  # fmt: skip
        leaves += [(s, leaf, value) for leaf, value in zip(group, values, strict=True)]
        owned += mine
    weights = _weights(owned, aepo.reduction)
    tau = float(np.nan_to_num(state.tau_high))
    rho = aepo.kl.rho if aepo.kl.dynamic else 1.0
    segments = []
    for (s, leaf, value), own, weight in zip(leaves, owned, weights, strict=True):
        inside = inside_windows(leaf.window_mask, aepo.window)
        bonus = np.asarray(token_bonus(leaf.window_means, leaf.window_mask, tau, aepo.entropy_bonus))
        beta = np.asarray(token_weights(state.kappa, np.full(len(own), s.difficulty), inside, rho))
        extras = {
            "weight": weight.astype(np.float32),
            "advantage": (own * (value + bonus)).astype(np.float32),
            "old_log_prob": (own * leaf.log_probs).astype(np.float32),
            "kl_weight": (own * beta).astype(np.float32),
            "bucket": (own * (s.difficulty + 1)).astype(np.int32),
            "in_window": (own & inside).astype(np.int32),
        }
        segments.append(response_segment(s.prompt, leaf.token_ids, extras))
    return segments


def _weights(owned: list[Bool[np.ndarray, "N"]], reduction: str) -> list[Float[np.ndarray, "N"]]:
    mask = np.zeros((len(owned), max(map(len, owned))), bool)
    for row, own in zip(mask, owned, strict=True):
        row[: len(own)] = own
    weights = np.asarray(reduction_weights(mask, reduction))
    return [row[: len(own)] for row, own in zip(weights, owned, strict=True)]
