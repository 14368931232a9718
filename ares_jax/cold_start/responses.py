"""Graded responses of an endpoint's model to our problems, in a JSONL file that a killed run goes on with."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from tqdm import tqdm

from ares_jax.errors import UserError
from ares_jax.metrics import read_jsonl, write_atomic
from ares_jax.rewards.grading import is_correct
from ares_jax.sampling.requests import derive_seed
from ares_jax.service.endpoint import Answer, ask_all, messages
from data_pipeline.sources import Source


def endpoint_responses(
    endpoint: ConfigDict,
    problems: Source,
    indices: Sequence[int],
    path: Path,
    *,
    samples: int,
    max_tokens: int,
    seed: int,
    name: str,
) -> list[dict]:
    """Returns one record for each problem in `indices` that the endpoint answered, in their order.

    A record, also a line of `path`: {"index", "problem_id", "source", "level", "responses": [text], "finish": [reason],
    "verdicts": [right?], "tokens", "asked": {"model", "temperature", "top_p", "max_tokens", "samples", "instruction"}}.
    Problems that `path` already holds are not asked again. Refused ones go to `<stem>.refused.jsonl` beside it and are
    counted on the console; the next run asks them again.

    Raises:
      UserError: the endpoint is away or misconfigured, or `path` holds the answers to another request.
    """
    asked = {
        "model": endpoint.model, "temperature": endpoint.temperature, "top_p": endpoint.top_p, "max_tokens": max_tokens,
        "samples": samples, "instruction": endpoint.instruction,
    }  # fmt: skip
    known = known_records(path, asked)
    todo = [index for index in indices if index not in known]
    refused: dict[int, str] = {}
    bar = tqdm(total=len(indices), initial=len(indices) - len(todo), desc=f"cold_start: {name}", unit="problem")
    right = sum(sum(record["verdicts"]) for record in known.values())

    def grade(index: int, answer: Answer) -> dict:
        problem = problems[index]
        return {
            "index": index, "problem_id": problem.problem_id, "source": problem.source, "level": problem.level,
            "responses": [r.text for r in answer.responses], "finish": [r.finish_reason for r in answer.responses],
            "verdicts": [is_correct(r.text, problem.answer) for r in answer.responses], "tokens": answer.tokens,
            "asked": asked,
        }  # fmt: skip

    def keep(record: dict) -> None:
        nonlocal right
        known[record["index"]] = record
        file.write(json.dumps(record) + "\n")
        file.flush()
        right += sum(record["verdicts"])
        bar.set_postfix(right=f"{right / (samples * len(known)):.2f}", refused=len(refused), refresh=False)
        bar.update()

    def refuse(index: int, reason: str) -> None:
        refused[index] = reason
        bar.set_postfix(refused=len(refused))

    with bar, path.open("a") as file:
        ask_all(
            endpoint, todo, lambda index: messages(problems[index], endpoint.instruction),
            lambda index: derive_seed(seed, name, problems[index].problem_id), grade,
            samples=samples, max_tokens=max_tokens, on_answer=keep, on_refusal=refuse,
        )  # fmt: skip
    rejects = path.with_name(f"{path.stem}.refused.jsonl")
    rejects.unlink(missing_ok=True)
    if refused:
        lines = [{"index": i, "problem_id": problems[i].problem_id, "reason": why} for i, why in sorted(refused.items())]
        write_atomic(rejects, "".join(json.dumps(line) + "\n" for line in lines))
        print(f"cold_start: {name}: {len(refused)} of {len(indices)} problems were refused; {rejects} says why")
    return [known[index] for index in indices if index in known]


def known_records(path: Path, asked: Mapping[str, Any]) -> dict[int, dict]:
    """Returns the records in `path` by problem index, and writes the file anew without a line cut off by a kill.

    Raises `UserError` if they answer something else than `asked`.
    """
    known = {record["index"]: record for record in read_jsonl(path)}
    for record in known.values():
        if (before := record.get("asked")) != asked:
            raise UserError(
                f"{path} holds answers to {before or 'something else'}, now {asked} is asked; move that file away"
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, "".join(json.dumps(record) + "\n" for record in known.values()))
    return known
