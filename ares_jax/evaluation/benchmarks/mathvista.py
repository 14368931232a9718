"""MathVista, testmini: 1000 questions over charts, geometry, figures and puzzles (Lu et al., ICLR 2024).

Layout: https://huggingface.co/datasets/AI4Math/MathVista, `data/testmini-*.parquet`; its column `query` is the official
prompt. Score: https://github.com/lupantech/MathVista (evaluation/calculate_score.py; also
lmms_eval/tasks/mathvista/mathvista_evals.py): the answer becomes a choice (the one nearest to it in edit distance), an
integer, a number rounded to the given precision, or a list, and must then be equal. Upstream GPT-4 extracts the answer;
here rules do, and the judge where they find none, or no choice that is near: a refusal is near to none.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from ares_jax.evaluation.benchmark import Benchmark, Sample, Verdict
from ares_jax.evaluation.final_answer import LETTERS, final_text, letter, untexted
from ares_jax.evaluation.published import image_bytes, rows, value
from ares_jax.rewards.answer_text import cleaned
from ares_jax.rewards.exact_rules import quantity
from ares_jax.rewards.grading import same_answer

_SAID = re.compile(r"=|\\approx|\b(?:approximately|about|roughly)\b")  # x = 14: 14
_LONGEST = 200  # characters of an answer that is compared with the choices: edit distance takes quadratic time


def load(folder: Path) -> list[Sample]:
    return [_sample(row, folder) for _, row in rows(folder, "data/testmini-*.parquet")]


def grade(sample: Sample, response: str) -> Verdict:
    choices = sample.facts["choices"]
    if choices and (chosen := letter(response, len(choices), choices)) is not None:
        return Verdict(choices[LETTERS.index(chosen)] == sample.answer, chosen)
    text = final_text(response)
    if text is None:
        return Verdict(None)
    found = _choice(text, choices) if choices else normalised(text, sample.facts["answer_type"], sample.facts["precision"])
    wanted = _listed(sample.answer) if sample.facts["answer_type"] == "list" else sample.answer.strip()
    return Verdict(None if found is None else found == wanted, text)


def normalised(text: str, answer_type: str, precision: int) -> str | None:
    """Returns the answer as the reference is written, None if it is none of that type."""
    if answer_type == "list":
        return _listed(text)
    number = quantity(_SAID.split(cleaned(text))[-1].strip())
    if number is None:
        return None
    if answer_type == "integer":
        return str(int(number.value))
    return str(round(number.real, precision)) if answer_type == "float" else text.strip()


def _listed(text: str) -> str:
    items = untexted(text).replace("\\", "").strip("$ []").split(",")
    return f"[{', '.join(item.strip() for item in items)}]"


def _choice(text: str, choices: Sequence[str]) -> str | None:
    """Returns the only choice that means the same, else that which takes the fewest changes, unless more than half of it."""
    if len(text) > _LONGEST:
        return None
    same = [choice for choice in choices if same_answer(text, choice)]
    if len(same) == 1:
        return same[0]
    nearest = min(choices, key=lambda choice: edit_distance(text, choice))
    return nearest if edit_distance(text, nearest) * 2 <= len(nearest) else None


def edit_distance(a: str, b: str) -> int:
    """Returns how many insertions, deletions and replacements of a character make `b` of `a` (Levenshtein, 1966)."""
    previous = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        current = [i]
        for j, y in enumerate(b, start=1):
            current.append(min(previous[j] + 1, current[-1] + 1, previous[j - 1] + (x != y)))
        previous = current
    return previous[-1]


def _sample(row, folder: Path) -> Sample:
    metadata = row.get("metadata") or {}
    names = ("category", "task", "context", "grade", "language", "source")
    groups = {**{name: str(metadata.get(name, "")) for name in names}, "question_type": str(row.get("question_type", ""))}
    choices = [str(choice) for choice in row.get("choices") or []] if row.get("question_type") == "multi_choice" else []
    return Sample(
        str(value(row, "pid")),
        (image_bytes(value(row, "decoded_image"), folder), str(value(row, "query"))),
        str(value(row, "answer")),
        groups=groups,
        facts={
            "choices": choices,
            "answer_type": str(row.get("answer_type", "")),
            "precision": int(row.get("precision") or 0),
        },
    )


MATHVISTA = Benchmark(
    "mathvista", "MathVista, testmini", "AI4Math/MathVista", ("data/testmini-*.parquet",), load, grade,
    judge_rule="The final answer must be the reference's option or number (a number at the precision that is asked for).",
)  # fmt: skip
