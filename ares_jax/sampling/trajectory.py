"""What the sampler is asked for and what it returns. Plain NumPy, so that it crosses processes."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int


@dataclass(frozen=True)
class RolloutRequest:
    """One prompt (T tokens, P patches of I images) and how to draw its tree of leaves."""

    problem_id: str
    token_ids: Int[np.ndarray, "T"]
    patches: Float[np.ndarray, "P 1176"]
    grid_thw: Int[np.ndarray, "I 3"]
    positions: Int[np.ndarray, "3 T"]
    rope_delta: int
    seed: int  # the tree is a function of the seed, the prompt and the weights, not of what else is sampled
    group_size: int  # leaves
    root_leaves: int  # leaves that start at the root; the others branch, or start at the root if nothing calls for it
    max_branches_per_sequence: int
    tau_high: float  # nats; infinity: no branching
    temperature: float
    top_p: float
    top_k: int
    max_new_tokens: int
    stop: tuple[str, ...] = ()  # a leaf ends with the token that completes one of these


@dataclass(frozen=True)
class Trajectory:
    """A leaf: N response tokens from the root to its end, the prefix it shares with its parent included."""

    token_ids: Int[np.ndarray, "N"]
    log_probs: Float[np.ndarray, "N"]  # of the full distribution at the sampling temperature
    entropies: Float[np.ndarray, "N"]  # nats
    window_means: Float[np.ndarray, "N"]  # of the window that starts here; 0 where it is incomplete
    window_mask: Bool[np.ndarray, "N"]  # a validated high-entropy window starts here
    policy_version: Int[np.ndarray, "N"]  # of the weights that drew the token
    parent: int  # index of a leaf of the group; -1: starts at the root
    branch_position: int  # index of the first token that is its own; 0 for a root
    finish_reason: str  # "stop" or "length"


class Piece(NamedTuple):
    """What a leaf has drawn since somebody last asked."""

    leaf: int
    token_ids: Int[np.ndarray, "N"]
    log_probs: Float[np.ndarray, "N"]
    entropies: Float[np.ndarray, "N"]
    window_means: Float[np.ndarray, "N"]  # known w - 1 tokens later: who needs all of them asks from the first token on
    finish_reason: str  # empty while it goes on


@dataclass(frozen=True)
class RolloutGroup:
    """All leaves of a prompt, roots first, and what they cost in tokens."""

    problem_id: str
    leaves: tuple[Trajectory, ...]
    prompt_tokens: int
    computed_tokens: int  # that went through the model, the prompt once
    shared_tokens: int  # prompt and response tokens whose keys and values a leaf took over instead

    @property
    def branches(self) -> int:
        return sum(leaf.parent >= 0 for leaf in self.leaves)
