"""MMLU-Pro: 12 032 questions with up to ten options, 14 subjects (Wang et al., NeurIPS 2024).

Layout: https://huggingface.co/datasets/TIGER-Lab/MMLU-Pro, `data/test-*.parquet` and `data/validation-*.parquet` (five
worked examples a subject). Prompt and extraction: https://github.com/TIGER-AI-Lab/MMLU-Pro, evaluate_from_api.py: five
examples, "The answer is (X)". Of several announcements the last counts, upstream the first; where none is found
upstream guesses at random, here that is wrong; and "I" and "A" before a word in small letters are no options.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ares_jax.evaluation.benchmark import Benchmark, Sample, Verdict
from ares_jax.evaluation.final_answer import LETTERS, letter, spoken
from ares_jax.evaluation.published import rows, value

_INSTRUCTION = (
    "The following are multiple choice questions (with answers) about {category}. Think step by step and then output the "
    'answer in the format of "The answer is (X)" at the end.\n\n'
)
_TEST, _EXAMPLES = "data/test-*.parquet", "data/validation-*.parquet"
_ONE = r"(?![A-Za-z])(?!\s*(?:,|/|or\b|and\b)\s*\(?[A-J]\b)"  # not one of several
_PATTERNS = (
    r"answer is \(?([A-J])\)?" + _ONE,
    r"[aA]nswer:\s*\(?([A-J])\)?" + _ONE,
    r"\b([A-J])\b(?!['’])(?!(?<=[AI])\s+[a-z])",
)


def load(folder: Path) -> list[Sample]:
    examples: dict[str, str] = {}
    for _, row in rows(folder, _EXAMPLES):
        category = str(value(row, "category"))
        examples[category] = examples.get(category, "") + _formatted(row, str(value(row, "cot_content")))
    return [_sample(row, examples) for _, row in rows(folder, _TEST)]


def grade(sample: Sample, response: str) -> Verdict:
    """A boxed or announced letter; else, as upstream, "answer is (X)", "Answer: X", or the last that stands alone."""
    options = sample.facts["options"]
    chosen = letter(response, len(options), options)
    if chosen is None and "\\boxed" not in spoken(response):
        chosen = _announced(spoken(response))
    return Verdict(chosen == sample.answer, chosen)


def _announced(text: str) -> str | None:
    return next((found[-1] for pattern in _PATTERNS if (found := re.findall(pattern, text))), None)


def _formatted(row: Mapping, worked: str = "Let's think step by step.") -> str:
    lines = "".join(f"{LETTERS[i]}. {option}\n" for i, option in enumerate(_options(row)))
    return f"Question: {value(row, 'question')}\nOptions: {lines}Answer: {worked.removeprefix('A: ')}\n\n"


def _options(row: Mapping) -> Sequence[str]:
    return [str(option) for option in value(row, "options") if option != "N/A"]


def _sample(row: Mapping, examples: Mapping[str, str]) -> Sample:
    category = str(value(row, "category"))
    text = _INSTRUCTION.format(category=category) + examples.get(category, "") + _formatted(row)
    return Sample(
        str(value(row, "question_id")), (text.rstrip(),), str(value(row, "answer")), groups={"category": category},
        facts={"options": _options(row)},
    )  # fmt: skip


MMLU_PRO = Benchmark("mmlu_pro", "MMLU-Pro", "TIGER-Lab/MMLU-Pro", (_TEST, _EXAMPLES), load, grade)
