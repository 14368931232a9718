"""Advantages of leaves within their group: GRPO (arXiv 2402.03300), RLOO (arXiv 2402.14740), and on trees of leaves."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

_EPS = 1e-6


def group_normalized(rewards: Float[Array, "N"], group_ids: Int[Array, "N"], *, baseline: str = "grpo") -> Float[Array, "N"]:
    """Returns the advantage of every leaf. A group of one leaf has none: 0.

    Args:
      rewards: of all leaves.
      group_ids: any numbers; leaves of equal number share a prompt.
      baseline: "grpo": (R - mean) / (std + eps), sample standard deviation; "rloo": R minus the mean of the others.
    """
    if not isinstance(group_ids, jax.Array):  # as they are: in 32 bits two large numbers might become one
        group_ids = np.unique(group_ids, return_inverse=True)[1]
    return _normalized(rewards, group_ids, baseline=baseline)


@partial(jax.jit, static_argnames="baseline")
def _normalized(rewards, group_ids, *, baseline):
    rewards = jnp.asarray(rewards) * 1.0  # of whole numbers or booleans, too
    count = len(rewards)
    ids = jnp.unique(jnp.asarray(group_ids), return_inverse=True, size=count)[1]

    def per_group(x):
        return jax.ops.segment_sum(x, ids, count)[ids]

    size = per_group(jnp.ones_like(rewards))
    centered = rewards - per_group(rewards) / size
    # Once more: what rounding leaves of equal rewards is not small beside eps in float32 (seen: advantages of 0.2).
    centered = centered - per_group(centered) / size
    others = jnp.maximum(size - 1, 1)
    if baseline == "grpo":
        return jnp.where(size > 1, centered / (jnp.sqrt(per_group(centered**2) / others) + _EPS), 0.0)
    if baseline == "rloo":
        return jnp.where(size > 1, centered * size / others, 0.0)
    raise ValueError(f"baseline={baseline!r} is not one of grpo, rloo")


def tree_advantages(
    rewards: Float[np.ndarray, "G"],
    parents: Sequence[int],
    branch_positions: Sequence[int],
    lengths: Sequence[int],
    *,
    first_roots: int,
    tree: str,
) -> tuple[list[Float[np.ndarray, "N"]], list[Float[np.ndarray, "N"]]]:
    """Returns, for every leaf of one prompt, its response tokens' advantages and weights, not yet divided by any std.

    Args:
      rewards: of the leaves.
      parents: index of the parent leaf, smaller than the leaf's own; -1 for a root.
      branch_positions: index of the first token that is the leaf's own; 0 for a root.
      lengths: response tokens, the prefix that a leaf shares with its parent included.
      first_roots: number of roots that were drawn first; later roots are top-ups, drawn because nothing called for a branch.
      tree: one of `ADVANTAGES`.

    A weight is 0 at a token that another leaf owns, and the method's weight elsewhere.

    Raises:
      ValueError: an unknown `tree`, or arguments that describe no tree.
    """
    if tree not in ADVANTAGES:
        raise ValueError(f"tree={tree!r} is not one of {', '.join(ADVANTAGES)}")
    _check_tree(parents, branch_positions, lengths, first_roots)
    found = ADVANTAGES[tree](np.asarray(rewards, np.float64), parents, branch_positions, lengths, first_roots)
    advantages, weights = ([x.astype(np.float32) for x in part] for part in found)
    return [np.where(w > 0, a, 0) for a, w in zip(advantages, weights, strict=True)], weights


def _check_tree(parents, branch_positions, lengths, first_roots: int) -> None:
    roots = [leaf for leaf, parent in enumerate(parents) if parent < 0]
    if not 1 <= first_roots <= len(roots):
        raise ValueError(f"first_roots={first_roots}, but the tree has {len(roots)} roots; give 1 to {len(roots)}")
    for leaf, (parent, start) in enumerate(zip(parents, branch_positions, strict=True)):
        if parent >= leaf or start > lengths[leaf] or (start < 1 if parent >= 0 else start != 0):
            raise ValueError(f"leaf {leaf} of {lengths[leaf]} tokens cannot begin at {start} of leaf {parent}")
        if parent >= 0 and start > lengths[parent]:
            raise ValueError(f"leaf {leaf} begins at {start}, but its parent {parent} has {lengths[parent]} tokens")


def _others(values: Float[np.ndarray, "R"]) -> Float[np.ndarray, "R"]:
    """Returns the mean of the other values for each; 0, which is a baseline too, where there is no other."""
    return (values.sum() - values) / max(len(values) - 1, 1)


def _split(rewards, parents, starts, lengths, first_roots):
    """Value of a node: the mean over its continuations. Weight of a token: the product of 1 / continuations above it.

    Sound where forks are causal: the parent's own continuation is then as fresh a sample as its children's. A token's
    baseline is half the mean of its sibling continuations, half the mean of the prompt's other trees (method.md, section 8).
    Top-ups are no part of a first root's baseline: how many there are depends on the forks, and so on that root's tokens
    (with them a component of an exact gradient came out 5 % off).
    """
    forks: list[dict[int, list[int]]] = [{} for _ in lengths]  # of a leaf: position of a node on its own part -> children
    for leaf, (parent, start) in enumerate(zip(parents, starts, strict=True)):
        while parent >= 0 and parents[parent] >= 0 and start <= starts[parent]:
            parent = parents[parent]  # the node lies on the part that the parent shares
        if parent >= 0:
            forks[parent].setdefault(start, []).append(leaf)
    below = np.zeros(len(lengths))  # V of a leaf's continuation, from its first own token on
    pieces: list[list[tuple[int, int, float, float]]] = [[] for _ in lengths]  # (from, to, V, mean of V of the siblings)
    siblings = np.full(len(lengths), np.nan)  # for a leaf's first piece
    for leaf in reversed(range(len(lengths))):  # children come after their parents
        value, end = rewards[leaf], lengths[leaf]
        for position in sorted(forks[leaf], reverse=True):
            children = forks[leaf][position]
            continuations = np.array([value, *below[children]])
            means = _others(continuations)
            pieces[leaf].append((position, end, value, means[0]))
            siblings[children] = means[1:]
            value, end = continuations.mean(), position
        below[leaf] = value
        pieces[leaf].append((starts[leaf], end, value, np.nan))
    roots = [leaf for leaf, parent in enumerate(parents) if parent < 0]
    elsewhere = dict(zip(roots, _others(below[roots]), strict=True))
    elsewhere |= dict(zip(roots[:first_roots], _others(below[roots[:first_roots]]), strict=True))
    advantages, weights = [np.zeros(n) for n in lengths], [np.zeros(n) for n in lengths]
    first_weight = np.ones(len(lengths))
    trees = np.arange(len(lengths))
    for leaf, parent in enumerate(parents):
        trees[leaf] = leaf if parent < 0 else trees[parent]
        weight = first_weight[leaf]
        for start, end, value, means in reversed(pieces[leaf]):
            if start in forks[leaf]:
                weight = weight / (1 + len(forks[leaf][start]))
                first_weight[forks[leaf][start]] = weight
            near, far = siblings[leaf] if np.isnan(means) else means, elsewhere[trees[leaf]]
            others = first_roots > 1 or trees[leaf] != roots[0]
            base = far if np.isnan(near) else 0.5 * near + 0.5 * far if others else near
            advantages[leaf][start:end] = value - base
            weights[leaf][start:end] = weight
    return advantages, weights


def _local(rewards, parents, starts, lengths, first_roots):
    """Children never count for their prefix, so the forks may be chosen by anything (method.md, section 8)."""
    roots = [leaf for leaf, parent in enumerate(parents) if parent < 0]
    first, mean = roots[:first_roots], rewards[roots[:first_roots]].mean()
    values = np.zeros(len(lengths))
    values[first] = rewards[first] - _others(rewards[first])
    for leaf, parent in enumerate(parents):
        if parent >= 0:
            values[leaf] = 0.5 * (rewards[leaf] - (0.5 * rewards[parent] + 0.5 * mean))
        elif leaf not in first:
            values[leaf] = rewards[leaf] - mean
    return [np.full(n, value) for n, value in zip(lengths, values, strict=True)], _owned(starts, lengths)


def _subtree(rewards, parents, starts, lengths, first_roots):
    """A shared token counts once, with the mean advantage of the leaves below it. Biased on forks chosen by their future."""
    total = [np.full(n, value) for n, value in zip(lengths, rewards - rewards.mean(), strict=True)]
    leaves = [np.ones(n) for n in lengths]
    for leaf in reversed(range(len(lengths))):
        parent, start = parents[leaf], starts[leaf]
        if parent >= 0:
            total[parent][:start] += total[leaf][:start]
            leaves[parent][:start] += leaves[leaf][:start]
    return [t / n for t, n in zip(total, leaves, strict=True)], _owned(starts, lengths)


def _leaf(rewards, parents, starts, lengths, first_roots):
    """Leaves as independent samples, the shared prefix of each included."""
    values = rewards - rewards.mean()
    return [np.full(n, value) for n, value in zip(lengths, values, strict=True)], [np.ones(n) for n in lengths]


def _owned(starts, lengths) -> list[Float[np.ndarray, "N"]]:
    return [(np.arange(n) >= start).astype(float) for n, start in zip(lengths, starts, strict=True)]


ADVANTAGES = {"split": _split, "local": _local, "subtree": _subtree, "leaf": _leaf}
