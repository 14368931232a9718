"""Where a rollout tree branches: at validated entropy windows of its first roots (method.md, sections 2 and 8).

A window that starts at t is complete once the distribution at t + w - 1 is known, before a token is drawn from it. A leaf
that forks there, at the first such windows rather than at the highest, does so for reasons in its past alone: every
continuation of the node, the parent's own included, is a fresh sample. The other rules look at what the parent drew next,
and are there to be compared with.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float

BRANCH_AT = ("window_end", "window_start")
BRANCH_CHOICES = ("first", "highest")


def is_causal(branch_at: str, branch_choice: str) -> bool:
    """Says whether forks depend on their past alone."""
    return (branch_at, branch_choice) == ("window_end", "first")


def fork_position(start: int, window: int, branch_at: str) -> int:
    """Returns the index of the token that a branch draws anew, for a window that starts at `start`.

    The token that starts a window of one is a trigger word, and so must have been drawn: the fork is behind it.
    """
    return start if branch_at == "window_start" else start + max(window - 1, 1)


def forks(
    window_means: Sequence[Float[np.ndarray, "N"]],
    window_masks: Sequence[Bool[np.ndarray, "N"]],
    *,
    known: float,
    slots: int,
    max_per_root: int,
    window: int,
    branch_at: str,
    branch_choice: str,
) -> list[tuple[int, int]]:
    """Returns at most `slots` forks (root, position); with "first", those that no later window can overtake.

    Args:
      window_means, window_masks: of each root so far: mean of the window that starts at a token, and whether it is
        validated.
      known: tokens that each root has that is still drawn, at least; infinity once all have ended. With "highest" they have.
      window: tokens of a window; forks of a root are at least so far apart.

    "first" takes windows in the order of (position, root), "highest" in that of their means, ties by (root, position). At
    position 0 nothing forks: a branch there would be a fresh root.
    """
    candidates = []
    for root, (means, mask) in enumerate(zip(window_means, window_masks, strict=True)):
        for start in np.flatnonzero(mask).tolist():
            position = fork_position(start, window, branch_at)
            if 0 < position < len(mask) and max(position, start + window - 1) < known:
                order = (position, root) if branch_choice == "first" else (-float(means[start]), root)
                candidates.append((*order, root, position))
    chosen: list[tuple[int, int]] = []
    for *_, root, position in sorted(candidates):
        if len(chosen) == slots:
            break
        mine = [p for other, p in chosen if other == root]
        if len(mine) < max_per_root and all(abs(position - p) >= window for p in mine):
            chosen.append((root, position))
    return chosen
