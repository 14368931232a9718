"""From rollout trees to rewards: grade every leaf, find the prompt's difficulty, shape by exploration."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from ml_collections import ConfigDict

from ares_jax.aepo.difficulty import bucket
from ares_jax.aepo.reward import overlong_penalty, paper_entropy_reward, released_entropy_reward
from ares_jax.aepo.state import AepoState, bucket_means
from ares_jax.rewards.grading import has_format, is_correct
from ares_jax.sampling.trajectory import RolloutGroup
from data_pipeline.prompts import Prompt


@dataclass(frozen=True)
class ScoredGroup:
    """A tree of G leaves with what they earned."""

    prompt: Prompt
    group: RolloutGroup
    difficulty: int  # 0, 1, 2: easy, medium, hard
    correct: Bool[np.ndarray, "G"]
    windows: Int[np.ndarray, "G"]  # validated windows of the leaf
    rewards: Float[np.ndarray, "G"]  # overall: accuracy, shaping and the penalty on overlong answers
    process: int = 0  # that drew it: the prompt has its pixels there only
    formatted: int = 0  # leaves that are one thought and then a boxed answer; no part of the reward

    @property
    def accuracy(self) -> float:
        return float(self.correct.mean())


def grade(
    prompts: Sequence[Prompt], groups: Sequence[RolloutGroup], decode: Callable[[Sequence[int]], str]
) -> tuple[list[Bool[np.ndarray, "G"]], list[int]]:
    """Returns of each group which leaves answer right, and how many have the format that is asked for."""
    correct, formatted = [], []
    for prompt, group in zip(prompts, groups, strict=True):
        texts = [decode(leaf.token_ids.tolist()) for leaf in group.leaves]
        correct.append(np.array([is_correct(text, prompt.answer) for text in texts]))
        formatted.append(sum(map(has_format, texts)))
    return correct, formatted


def score(
    prompts: Sequence[Prompt],
    groups: Sequence[RolloutGroup],
    correct: Sequence[Bool[np.ndarray, "G"]],
    state: AepoState,
    aepo: ConfigDict,
    *,
    max_tokens: int,
) -> list[ScoredGroup]:
    """Returns the groups with their rewards; `aepo` is that section of the config, `max_tokens` the limit of a response.

    The target number of windows of a bucket comes from earlier iterations; before there are any, from these groups.
    """
    windows = [np.array([leaf.window_mask.sum() for leaf in group.leaves]) for group in groups]
    buckets = [int(bucket(int(c.sum()), len(c), aepo.difficulty_rule)) for c in correct]
    sizes = [len(c) for c in correct]
    d, n = np.repeat(buckets, sizes), np.concatenate(windows).astype(float)
    mean, variance = bucket_means(n, d)
    target = np.where(np.isnan(state.target), mean, state.target)[d]
    right = np.concatenate(correct)
    if aepo.shaping == "released":
        shaping = np.asarray(released_entropy_reward(n, target, d, right, state.alpha[d]))
    elif aepo.shaping == "paper":
        shaping = np.asarray(
            paper_entropy_reward(
                n,
                target,
                d,
                right,
                mean[d],
                variance[d],
                scale=aepo.shaping_weight,
                max_multiplier=aepo.shaping_cap,
                easy_excess=aepo.easy_excess,
            )  # fmt: skip
        )
    elif aepo.shaping == "none":
        shaping = np.zeros(len(n))
    else:
        raise ValueError(f"aepo.shaping={aepo.shaping!r} is not one of released, paper, none")
    lengths = np.array([len(leaf.token_ids) for group in groups for leaf in group.leaves])
    overlong = aepo.overlong_penalty * overlong_penalty(lengths, max_tokens, aepo.overlong_buffer)
    rewards = np.split(right + shaping + overlong, np.cumsum(sizes)[:-1])
    return [ScoredGroup(*parts) for parts in zip(prompts, groups, buckets, correct, windows, rewards, strict=True)]
