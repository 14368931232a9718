"""ARES's hard-validation set: problems that a strong model failed in all of three attempts.

Layout: https://huggingface.co/datasets/csfufu/fufu_hard1, split train, which the original's harness reads with the
columns id, question, answer, source and image, a list of which it sends the first
(https://github.com/shawn0728/ARES/blob/main/eval/src/utils); or the `hard_validation.jsonl` that our cold start writes.
No description of the data set itself could be found: any Parquet file there is read, images, if a list, are all sent.
Prompt: the question alone, then the picture, as there. Score: the boxed answer; upstream it must be the reference's very
characters, and a model extracts it where there is no box; here it must mean the same, and no box is the judge's.
"""

from pathlib import Path

from ares_jax.evaluation.benchmark import Benchmark, Sample, Verdict
from ares_jax.evaluation.final_answer import final_text
from ares_jax.evaluation.published import first_rows, image_bytes, value
from ares_jax.rewards.grading import same_answer

_FILES = ("hard_validation.jsonl", "*.parquet", "data/*.parquet", "*/train-*.parquet")


def load(folder: Path) -> list[Sample]:
    return [_sample(row, number, path.parent) for number, (path, row) in enumerate(first_rows(folder, *_FILES))]


def grade(sample: Sample, response: str) -> Verdict:
    text = final_text(response)
    return Verdict(None if text is None else same_answer(text, sample.answer), text)


def _sample(row, number: int, folder: Path) -> Sample:
    images = row.get("images", row.get("image"))
    images = images if isinstance(images, list) else [images] if images is not None else []
    pictures = tuple(image_bytes(image, folder) for image in images)
    question = str(value(row, "question", "problem")).replace("<image>", "").strip()
    name = row.get("id", row.get("problem_id", number))
    return Sample(
        f"{number}/{name}", (question, *pictures), str(value(row, "answer")), groups={"source": str(row.get("source", ""))}
    )


ARES_HARD = Benchmark(
    "ares_hard", "ARES, hard validation", "csfufu/fufu_hard1", _FILES, load, grade,
    judge_rule="The final answer must mean the same as the reference.",
)  # fmt: skip
