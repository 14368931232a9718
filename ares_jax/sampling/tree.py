"""A rollout tree while it grows: who waits to begin, and what each leaf has drawn. On the host, without devices."""

import collections
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import UInt32

from ares_jax.sampling.branching import select_branches
from ares_jax.sampling.stops import stop_bytes
from ares_jax.sampling.trajectory import Piece, RolloutGroup, RolloutRequest, Trajectory

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
    branched: bool = False
    filled: bool = False  # the prompt's keys and values are all in the cache

    def __post_init__(self):
        self.waiting = collections.deque([(-1, 0)] * self.request.root_leaves)
        self.stops = stop_bytes(self.request.stop)

    @property
    def ended(self) -> bool:
        """Whether every leaf that there is or that waits has been drawn."""
        return not self.waiting and all(leaf.done for leaf in self.leaves)

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
        """Spends the leaves that are left on branch points of the roots, which have ended, and then on fresh roots."""
        request = self.request
        slots = request.group_size - request.root_leaves
        points = select_branches(
            [leaf.columns["window_means"][: leaf.count] for leaf in self.leaves],
            [leaf.columns["window_mask"][: leaf.count] for leaf in self.leaves],
            slots=slots,
            max_per_sequence=request.max_branches_per_sequence,
            spacing=window,
        )
        self.waiting.extend([*points, *[(-1, 0)] * (slots - len(points))])
        self.branched = True

    def result(self) -> RolloutGroup:
        """Returns the finished tree."""
        prompt = len(self.request.token_ids)
        leaves = tuple(
            Trajectory(
                **{name: column[: leaf.count].copy() for name, column in leaf.columns.items()},
                parent=leaf.parent, branch_position=leaf.start, finish_reason=leaf.reason,
            )
            for leaf in self.leaves
        )  # fmt: skip
        delivered = sum(prompt + leaf.count for leaf in self.leaves)
        computed = prompt + sum(leaf.count - leaf.start for leaf in self.leaves)
        return RolloutGroup(self.request.problem_id, leaves, prompt, computed, delivered - computed)
