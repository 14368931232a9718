"""How an encoded prompt becomes a request to the sampler, and where its seed comes from."""

import hashlib
import math
from collections.abc import Sequence

from ares_jax.sampling.trajectory import RolloutRequest
from data_pipeline.prompts import Prompt


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
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        max_new_tokens=max_new_tokens,
        stop=tuple(stop),
    )
