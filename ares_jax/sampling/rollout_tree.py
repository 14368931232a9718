"""The rollout tree: what the sampler returns, rewards fill, and the learner's batch is made of. Plain NumPy.

Every token stands there once, in the order of `data_pipeline.tree_layout`: nobody copies a prefix into the leaves below it,
or has to find out again which leaf owns it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from data_pipeline.prompts import Prompt
from data_pipeline.tree_layout import path, tree_layout

TOKEN_ARRAYS = {
    "token_ids": np.int32, "log_probs": np.float32, "entropies": np.float32, "window_means": np.float32,
    "window_mask": np.bool_, "policy_version": np.int32, "first_leaf": np.int32, "last_leaf": np.int32,
    "predictor": np.int32,
}  # fmt: skip
LEAF_ARRAYS = {"walk": np.int32, "tail_means": np.float32, "tail_mask": np.bool_}
_COLUMNS = tuple(TOKEN_ARRAYS)[:6]  # of a trajectory, too


@dataclass(frozen=True)
class Trajectory:
    """A leaf as a sequence: N response tokens from the root to its end, those that it shares with its parent included."""

    token_ids: Int[np.ndarray, "N"]
    log_probs: Float[np.ndarray, "N"]  # of the full distribution at the sampling temperature
    entropies: Float[np.ndarray, "N"]  # nats
    window_means: Float[np.ndarray, "N"]  # of the window that starts here; 0 where it is incomplete
    window_mask: Bool[np.ndarray, "N"]  # a validated high-entropy window starts here
    policy_version: Int[np.ndarray, "N"]  # of the weights that drew the token
    parent: int  # number of the leaf that it branches from; -1: starts at the root
    branch_position: int  # index of the first token that is its own; 0 for a root
    finish_reason: str  # "stop" or "length"


@dataclass(frozen=True)
class RolloutTree:
    """All leaves of a prompt: N different response tokens of G leaves, and what the leaves are worth once they are graded.

    Leaves are numbered as they were drawn: first roots, branches, roots that fill slots which no window claimed. Tokens
    stand in the order of the walk, in which leaf `walk[i]` comes as number i.

    A window that begins before a leaf's branch position and reaches beyond it is the leaf's own: `tail_means` and
    `tail_mask` have those of the last `window - 1` tokens before that position.
    """

    problem_id: str
    prompt_tokens: int
    window: int  # W, tokens of an entropy window
    first_roots: int  # leaves that were drawn first
    token_ids: Int[np.ndarray, "N"]
    log_probs: Float[np.ndarray, "N"]
    entropies: Float[np.ndarray, "N"]
    window_means: Float[np.ndarray, "N"]
    window_mask: Bool[np.ndarray, "N"]
    policy_version: Int[np.ndarray, "N"]
    first_leaf: Int[np.ndarray, "N"]  # places in the walk: those first_leaf .. last_leaf have the token, the first owns it
    last_leaf: Int[np.ndarray, "N"]
    predictor: Int[np.ndarray, "N"]  # index of the token before it; -1: the prompt's last one
    walk: Int[np.ndarray, "G"]
    tail_means: Float[np.ndarray, "G W-1"]
    tail_mask: Bool[np.ndarray, "G W-1"]
    finish_reason: tuple[str, ...]  # of each leaf
    # Filled in once the leaves are graded (`aepo.scoring`).
    prompt: Prompt | None = None  # with pixels in the process that drew the tree alone
    process: int = 0  # that drew the tree
    correct: Bool[np.ndarray, "G"] | None = None
    rewards: Float[np.ndarray, "G"] | None = None  # overall: accuracy, shaping, the penalty on overlong answers
    difficulty: int | None = None  # 0, 1, 2: easy, medium, hard
    formatted: int = 0  # leaves that are one thought and then a boxed answer; no part of the reward

    @property
    def size(self) -> int:
        """G, the number of leaves."""
        return len(self.finish_reason)

    @cached_property
    def parents(self) -> list[int]:
        """Of each leaf, the leaf that it branches from; -1 for a root. Parents come before their children."""
        before = [int(self.predictor[own[0]]) if len(own) else -1 for own in self._own]
        return [int(self.walk[self.first_leaf[token]]) if token >= 0 else -1 for token in before]

    @cached_property
    def branch_positions(self) -> list[int]:
        """Of each leaf, the index of the first response token that is its own."""
        return [len(self.path(leaf)) - len(own) for leaf, own in enumerate(self._own)]

    @property
    def lengths(self) -> list[int]:
        """Response tokens of each leaf, those that it shares included."""
        return [len(self.path(leaf)) for leaf in range(self.size)]

    @property
    def is_root(self) -> Bool[np.ndarray, "G"]:
        return np.array(self.parents) < 0

    @property
    def branches(self) -> int:
        return sum(parent >= 0 for parent in self.parents)

    @property
    def computed_tokens(self) -> int:
        """Tokens that went through the model, the prompt once."""
        return self.prompt_tokens + len(self.token_ids)

    @property
    def shared_tokens(self) -> int:
        """Prompt and response tokens whose keys and values a leaf took over instead."""
        return self.size * self.prompt_tokens + sum(self.lengths) - self.computed_tokens

    @cached_property
    def windows(self) -> Int[np.ndarray, "G"]:
        """Validated windows of each leaf."""
        return np.array([leaf.window_mask.sum() for leaf in self.leaves])

    @property
    def problem(self) -> Prompt:
        """`prompt`, of a tree that has been graded."""
        assert self.prompt is not None
        return self.prompt

    @property
    def graded(self) -> Bool[np.ndarray, "G"]:
        """`correct`, of a tree that has been graded."""
        assert self.correct is not None
        return self.correct

    @property
    def accuracy(self) -> float:
        return float(self.graded.mean())

    @property
    def overall(self) -> Float[np.ndarray, "G"]:
        """`rewards`, of a tree that has been scored."""
        assert self.rewards is not None
        return self.rewards

    def path(self, leaf: int) -> Int[np.ndarray, "M"]:
        """Returns the indices of a leaf's tokens, from the root to its end."""
        return path(self.first_leaf, self.last_leaf, int(np.flatnonzero(self.walk == leaf)[0]))

    @cached_property
    def leaves(self) -> tuple[Trajectory, ...]:
        """The leaves as sequences: for graders and for people. Copies."""
        return tuple(map(self._trajectory, range(self.size)))

    def _trajectory(self, leaf: int) -> Trajectory:
        places = self.path(leaf)
        columns: dict = {name: getattr(self, name)[places] for name in _COLUMNS}
        if start := self.branch_positions[leaf]:
            tail = min(start, self.window - 1)
            columns["window_means"][start - tail : start] = self.tail_means[leaf, self.window - 1 - tail :]
            columns["window_mask"][start - tail : start] = self.tail_mask[leaf, self.window - 1 - tail :]
        return Trajectory(
            **columns, parent=self.parents[leaf], branch_position=start, finish_reason=self.finish_reason[leaf]
        )

    def joined(self, of_leaves: Sequence[Shaped[np.ndarray, "M"]]) -> Shaped[np.ndarray, "N"]:
        """Returns per-token arrays of the leaves, each from the root to its end, as one: what a token's owner says of it."""
        return np.concatenate([of_leaves[leaf][self.branch_positions[leaf] :] for leaf in self.walk])

    @cached_property
    def _own(self) -> list[Int[np.ndarray, "M"]]:
        """Indices of the tokens that each leaf owns."""
        return [np.flatnonzero(self.first_leaf == place) for place in np.argsort(self.walk)]


