"""Ask a sampler service every problem of a split once, grade the answers, count their tokens."""

import time
from collections.abc import Callable, Mapping, Sequence

from ml_collections import ConfigDict

from ares_jax.evaluation.intervals import wilson_interval
from ares_jax.rewards.grading import is_correct
from ares_jax.sampling.gathering import GatheringSampler
from ares_jax.sampling.requests import derive_seed, rollout_request
from ares_jax.sampling.rollout_tree import RolloutTree
from data_pipeline.images import to_data_url
from data_pipeline.prompts import Prompt

LEVELS = ("easy", "medium", "hard")


def evaluate(
    sampler: GatheringSampler,
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
    known: Mapping[int, Mapping] | None = None,
    on_answer: Callable[[int, str, int], None] = lambda index, response, tokens: None,
) -> dict:
    """Returns accuracy (with a 95 % Wilson interval) and mean response tokens per level, and some samples to show.

    The result is what `evaluation/<name>.json` holds; `decode` turns token ids into text.

    Args:
      known: {"response", "tokens"} by a prompt's index: what is not asked again.
      on_answer: is told of index, response and tokens of each answer as this process gets it.
    """
    known = known or {}
    todo = [index for index in range(len(prompts)) if index not in known]
    requests = [
        rollout_request(
            prompt, seed=derive_seed(seed, split, prompt.problem_id), group_size=1, max_new_tokens=max_new_tokens,
            temperature=temperature, top_p=top_p,
        )
        for prompt in map(prompts.__getitem__, todo)
    ]  # fmt: skip

    def answer(group: RolloutTree) -> tuple[str, int]:
        token_ids = group.leaves[0].token_ids.tolist()
        return decode(token_ids), len(token_ids)

    groups = sampler.rollouts(requests, on_group=lambda place, group: on_answer(todo[place], *answer(group)))
    answers = {index: (line["response"], line["tokens"]) for index, line in known.items()}
    answers |= {index: answer(group) for index, group in zip(todo, groups, strict=True)}
    records = []
    for index, prompt in enumerate(prompts):
        response, tokens = answers[index]
        records.append((prompt, response, is_correct(response, prompt.answer), tokens))
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
            "image": None if (picture := prompt.picture()) is None else to_data_url(picture),
        }
        for prompt, response, correct, tokens in records[:samples_shown]
    ]  # fmt: skip
    return {"name": name, "split": split, "temperature": temperature, "levels": levels, "samples": samples}


def validation_metrics(
    sampler: GatheringSampler, prompts: Sequence[Prompt], decode: Callable[[Sequence[int]], str], config: ConfigDict
) -> dict[str, float]:
    """Returns accuracy and length on a run's validation split, over all and per level, and the seconds it took."""
    e, begin = config.evaluation, time.time()
    result = evaluate(
        sampler, prompts, decode, name="aepo", split="validation", seed=config.seed,
        max_new_tokens=config.sampler.max_response_tokens, temperature=e.temperature, top_p=e.top_p, samples_shown=0,
    )  # fmt: skip
    values = {"validation/accuracy": overall_accuracy(result), "time/validate": time.time() - begin}
    for name, level in result["levels"].items():
        values[f"validation/accuracy/{name}"] = level["accuracy"]
        values[f"validation/length/{name}"] = level["mean_tokens"]
    return values


def overall_accuracy(result: dict) -> float:
    """Returns the share of all problems answered correctly: the score that picks the best checkpoint."""
    problems = sum(level["problems"] for level in result["levels"].values())
    return sum(level["correct"] for level in result["levels"].values()) / problems
