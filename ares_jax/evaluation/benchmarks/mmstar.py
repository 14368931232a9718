"""MMStar: 1500 questions that need the picture, six capabilities of 250 each (Chen et al., NeurIPS 2024).

Layout: https://huggingface.co/datasets/Lin-Chen/MMStar, `mmstar.parquet`; the question holds its options. Prompt:
lmms-eval's (lmms_eval/tasks/mmstar). Score: the authors' (https://github.com/MMStar-Benchmark/MMStar,
eval/vlmeval/evaluate/mmstar.py): the letter that the response starts with or announces, and the mean over all 1500; here
a box and other announcements count too, and a first word that only begins with the letter does not. Without "A", "(A)"
or an announcement it is wrong.
"""

import re
from pathlib import Path

from ares_jax.evaluation.benchmark import Benchmark, Sample, Verdict
from ares_jax.evaluation.final_answer import letter, spoken
from ares_jax.evaluation.published import image_bytes, rows, value

_CHOOSE = "\nAnswer with the option's letter from the given choices directly"


def load(folder: Path) -> list[Sample]:
    return [_sample(row, folder) for _, row in rows(folder, "mmstar.parquet")]


def grade(sample: Sample, response: str) -> Verdict:
    chosen = letter(response, 8)
    if chosen is None and "\\boxed" not in spoken(response):
        start = re.match(r"\(?([B-H](?=[).:,\s]|$)|A(?=[).:,\n]|$))", spoken(response))  # not "A cat is ..."
        chosen = start[1] if start else None
    return Verdict(chosen == sample.answer.strip(), chosen)


def _sample(row, folder: Path) -> Sample:
    return Sample(
        str(value(row, "index")),
        (image_bytes(value(row, "image"), folder), str(value(row, "question")).strip() + _CHOOSE),
        str(value(row, "answer")),
        groups={"category": str(row.get("category", "")), "skill": str(row.get("l2_category", ""))},
    )


MMSTAR = Benchmark("mmstar", "MMStar", "Lin-Chen/MMStar", ("mmstar.parquet",), load, grade)
