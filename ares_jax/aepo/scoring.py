"""From drawn trees to rewards: grade every leaf, find the prompt's difficulty, shape by exploration."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from ml_collections import ConfigDict

from ares_jax.aepo.difficulty import bucket
from ares_jax.aepo.reward import overlong_penalty, paper_entropy_reward, released_entropy_reward
from ares_jax.aepo.state import AepoState, bucket_means
from ares_jax.rewards.grading import has_format, is_correct
from ares_jax.sampling.rollout_tree import RolloutTree
from data_pipeline.prompts import Prompt


def grade(
    prompts: Sequence[Prompt], trees: Sequence[RolloutTree], decode: Callable[[Sequence[int]], str], *, process: int = 0
) -> list[RolloutTree]:
    """Returns the trees with their prompts, which leaves answer right, and how many have the format that is asked for."""
    graded = []
    for prompt, tree in zip(prompts, trees, strict=True):
        texts = [decode(leaf.token_ids.tolist()) for leaf in tree.leaves]
        correct = np.array([is_correct(text, prompt.answer) for text in texts])
        formatted = sum(map(has_format, texts))
        graded.append(replace(tree, prompt=prompt, process=process, correct=correct, formatted=formatted))
    return graded


def score(trees: Sequence[RolloutTree], state: AepoState, aepo: ConfigDict, *, max_tokens: int) -> list[RolloutTree]:
    """Returns graded trees with difficulty and rewards; `aepo` is that section of the config, `max_tokens` the limit of a
    response.

    What is measured of a bucket, its difficulty and the number of windows, is measured of the roots: a branch begins where
    it is uncertain (method.md, section 3). The target number of windows comes from earlier iterations; before there are
    any, from these trees.
    """
    windows = [tree.windows.astype(float) for tree in trees]
    buckets = [_difficulty(tree, aepo.difficulty_rule) for tree in trees]
    d, n = np.repeat(buckets, [tree.size for tree in trees]), np.concatenate(windows)
    right, root = (np.concatenate(x) for x in ([t.graded for t in trees], [t.is_root for t in trees]))
    mean, variance = bucket_means(n[root], d[root])
    target = np.where(np.isnan(state.target), mean, state.target)[d]
    if aepo.shaping == "released":
        shaping = np.asarray(released_entropy_reward(n, target, d, right, state.alpha[d]))
    elif aepo.shaping == "paper":
        shaping = np.asarray(
            paper_entropy_reward(
                n, target, d, right, mean[d], variance[d], scale=aepo.shaping_weight, max_multiplier=aepo.shaping_cap,
                easy_excess=aepo.easy_excess,
            )
        )  # fmt: skip
    elif aepo.shaping == "none":
        shaping = np.zeros(len(n))
    else:
        raise ValueError(f"aepo.shaping={aepo.shaping!r} is not one of released, paper, none")
    lengths = np.concatenate([tree.lengths for tree in trees])
    overlong = aepo.overlong_penalty * overlong_penalty(lengths, max_tokens, aepo.overlong_buffer)
    rewards = np.split(right + shaping + overlong, np.cumsum([tree.size for tree in trees])[:-1])
    return [replace(t, difficulty=b, rewards=r) for t, b, r in zip(trees, buckets, rewards, strict=True)]


def _difficulty(tree: RolloutTree, rule: str) -> int:
    right = tree.graded[tree.is_root]
    return int(bucket(int(right.sum()), len(right), rule))
