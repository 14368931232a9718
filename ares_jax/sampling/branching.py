"""Where a rollout tree branches: at the highest validated entropy windows of its root leaves.

method.md section 2 (the paper's section 3.2.1). The root leaves run to their end first; then all their windows compete
at once. So the tree does not depend on the order in which sequences were scheduled.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float


def select_branches(
    window_means: Sequence[Float[np.ndarray, "N"]],
    window_masks: Sequence[Bool[np.ndarray, "N"]],
    *,
    slots: int,
    max_per_sequence: int,
    spacing: int,
) -> list[tuple[int, int]]:
    """Returns at most `slots` branch points (leaf, position), the highest window mean first.

    A branch point is the start of a validated window; ties go to the earlier leaf, then the earlier position. Of one leaf
    at most `max_per_sequence` are taken, at least `spacing` tokens apart. Position 0 is left out: a branch there would be
    a fresh root sample.
    """
    candidates = sorted(
        (-float(means[position]), leaf, int(position))
        for leaf, (means, mask) in enumerate(zip(window_means, window_masks, strict=True))
        for position in np.flatnonzero(mask)
        if position > 0
    )
    chosen: list[tuple[int, int]] = []
    for _, leaf, position in candidates:
        if len(chosen) == slots:
            break
        mine = [p for other, p in chosen if other == leaf]
        if len(mine) < max_per_sequence and all(abs(position - p) >= spacing for p in mine):
            chosen.append((leaf, position))
    return chosen
