"""From scored trees to the learner's batch: packed trees, with everything the loss needs at each token."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Bool, Float, Shaped
from ml_collections import ConfigDict

from ares_jax.aepo.advantage import tree_advantages
from ares_jax.aepo.entropy_bonus import token_bonus
from ares_jax.aepo.kl import token_weights
from ares_jax.aepo.state import AepoState
from ares_jax.sampling.rollout_tree import RolloutTree, tree_of
from data_pipeline.packing import Segment, empty_segment
from data_pipeline.tree_segments import tree_segment

SCALES = ("batch", "group", "none")
_LEAST_STD = 0.1  # of a batch's accuracy: one root right in a hundred; a batch without any difference has 0


def inside_windows(starts: Bool[np.ndarray, "N"], window: int) -> Bool[np.ndarray, "N"]:
    """Returns which tokens lie in a window that starts at one of `starts`."""
    inside = np.zeros(len(starts), bool)
    for offset in range(min(window, len(starts))):
        inside[offset:] |= starts[: len(starts) - offset]
    return inside


def learner_segments(
    trees: Sequence[RolloutTree], state: AepoState, aepo: ConfigDict, *, process: int = 0
) -> list[Segment]:
    """Returns each tree as one segment, with the fields of `token_fields`.

    With aepo.tree = "leaf" only the prompt is shared: a leaf is then a sample with an advantage of its own everywhere.
    Only the trees that `process` drew; the weights are those among all trees. Without any, one empty segment.
    """
    divisors = scales(trees, aepo.scale)
    if aepo.tree == "leaf":
        trees = [unshared(tree) for tree in trees]
    fields = token_fields(trees, divisors, state, aepo)
    segments = [
        tree_segment(tree.problem, tree.token_ids, tree.first_leaf, tree.last_leaf, tree.predictor, values)
        for tree, values in zip(trees, fields, strict=True)
        if tree.process == process
    ]
    return segments or [empty_segment({name: value.dtype for name, value in fields[0].items()})]


def unshared(tree: RolloutTree) -> RolloutTree:
    """Returns a tree of the same leaves that share no token of their responses."""
    roots = [replace(leaf, parent=-1, branch_position=0) for leaf in tree.leaves]
    alone = tree_of(tree.problem_id, roots, prompt_tokens=tree.prompt_tokens, window=tree.window)
    given = ("prompt", "process", "correct", "rewards", "difficulty", "formatted")
    return replace(alone, **{name: getattr(tree, name) for name in given})


def token_fields(
    trees: Sequence[RolloutTree], divisors: Sequence[float], state: AepoState, aepo: ConfigDict
) -> list[dict[str, Shaped[np.ndarray, "N"]]]:
    """Returns, for every tree, what the loss needs at each of its tokens; `divisors` are those of `scales`.

    loss_mask: whether the token counts: all do (bool).
    weight: of the token in the loss (float32). Reduction "token": they sum to 1 over all trees; "seq": those of a leaf's
      path would, were it alone: a branch's tokens are divided by the length of its whole path.
    advantage: of the token (float32), as `tree_advantages` has it, over the divisor, with the bonus.
    old_log_prob: of the sampler (float32).
    kl_weight: of the KL term at the token, beta_t (float32).
    difficulty: 0, 1, 2 for easy, medium, hard (int32).
    in_window: inside a validated window (bool).
    """
    values, weights, counts, bonuses = [], [], 0.0, []
    for tree, divisor in zip(trees, divisors, strict=True):
        of_leaves, shares = tree_advantages(
            tree.overall, tree.parents, tree.branch_positions, tree.lengths, first_roots=tree.first_roots, tree=aepo.tree
        )
        values.append(tree.joined(of_leaves) / divisor)
        if aepo.reduction == "seq":
            counts += sum(float(share[-1]) for share in shares)
            shares = [share / max(len(share), 1) for share in shares]
        elif aepo.reduction == "token":
            counts += sum(float(share.sum()) for share in shares)
        else:
            raise ValueError(f"reduction={aepo.reduction!r} is not one of token, seq")
        weights.append(tree.joined(shares))
        bonuses.append(tree.joined([_bonus(leaf, tree.difficulty, state, aepo) for leaf in tree.leaves]))
    weights = [weight / counts for weight in weights]
    base = 0.0
    if aepo.entropy_bonus_centred:
        total = sum(float(weight.sum()) for weight in weights)
        base = sum(float(weight @ bonus) for weight, bonus in zip(weights, bonuses, strict=True)) / total
    parts = zip(trees, values, weights, bonuses, strict=True)
    return [_fields(tree, value + (bonus - base), weight, state, aepo) for tree, value, weight, bonus in parts]


def scales(trees: Sequence[RolloutTree], scale: str) -> list[float]:
    """Returns what each tree's advantages are divided by: one of `SCALES`.

    "batch": the std of accuracy over the roots of all trees, so that no tree is weighed by its own luck. "group": the std
    of a tree's rewards, as GRPO has it. "none": 1.
    """
    if scale == "batch":
        return [max(float(np.std(np.concatenate([t.graded[t.is_root] for t in trees]))), _LEAST_STD)] * len(trees)
    if scale == "group":
        return [float(np.std(t.overall, ddof=1)) + 1e-6 if t.size > 1 else 1.0 for t in trees]
    if scale == "none":
        return [1.0] * len(trees)
    raise ValueError(f"aepo.scale={scale!r} is not one of {', '.join(SCALES)}")


def _bonus(leaf, difficulty: int | None, state: AepoState, aepo: ConfigDict) -> Float[np.ndarray, "N"]:
    weight = aepo.entropy_bonus * aepo.entropy_bonus_levels[difficulty]
    tau = float(np.nan_to_num(state.tau_high))
    return np.asarray(token_bonus(leaf.window_means, leaf.window_mask, tau, weight))


def _fields(tree: RolloutTree, advantage, weight, state: AepoState, aepo: ConfigDict) -> dict[str, np.ndarray]:
    rho = aepo.kl.rho if aepo.kl.dynamic else 1.0
    inside = tree.joined([inside_windows(leaf.window_mask, aepo.window) for leaf in tree.leaves])
    difficulty = np.full(len(inside), tree.difficulty, np.int32)
    return {
        "loss_mask": np.ones(len(inside), bool),
        "weight": weight.astype(np.float32),
        "advantage": advantage.astype(np.float32),
        "old_log_prob": tree.log_probs,
        "kl_weight": np.asarray(token_weights(state.kappa, difficulty, inside, rho)).astype(np.float32),
        "difficulty": difficulty,
        "in_window": inside,
    }
