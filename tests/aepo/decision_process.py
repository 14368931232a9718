"""Policies of three binary tokens, whose trees of rollouts are enumerated: expectations of estimators without sampling."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

LENGTH = 3
STATES = [path for n in range(LENGTH) for path in itertools.product((0, 1), repeat=n)]


@dataclass(frozen=True)
class Process:
    """P(1) after each prefix, and the reward of each path."""

    one: dict[tuple[int, ...], float]
    reward: dict[tuple[int, ...], float]

    def probability(self, prefix, token) -> float:
        return self.one[prefix] if token else 1 - self.one[prefix]

    def value(self, prefix) -> float:
        if len(prefix) == LENGTH:
            return self.reward[prefix]
        return sum(self.probability(prefix, token) * self.value((*prefix, token)) for token in (0, 1))

    def slope(self, prefix) -> float:
        """Returns the derivative of the value at a prefix by the logit of its own P(1)."""
        p = self.one[prefix]
        return p * (1 - p) * (self.value((*prefix, 1)) - self.value((*prefix, 0)))

    def reach(self, prefix) -> float:
        return float(np.prod([self.probability(prefix[:n], token) for n, token in enumerate(prefix)]))

    def gradient(self) -> np.ndarray:
        """Returns the derivative of the value by the logits of all `STATES`."""
        return np.array([self.reach(prefix) * self.slope(prefix) for prefix in STATES])


def process(seed: int) -> Process:
    rng = np.random.default_rng(seed)
    paths = itertools.product((0, 1), repeat=LENGTH)
    return Process({s: float(rng.uniform(0.1, 0.9)) for s in STATES}, {p: float(rng.integers(0, 2)) for p in paths})


@dataclass(frozen=True)
class Tree:
    probability: float
    paths: list[tuple[int, ...]]
    parents: list[int]
    starts: list[int]

    def contribution(self, process: Process, advantages, weights) -> np.ndarray:
        """Returns sum of weight x advantage x the gradient of log pi(token), by the logits of `STATES`."""
        total = np.zeros(len(STATES))
        for path, a, w in zip(self.paths, advantages, weights, strict=True):
            for n, token in enumerate(path):
                total[STATES.index(path[:n])] += w[n] * a[n] * (token - process.one[path[:n]])
        return total

    def drawn_by_children(self) -> np.ndarray:
        """Returns how many tokens children drew themselves at each of `STATES`."""
        total = np.zeros(len(STATES))
        for path, parent, start in zip(self.paths, self.parents, self.starts, strict=True):
            if parent >= 0:
                for n in range(start, LENGTH):
                    total[STATES.index(path[:n])] += 1
        return total


def extended(process: Process, tree: Tree) -> Iterator[Tree]:
    """Yields a tree's ends: every leaf drawn to its last token, in every way."""
    missing = [(leaf, n) for leaf, path in enumerate(tree.paths) for n in range(len(path), LENGTH)]
    for tokens in itertools.product((0, 1), repeat=len(missing)):
        probability, paths = tree.probability, list(tree.paths)
        for (leaf, _), token in zip(missing, tokens, strict=True):
            probability *= process.probability(paths[leaf], token)
            paths[leaf] = (*paths[leaf], token)
        yield Tree(probability, paths, tree.parents, tree.starts)


def filled(process: Process, tree: Tree, leaves: int) -> Iterator[Tree]:
    more = leaves - len(tree.paths)
    yield from extended(
        process, Tree(tree.probability, tree.paths + [()] * more, tree.parents + [-1] * more, tree.starts + [0] * more)
    )


def causal(process: Process, forks: set[tuple[int, ...]], *, roots: int, leaves: int, most: int) -> Iterator[Tree]:
    """Yields all trees in which a leaf forks once its prefix is one of `forks`, in the order of (position, leaf).

    A leaf forks at most `most` times, children too; what is left of `leaves` are top-ups.
    """

    def grow(tree: Tree, position: int) -> Iterator[Tree]:
        if position == LENGTH:
            yield from filled(process, tree, leaves)
            return
        paths, parents, starts = list(tree.paths), list(tree.parents), list(tree.starts)
        if position:
            for leaf in range(len(paths)):
                if paths[leaf] in forks and len(paths) < leaves and parents.count(leaf) < most:
                    paths.append(paths[leaf])
                    parents.append(leaf)
                    starts.append(position)
        for tokens in itertools.product((0, 1), repeat=len(paths)):
            drawn = zip(paths, tokens, strict=True)
            chance = np.prod([process.probability(path, token) for path, token in drawn])
            longer = [(*path, token) for path, token in zip(paths, tokens, strict=True)]
            yield from grow(Tree(tree.probability * float(chance), longer, parents, starts), position + 1)

    yield from grow(Tree(1.0, [()] * roots, [-1] * roots, [0] * roots), 0)


def post_hoc(process: Process, place: Callable[[tuple[int, ...]], int], *, roots: int, leaves: int) -> Iterator[Tree]:
    """Yields all trees whose roots are drawn first and then fork at `place(path)`: a choice that sees the whole path."""
    for tree in extended(process, Tree(1.0, [()] * roots, [-1] * roots, [0] * roots)):
        chosen = [(leaf, place(path)) for leaf, path in enumerate(tree.paths)]
        chosen = [(leaf, start) for leaf, start in chosen if start > 0][: leaves - roots]
        paths = tree.paths + [tree.paths[leaf][:start] for leaf, start in chosen]
        parents, starts = ([x for x, _ in chosen], [x for _, x in chosen])
        yield from filled(process, Tree(tree.probability, paths, tree.parents + parents, tree.starts + starts), leaves)
