"""What the sampler is asked for, how an encoded prompt becomes a request, and where its seed comes from."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from data_pipeline.pixels import PixelPatches
from data_pipeline.prompts import Prompt


@dataclass(frozen=True)
class RolloutRequest:
    """One prompt (T tokens, P patches of I images) and how to draw its tree of leaves."""

    problem_id: str
    token_ids: Int[np.ndarray, "T"]
    patches: PixelPatches | Float[np.ndarray, "P V"]
    grid_thw: Int[np.ndarray, "I 3"]
    positions: Int[np.ndarray, "3 T"]
    rope_delta: int
    seed: int  # the tree is a function of the seed, the prompt and the weights, not of what else is sampled
    group_size: int  # leaves
    root_leaves: int  # leaves that start at the root; the others branch, or start at the root if nothing calls for it
    max_branches_per_sequence: int  # of a first root
    tau_high: float  # nats; infinity: no branching
    branch_at: str  # see `branching`
    branch_choice: str
    temperature: float
    top_p: float
    top_k: int
    max_new_tokens: int
    stop: tuple[str, ...] = ()  # a leaf ends with the token that completes one of these


class Piece(NamedTuple):
    """What a leaf has drawn since somebody last asked."""

    leaf: int
    token_ids: Int[np.ndarray, "N"]
    log_probs: Float[np.ndarray, "N"]
    entropies: Float[np.ndarray, "N"]
    window_means: Float[np.ndarray, "N"]  # known w - 1 tokens later: who needs all of them asks from the first token on
    finish_reason: str  # empty while it goes on


def derive_seed(*parts: int | str) -> int:
    """Returns a 31-bit seed that depends on every part: the run's seed, the purpose, the step, the problem."""
    digest = hashlib.blake2b("/".join(str(part) for part in parts).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") >> 1


def rollout_request(
    prompt: Prompt,
    *,
    seed: int,
    group_size: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    root_leaves: int | None = None,
    max_branches_per_sequence: int = 0,
    tau_high: float = math.inf,
    branch_at: str = "window_end",
    branch_choice: str = "first",
    stop: Sequence[str] = (),
) -> RolloutRequest:
    """Returns a request for `group_size` leaves. Without `root_leaves` and `tau_high` they are independent samples."""
    return RolloutRequest(
        problem_id=prompt.problem_id,
        token_ids=prompt.token_ids,
        patches=prompt.patches,
        grid_thw=prompt.grid_thw,
        positions=prompt.positions,
        rope_delta=prompt.rope_delta,
        seed=seed,
        group_size=group_size,
        root_leaves=group_size if root_leaves is None else root_leaves,
        max_branches_per_sequence=max_branches_per_sequence,
        tau_high=tau_high,
        branch_at=branch_at,
        branch_choice=branch_choice,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        max_new_tokens=max_new_tokens,
        stop=tuple(stop),
    )
