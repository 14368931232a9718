"""From scored trees to the learner's batch: packed trees, with everything the loss needs at each token."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float, Shaped
from ml_collections import ConfigDict

from ares_jax.aepo.advantage import group_normalized
from ares_jax.aepo.entropy_bonus import token_bonus
from ares_jax.aepo.kl import token_weights
from ares_jax.aepo.loss import reduction_weights
from ares_jax.aepo.scoring import ScoredGroup
from ares_jax.aepo.state import AepoState
from ares_jax.aepo.tree import token_advantages
from ares_jax.sampling.trajectory import Trajectory
from data_pipeline.packing import TREE_EXTRAS, Segment
from data_pipeline.tree_segments import tree_segment


def inside_windows(starts: Bool[np.ndarray, "N"], window: int) -> Bool[np.ndarray, "N"]:
    """Returns which tokens lie in a window that starts at one of `starts`."""
    inside = np.zeros(len(starts), bool)
    for offset in range(min(window, len(starts))):
        inside[offset:] |= starts[: len(starts) - offset]
    return inside


def learner_segments(
    scored: Sequence[ScoredGroup], state: AepoState, aepo: ConfigDict, *, process: int = 0
) -> list[Segment]:
    """Returns each tree as one segment, with the extras of `leaf_extras`.

    With aepo.tree = "leaf" only the prompt is shared: a leaf is then a sample with an advantage of its own everywhere.
    Only the trees that `process` drew; the weights are those among all trees. Without any, one empty segment.
    """
    share = aepo.tree == "subtree"
    every = leaf_extras(scored, state, aepo)
    segments = [
        tree_segment(
            s.prompt,
            [leaf.token_ids for leaf in s.group.leaves],
            [leaf.parent if share else -1 for leaf in s.group.leaves],
            [leaf.branch_position if share else 0 for leaf in s.group.leaves],
            extras,
        )
        for s, extras in zip(scored, every, strict=True)
        if s.process == process
    ]
    return segments or [_empty(every[0][0])]


def _empty(extras: Mapping[str, Shaped[np.ndarray, "N"]]) -> Segment:
    """Returns a segment of one token that counts nothing, with the extras of a tree's."""
    kinds = {name: value.dtype for name, value in extras.items()} | dict.fromkeys(TREE_EXTRAS, np.dtype(np.int32))
    return Segment(
        np.zeros(1, np.int32), np.zeros((3, 1), np.int32), np.zeros((0, 1176), np.float32), np.zeros((0, 3), np.int32),
        {name: np.zeros(1, kind) for name, kind in kinds.items()},
    )  # fmt: skip


def leaf_extras(
    scored: Sequence[ScoredGroup], state: AepoState, aepo: ConfigDict
) -> list[list[dict[str, Shaped[np.ndarray, "N"]]]]:
    """Returns, for every leaf of every group, what the loss needs at its response tokens; 0 at those another leaf owns:

    weight: of the token in the loss; sums to 1 over all leaves (float32).
    advantage: of the token, shared tokens with the mean of the leaves below (float32).
    old_log_prob: of the sampler (float32).
    kl_weight: of the KL term at the token, beta_t (float32).
    bucket: 1, 2, 3 for easy, medium, hard (int32).
    in_window: 1 inside a validated window (int32).
    """
    ids = np.repeat(np.arange(len(scored)), [len(s.rewards) for s in scored])
    advantages = np.asarray(group_normalized(np.concatenate([s.rewards for s in scored]), ids, baseline=aepo.baseline))
    values: list[np.ndarray] = []
    owned: list[np.ndarray] = []
    for number, s in enumerate(scored):
        group = s.group.leaves
        of_tokens, mine = token_advantages(
            [len(leaf.token_ids) for leaf in group], [leaf.parent for leaf in group],
            [leaf.branch_position for leaf in group], advantages[ids == number], tree=aepo.tree,
        )  # fmt: skip
        values += of_tokens
        owned += mine
    weights = _weights(owned, aepo.reduction)
    bonuses = [_bonus(leaf, s.difficulty, state, aepo) for s in scored for leaf in s.group.leaves]
    base = 0.0
    if aepo.entropy_bonus_centred:
        base = sum(float(weight @ bonus) for weight, bonus in zip(weights, bonuses, strict=True))
    values = [value + (bonus - base) for value, bonus in zip(values, bonuses, strict=True)]
    parts = zip(values, owned, weights, strict=True)
    return [[_extras(leaf, s.difficulty, state, aepo, *next(parts)) for leaf in s.group.leaves] for s in scored]


def _bonus(leaf: Trajectory, difficulty: int, state: AepoState, aepo: ConfigDict) -> Float[np.ndarray, "N"]:
    weight = aepo.entropy_bonus * aepo.entropy_bonus_levels[difficulty]
    tau = float(np.nan_to_num(state.tau_high))
    return np.asarray(token_bonus(leaf.window_means, leaf.window_mask, tau, weight))


def _extras(leaf: Trajectory, difficulty: int, state: AepoState, aepo: ConfigDict, advantage, own, weight) -> dict:
    rho = aepo.kl.rho if aepo.kl.dynamic else 1.0
    inside = inside_windows(leaf.window_mask, aepo.window)
    beta = np.asarray(token_weights(state.kappa, np.full(len(own), difficulty), inside, rho))
    return {
        "weight": weight.astype(np.float32),
        "advantage": (own * advantage).astype(np.float32),
        "old_log_prob": (own * leaf.log_probs).astype(np.float32),
        "kl_weight": (own * beta).astype(np.float32),
        "bucket": (own * (difficulty + 1)).astype(np.int32),
        "in_window": (own & inside).astype(np.int32),
    }


def _weights(owned: list[Bool[np.ndarray, "N"]], reduction: str) -> list[Float[np.ndarray, "N"]]:
    mask = np.zeros((len(owned), max(map(len, owned))), bool)
    for row, own in zip(mask, owned, strict=True):
        row[: len(own)] = own
    weights = np.asarray(reduction_weights(mask, reduction))
    return [row[: len(own)] for row, own in zip(weights, owned, strict=True)]
