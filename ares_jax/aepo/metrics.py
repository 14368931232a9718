"""The numbers of one iteration, from its trees and the learner's sums: pure functions."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from ml_collections import ConfigDict

from ares_jax.aepo.difficulty import NAMES
from ares_jax.aepo.reward import overlong_penalty
from ares_jax.aepo.state import AepoState
from ares_jax.sampling.rollout_tree import RolloutTree


def iteration_metrics(
    drawn: Sequence[RolloutTree],
    kept: int,
    sums: Mapping[str, np.ndarray],
    *,
    iteration: int,
    state: AepoState,
    aepo: ConfigDict,
    max_tokens: int,
) -> dict[str, float]:
    """Returns what a user of reinforcement learning wants to see of one iteration.

    Args:
      drawn: scored trees, those that the filter dropped included.
      kept: number of trees that were learned from.
      sums: of `Learner.update`, added up over the iteration's updates.
      iteration: updates of the policy before this one: what a token's `policy_version` is compared with.
      state: that the trees were drawn in.
      max_tokens: the limit of a response.
    """
    leaves = [(s, i, leaf) for s in drawn for i, leaf in enumerate(s.leaves)]
    lengths = np.array([len(leaf.token_ids) for _, _, leaf in leaves], float)
    windows = np.array([s.windows[i] for s, i, _ in leaves], float)
    correct = np.array([s.graded[i] for s, i, _ in leaves], float)
    rewards = np.array([s.overall[i] for s, i, _ in leaves], float)
    buckets = np.array([s.difficulty for s, _, _ in leaves])
    overlong = aepo.overlong_penalty * overlong_penalty(
        lengths, max_tokens, aepo.overlong_buffer
    )
    shaping = rewards - correct - overlong
    whole = [max(0, len(leaf.window_means) - aepo.window + 1) for _, _, leaf in leaves]  # windows of each
    means = np.concatenate([leaf.window_means[:n] for n, (_, _, leaf) in zip(whole, leaves, strict=True)])
    tokens = max(float(sums["tokens"]), 1.0)
    # Updates made since a token was drawn, over the tokens of which each was drawn once.
    staleness = iteration - np.concatenate([tree.policy_version for tree in drawn])
    values = {
        "staleness/mean": staleness.mean(), "staleness/max": staleness.max(),
        "reward/mean": rewards.mean(), "reward/accuracy": correct.mean(),
        "reward/shaping": shaping.mean(), "reward/overlong": overlong.mean(), "length": lengths.mean(),
        "entropy/mean": float(sums["entropy"]) / tokens,
        "entropy/window": means.mean() if means.size else math.nan,
        "tau_high": float(state.tau_high), "branches": sum(leaf.parent >= 0 for _, _, leaf in leaves),
        "leaves": len(leaves), "groups/drawn": len(drawn), "groups/kept": kept,
        "tokens/shared": sum(s.shared_tokens for s in drawn),
        "tokens/computed": sum(s.computed_tokens for s in drawn),
        "tokens/response": lengths.sum(), "mismatch": float(sums["mismatch"]) / tokens,
        "format": sum(s.formatted for s in drawn) / len(leaves),
        "truncated": np.mean([leaf.finish_reason == "length" for _, _, leaf in leaves]),
        **{f"clip_fraction/{name}": float(sums[f"clip_{name}"]) / tokens for name in ("low", "high", "dual")},
    }  # fmt: skip
    for d, name in enumerate(NAMES):
        inside = buckets == d
        values[f"groups/{name}"] = sum(s.difficulty == d for s in drawn)
        values[f"kl_weight/{name}"] = float(state.kappa[d])
        values[f"alpha/{name}"] = float(state.alpha[d])
        if not math.isnan(state.target[d]):
            values[f"windows_target/{name}"] = float(state.target[d])
        if inside.any():
            values[f"reward/{name}"] = rewards[inside].mean()
            values[f"shaping/{name}"] = shaping[inside].mean()
            values[f"accuracy/{name}"] = correct[inside].mean()
            values[f"length/{name}"] = lengths[inside].mean()
            values[f"windows/{name}"] = windows[inside].mean()
        if "kl" in sums and sums["kl_tokens"][d]:
            values[f"kl/{name}"] = float(sums["kl"][d] / sums["kl_tokens"][d])
    return {name: float(value) for name, value in values.items()}
