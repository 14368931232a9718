"""Which token of a rollout tree counts in the loss, and with which advantage.

A prefix shared by several leaves is one sequence of tokens: with "subtree" each distinct token counts once, with the mean
advantage of the leaves below it; with "leaf" every leaf is a sample of its own, shared prefix and all.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float


def token_advantages(
    lengths: Sequence[int],
    parents: Sequence[int],
    branch_positions: Sequence[int],
    advantages: Float[np.ndarray, "G"],
    *,
    tree: str,
) -> tuple[list[Float[np.ndarray, "N"]], list[Bool[np.ndarray, "N"]]]:
    """Returns, for every leaf, its tokens' advantages and which of them it owns (those that count).

    Args:
      lengths: response tokens of each leaf, the shared prefix included.
      parents: index of the parent leaf, always smaller than the leaf's own; -1 for a root.
      branch_positions: index of the first token that is the leaf's own.
      tree: "subtree" or "leaf".
    """
    if tree == "leaf":
        whole = [np.full(n, a, np.float32) for n, a in zip(lengths, advantages, strict=True)]
        return whole, [np.ones(n, bool) for n in lengths]
    if tree != "subtree":
        raise ValueError(f"tree={tree!r} is not one of subtree, leaf")
    total = [np.full(n, a, np.float64) for n, a in zip(lengths, advantages, strict=True)]
    leaves = [np.ones(n, np.float64) for n in lengths]
    for leaf in reversed(range(len(lengths))):  # children come after their parents
        parent, start = parents[leaf], branch_positions[leaf]
        if parent >= 0:
            total[parent][:start] += total[leaf][:start]
            leaves[parent][:start] += leaves[leaf][:start]
    means = [(t / n).astype(np.float32) for t, n in zip(total, leaves, strict=True)]
    for leaf, (parent, start) in enumerate(zip(parents, branch_positions, strict=True)):
        if parent >= 0:
            means[leaf][:start] = means[parent][:start]
    owned = [np.arange(length) >= start for length, start in zip(lengths, branch_positions, strict=True)]  # 0 for roots
    return means, owned
