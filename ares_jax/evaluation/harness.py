"""Ask a sampler service every problem of a split once, grade the answers, count their tokens."""

from collections.abc import Callable, Sequence

from ares_jax.evaluation.grading import is_correct
from ares_jax.evaluation.intervals import wilson_interval
from ares_jax.sampling.requests import derive_seed, rollout_request
from data_pipeline.images import to_data_url
from data_pipeline.prompts import Prompt

LEVELS = ("easy", "medium", "hard")


def evaluate(
    client,
    prompts: Sequence[Prompt],
    decode: Callable[[Sequence[int]], str],
    *,
    name: str,
    split: str,
    seed: int,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    samples_shown: int,
    on_group: Callable[[int], None] = lambda index: None,
) -> dict:
    """Returns accuracy (with a 95 % Wilson interval) and mean response tokens per level, and some samples to show.

    The result is what `evaluation/<name>.json` holds; `decode` turns token ids into text; `on_group` is told of progress.
    """
    requests = [
        rollout_request(
            prompt, seed=derive_seed(seed, split, prompt.problem_id), group_size=1, max_new_tokens=max_new_tokens,
            temperature=temperature, top_p=top_p,
        )
        for prompt in prompts
    ]  # fmt: skip
    groups = client.rollouts(requests, on_group=lambda index, group: on_group(index))
    records = []
    for prompt, group in zip(prompts, groups, strict=True):
        leaf = group.leaves[0]
        response = decode(leaf.token_ids.tolist())
        records.append((prompt, response, is_correct(response, prompt.answer), len(leaf.token_ids)))
    levels = {}
    for level in LEVELS:
        mine = [record for record in records if record[0].level == level]
        if mine:
            correct = sum(record[2] for record in mine)
            levels[level] = {
                "problems": len(mine),
                "correct": correct,
                "accuracy": correct / len(mine),
                "interval": list(wilson_interval(correct, len(mine))),
                "mean_tokens": sum(record[3] for record in mine) / len(mine),
            }
    samples = [
        {
            "problem_id": prompt.problem_id, "level": prompt.level, "question": prompt.question, "answer": prompt.answer,
            "response": response, "correct": bool(correct), "tokens": tokens,
            "image": to_data_url(prompt.images[0]) if prompt.images else None,
        }
        for prompt, response, correct, tokens in records[:samples_shown]
    ]  # fmt: skip
    return {"name": name, "split": split, "temperature": temperature, "levels": levels, "samples": samples}


def overall_accuracy(result: dict) -> float:
    """Returns the share of all problems answered correctly: the score that picks the best checkpoint."""
    problems = sum(level["problems"] for level in result["levels"].values())
    return sum(level["correct"] for level in result["levels"].values()) / problems
