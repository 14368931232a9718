"""Rollout trees that no model drew, and their leaves as segments of their own."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from ml_collections import ConfigDict

from ares_jax.aepo.batch import scales, token_fields, unshared
from ares_jax.aepo.state import AepoState
from ares_jax.sampling.rollout_tree import RolloutTree, Trajectory, tree_of
from data_pipeline.packing import Segment, response_segment
from data_pipeline.prompts import Prompt

_ROOTS, _BRANCHES = 4, 4


def leaf_segments(trees: Sequence[RolloutTree], state: AepoState, a: ConfigDict) -> list[Segment]:
    """Returns every leaf as a segment of its own, with what the loss needs; a shared token counts with its owner."""
    divisors = scales(trees, a.scale)
    if a.tree == "leaf":
        trees = [unshared(tree) for tree in trees]
    segments = []
    for tree, fields in zip(trees, token_fields(trees, divisors, state, a), strict=True):
        for number in range(tree.size):
            path = tree.path(number)
            own = {name: value[path] for name, value in fields.items()}
            own["loss_mask"] = own["loss_mask"] & (np.arange(len(path)) >= tree.branch_positions[number])
            segments.append(response_segment(tree.problem, tree.token_ids[path], own))
    return segments


def random_group(
    prompt: Prompt, rng: np.random.Generator, allowed: np.ndarray, *, shortest: int = 15, longest: int = 45
) -> RolloutTree:
    """Returns a tree of random leaves, of `shortest` to `longest` - 1 tokens, half of them branches at random places."""
    choices = np.flatnonzero(allowed)
    leaves: list[Trajectory] = []
    for number in range(_ROOTS + _BRANCHES):
        parent = int(rng.integers(_ROOTS)) if number >= _ROOTS else -1
        start = int(rng.integers(1, len(leaves[parent].token_ids))) if parent >= 0 else 0
        own = rng.choice(choices, int(rng.integers(shortest, longest)) - min(start, shortest - 1))
        tokens = np.concatenate([leaves[parent].token_ids[:start], own]) if parent >= 0 else own
        n = len(tokens)
        leaves.append(
            Trajectory(
                tokens, -4 - rng.random(n), rng.random(n), rng.random(n), rng.random(n) < 0.1, np.zeros(n, int), parent,
                start, "stop",
            )
        )  # fmt: skip
    correct = rng.random(len(leaves)) < 0.5
    tree = tree_of(prompt.problem_id, leaves, prompt_tokens=len(prompt.token_ids), window=4)
    difficulty = int(rng.integers(3))
    return replace(tree, prompt=prompt, difficulty=difficulty, correct=correct, rewards=correct.astype(float))
