"""Logged trees, `rollouts.jsonl`: what the report draws, and trigger words are mined from."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ares_jax.metrics import append_jsonl, read_jsonl, write_atomic
from ares_jax.sampling.rollout_tree import RolloutTree
from data_pipeline.images import to_data_url

_SHOWN = 4  # trees of an iteration


def begin_log(path: Path, step: int) -> None:
    """Drops what was logged of steps after `step`, which will be done again."""
    kept = [line for line in read_jsonl(path) if line["step"] <= step and step]
    write_atomic(path, "".join(json.dumps(line) + "\n" for line in kept))


def log_trees(path: Path, trees: Sequence[RolloutTree], tokenizer, *, step: int, tau_high: float) -> None:
    """Appends those trees of this process that have the most branches."""
    shown = sorted(trees, key=lambda tree: (-tree.branches, tree.problem_id))[:_SHOWN]
    append_jsonl(path, (_record(tree, tokenizer, step, tau_high) for tree in shown))


def _record(tree: RolloutTree, tokenizer, step: int, tau_high: float) -> dict:
    leaves = [
        {
            "tokens": [tokenizer.decode([i]) for i in leaf.token_ids.tolist()],
            "entropies": np.round(leaf.entropies, 4).tolist(),
            "window_means": np.round(leaf.window_means, 4).tolist(),
            "window_mask": leaf.window_mask.tolist(), "parent": leaf.parent,
            "branch_position": leaf.branch_position, "reward": float(reward), "correct": bool(correct),
        }
        for leaf, reward, correct in zip(tree.leaves, tree.overall, tree.graded, strict=True)
    ]  # fmt: skip
    problem = tree.problem
    return {
        "step": step, "problem_id": tree.problem_id, "level": problem.level, "question": problem.question,
        "answer": problem.answer, "image": None if (picture := problem.picture()) is None else to_data_url(picture),
        "tau_high": tau_high, "leaves": leaves,
    }  # fmt: skip
