"""The hard-validation split: problems that the teacher fails three times (method.md, section 4). Nobody learns from them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from ares_jax.metrics import read_jsonl, write_atomic
from ares_jax.rewards.grading import is_correct
from ares_jax.service.endpoint import Response
from data_pipeline.images import to_data_url
from data_pipeline.sources import Source

FILE = "hard_validation.jsonl"
HARD_ATTEMPTS = 3  # all wrong: a hard-validation problem (pass@3 = 0)


def hard_problems(problems: Source, responses: Mapping[int, Sequence[Response]]) -> list[int]:
    """Returns the indices of problems whose first three responses are all wrong: pass@3 = 0.

    A problem with fewer responses is not judged.
    """
    hard = []
    for index, raw in responses.items():
        first = raw[:HARD_ATTEMPTS]
        if len(first) == HARD_ATTEMPTS and not any(is_correct(r.text, problems[index].answer) for r in first):
            hard.append(index)
    return hard


def write_hard_split(problems: Source, indices: Sequence[int], folder: Path) -> None:
    """Writes problems as JSONL that `data.validation` takes as jsonl://, images as data URLs. None: no file."""
    if not indices:
        (folder / FILE).unlink(missing_ok=True)  # of an earlier cold start
        return
    lines = []
    for problem in (problems[index] for index in indices):
        images = [to_data_url(image) for image in problem.images]
        lines.append(
            {
                "problem_id": problem.problem_id, "source": problem.source, "level": "hard", "question": problem.question,
                "answer": problem.answer, "images": images, "video_fps": problem.video_fps,
                "videos": [[to_data_url(frame) for frame in video] for video in problem.videos],
            }
        )  # fmt: skip
    write_atomic(folder / FILE, "".join(json.dumps(line) + "\n" for line in lines))


def held_out(folder: Path) -> frozenset[tuple[str, str]]:
    """Returns (source, problem_id) of the problems that `write_hard_split` wrote, if it did: never to be trained on."""
    return frozenset((record["source"], record["problem_id"]) for record in read_jsonl(folder / FILE))
