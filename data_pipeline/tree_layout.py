"""The order in which a rollout tree's tokens stand: a walk in depth, every token once, the leaves below it neighbours."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int


class TreeLayout(NamedTuple):
    """Where the N different tokens of G leaves stand. Leaves are numbered anew, in the order of the walk."""

    leaves: Int[np.ndarray, "G"]  # old number of each new one
    parents: Int[np.ndarray, "G"]  # new number of the leaf that owns the token before the branch; -1 for a root
    first_leaf: Int[np.ndarray, "N"]  # the leaves first_leaf .. last_leaf have the token; the first of them owns it
    last_leaf: Int[np.ndarray, "N"]
    predictor: Int[np.ndarray, "N"]  # index of the token before it on the way from the root; -1: the prompt's last one


def tree_layout(parents: Sequence[int], starts: Sequence[int], lengths: Sequence[int]) -> TreeLayout:
    """Returns the layout of leaves given in any order in which parents come before their children.

    Args:
      parents: index of each leaf's parent; -1 for a root.
      starts: index of the first response token that is the leaf's own; 0 for a root.
      lengths: response tokens, those shared with the parent included.

    A leaf's own tokens stand together, and then come its children, the deepest branch first: so the leaves below a token
    are neighbours. A child that begins where its parent does hangs from the leaf that owns the token before them.
    """
    owners = [parent if start else -1 for parent, start in zip(parents, starts, strict=True)]
    for leaf, start in enumerate(starts):
        while owners[leaf] >= 0 and owners[owners[leaf]] >= 0 and start <= starts[owners[leaf]]:
            owners[leaf] = owners[owners[leaf]]
    children: list[list[int]] = [[] for _ in owners]
    for leaf, owner in enumerate(owners):
        if owner >= 0:
            children[owner].append(leaf)
    order: list[int] = []
    waiting = [leaf for leaf, owner in enumerate(owners) if owner < 0][::-1]
    while waiting:
        order.append(leaf := waiting.pop())
        waiting += sorted(children[leaf], key=lambda child: (starts[child], -child))
    number = {leaf: new for new, leaf in enumerate(order)}
    begins = np.cumsum([0] + [lengths[leaf] - starts[leaf] for leaf in order])
    first = np.repeat(np.arange(len(order)), np.diff(begins))
    last, predictor = first.copy(), np.arange(-1, len(first) - 1)
    end = list(range(len(order)))  # last leaf of the subtree of each
    for new in reversed(range(len(order))):
        leaf = order[new]
        if begins[new] < begins[new + 1]:
            predictor[begins[new]] = -1
        if (owner := owners[leaf]) >= 0:
            above, reach = number[owner], starts[leaf] - starts[owner]
            end[above] = max(end[above], end[new])
            last[begins[above] : begins[above] + reach] = np.maximum(last[begins[above] : begins[above] + reach], end[new])
            if begins[new] < begins[new + 1]:
                predictor[begins[new]] = begins[above] + reach - 1
    owner_of = np.array([number[owners[leaf]] if owners[leaf] >= 0 else -1 for leaf in order])
    return TreeLayout(np.array(order), owner_of, *(x.astype(np.int32) for x in (first, last, predictor)))


def path(first_leaf: Int[np.ndarray, "N"], last_leaf: Int[np.ndarray, "N"], leaf: int) -> Int[np.ndarray, "M"]:
    """Returns the indices of a leaf's tokens, from the root to its end."""
    return np.flatnonzero((first_leaf <= leaf) & (leaf <= last_leaf))