def tree_of(
    problem_id: str, leaves: Sequence[Trajectory], *, prompt_tokens: int, window: int, first_roots: int | None = None
) -> RolloutTree:
    """Returns the tree of leaves, in the order in which they were drawn; a `parent` is an index into it.

    `first_roots`: number of roots that were drawn first; None: all.
    """
    parents, starts = [leaf.parent for leaf in leaves], [leaf.branch_position for leaf in leaves]
    layout = tree_layout(parents, starts, [len(leaf.token_ids) for leaf in leaves])
    walk = [leaves[i] for i in layout.leaves]
    columns: dict[str, np.ndarray] = {
        name: np.concatenate([getattr(leaf, name)[leaf.branch_position :] for leaf in walk]).astype(TOKEN_ARRAYS[name])
        for name in _COLUMNS
    }
    means, mask = np.zeros((len(leaves), window - 1), np.float32), np.zeros((len(leaves), window - 1), bool)
    for row, leaf in enumerate(leaves):
        if count := min(leaf.branch_position, window - 1):
            tail = slice(leaf.branch_position - count, leaf.branch_position)
            means[row, -count:], mask[row, -count:] = leaf.window_means[tail], leaf.window_mask[tail]
    return RolloutTree(
        problem_id, prompt_tokens, window, sum(p < 0 for p in parents) if first_roots is None else first_roots, **columns,
        first_leaf=layout.first_leaf, last_leaf=layout.last_leaf, predictor=layout.predictor,
        walk=layout.leaves.astype(np.int32), tail_means=means, tail_mask=mask,
        finish_reason=tuple(leaf.finish_reason for leaf in leaves),
    )  # fmt: skip
