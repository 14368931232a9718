"""A rollout tree while it grows: who waits to begin, and what each leaf has drawn. On the host, without devices."""

import collections
import math
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import UInt32

from ares_jax.sampling.branching import forks
from ares_jax.sampling.requests import Piece, RolloutRequest
from ares_jax.sampling.rollout_tree import RolloutTree, Trajectory, tree_of
from ares_jax.sampling.stops import stop_bytes

_COLUMNS = {
    "token_ids": np.int32, "log_probs": np.float32, "entropies": np.float32, "window_means": np.float32,
    "window_mask": np.bool_, "policy_version": np.int32,
}  # fmt: skip


@dataclass(eq=False)
class Leaf:
    """A page-table row and a few numbers."""

    group: "Group"
    index: int
    parent: int  # -1: starts at the root
    start: int  # branch position
    pages: list[int]
    cached: int  # tokens in the cache
    count: int  # response tokens so far
    columns: dict[str, np.ndarray]  # those of `Trajectory`, with room for all that may be drawn
    done: bool = False
    reason: str = ""

    def piece(self, seen: int) -> Piece:
        """Returns what was drawn after the first `seen` tokens."""
        names = ("token_ids", "log_probs", "entropies", "window_means")
        columns = {name: self.columns[name][seen : self.count].copy() for name in names}
        return Piece(self.index, **columns, finish_reason=self.reason if self.done else "")


@dataclass(eq=False)
class Group:
    """The tree of a request: its leaves and, until they have begun, the (parent, start) of those to come."""

    number: int
    request: RolloutRequest
    prompt_pages: list[int]
    keys: UInt32[np.ndarray, "G 2"]  # of the leaves
    leaves: list[Leaf] = field(default_factory=list)
    waiting: collections.deque[tuple[int, int]] = field(init=False)
    stops: tuple[bytes, ...] = field(init=False)
    forked: int = 0  # forks so far
    branched: bool = False  # every leaf of the tree has begun or waits
    filled: bool = False  # the prompt's keys and values are all in the cache

    def __post_init__(self):
        self.waiting = collections.deque([(-1, 0)] * self.request.root_leaves)
        self.stops = stop_bytes(self.request.stop)

    @property
    def ended(self) -> bool:
        """Whether every leaf of the tree has been drawn."""
        return self.branched and not self.waiting and all(leaf.done for leaf in self.leaves)

    def page_lists(self) -> list[list[int]]:
        """Returns the lists themselves, of the prompt and of every leaf."""
        return [self.prompt_pages, *(leaf.pages for leaf in self.leaves)]

    def pages_held(self, page_size: int) -> int:
        """Returns the pages of the prompt, and those that each leaf has to itself."""
        prompt = len(self.request.token_ids)
        return len(self.prompt_pages) + sum(len(leaf.pages) - (prompt + leaf.start - 1) // page_size for leaf in self.leaves)

    def prefix(self) -> tuple[list[int], int]:
        """Returns the pages of which the next waiting leaf takes over some tokens, and how many tokens.

        That is all but the last token before its own first one, which it feeds again.
        """
        parent, start = self.waiting[0]
        return self.prompt_pages if parent < 0 else self.leaves[parent].pages, len(self.request.token_ids) + start - 1

    def begin_leaf(self, pages: list[int], window: int) -> Leaf:
        """Begins the next waiting leaf on pages that hold its prefix."""
        parent, start = self.waiting.popleft()
        columns: dict[str, np.ndarray] = {
            name: np.zeros(self.request.max_new_tokens, kind) for name, kind in _COLUMNS.items()
        }
        if parent >= 0:
            for name, column in columns.items():
                column[:start] = self.leaves[parent].columns[name][:start]
        begun = max(0, start - window + 1)  # windows that reach over the branch point are the leaf's own
        columns["window_means"][begun:] = 0
        columns["window_mask"][begun:] = False
        cached = len(self.request.token_ids) + start - 1
        leaf = Leaf(self, len(self.leaves), parent, start, pages, cached, start, columns)
        self.leaves.append(leaf)
        return leaf

    def branch(self, window: int) -> None:
        """Lets windows of the first roots fork, and spends what is left on fresh roots once those have ended.

        The forks are the same however the roots were scheduled: one is taken when no other can come before it.
        """
        request = self.request
        roots = self.leaves[: request.root_leaves]
        if self.branched or len(roots) < request.root_leaves:
            return
        slots = request.group_size - request.root_leaves
        known = min((leaf.count for leaf in roots if not leaf.done), default=math.inf)
        if slots > self.forked and (known == math.inf or request.branch_choice == "first"):
            points = forks(
                [leaf.columns["window_means"][: leaf.count] for leaf in roots],
                [leaf.columns["window_mask"][: leaf.count] for leaf in roots],
                known=known, slots=slots, max_per_root=request.max_branches_per_sequence, window=window,
                branch_at=request.branch_at, branch_choice=request.branch_choice,
            )  # fmt: skip
            self.waiting.extend(points[self.forked :])
            self.forked = len(points)
        if known == math.inf:
            self.waiting.extend([(-1, 0)] * (slots - self.forked))
        self.branched = known == math.inf or self.forked == slots

    def result(self, window: int) -> RolloutTree:
        """Returns the finished tree."""
        leaves = [
            Trajectory(
                **{name: column[: leaf.count] for name, column in leaf.columns.items()},
                parent=leaf.parent, branch_position=leaf.start, finish_reason=leaf.reason,
            )
            for leaf in self.leaves
        ]  # fmt: skip
        request = self.request
        return tree_of(
            request.problem_id, leaves, prompt_tokens=len(request.token_ids), window=window, first_roots=request.root_leaves
        )
