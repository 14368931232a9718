"""GPQA, diamond: 198 questions that experts of another field cannot look up (Rein et al., COLM 2024).

Layout: https://huggingface.co/datasets/Idavidrein/gpqa (gated: accept its terms first), `gpqa_diamond.csv`. Prompt and
extraction: https://github.com/openai/simple-evals (common.py, gpqa_eval.py): "Answer: $LETTER" on the last line; of
several the last counts, upstream the first. Upstream shuffles the options anew for each of several repetitions; here
once, by the record's id, so that every model sees the same order.
"""

import random
import re
from pathlib import Path

from ares_jax.evaluation.benchmark import Benchmark, Sample, Verdict
from ares_jax.evaluation.final_answer import letter, spoken
from ares_jax.evaluation.published import rows, value

_PROMPT = """Answer the following multiple choice question. The last line of your response should be of the following \
format: 'Answer: $LETTER' (without quotes) where LETTER is one of ABCD. Think step by step before answering.

{question}

{options}"""
_ANSWER = re.compile(r"(?i)Answer[ \t]*:[ \t]*\$?([A-D])\$?(?![A-Za-z])(?!\s*(?:,|/|or\b|and\b)\s*[A-D]\b)")
_COLUMNS = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")


def load(folder: Path) -> list[Sample]:
    return [_sample(row) for _, row in rows(folder, "gpqa_diamond.csv")]


def grade(sample: Sample, response: str) -> Verdict:
    chosen = letter(response, 4, sample.facts["options"])
    if chosen is None and "\\boxed" not in spoken(response):
        found = _ANSWER.findall(spoken(response))
        chosen = found[-1].upper() if found else None
    return Verdict(chosen == sample.answer, chosen)


def _sample(row) -> Sample:
    name = str(value(row, "Record ID"))
    options = [str(value(row, column)).strip() for column in _COLUMNS]
    order = random.Random(name).sample(range(4), 4)
    shuffled = [options[i] for i in order]
    lines = "\n".join(f"{letter_}) {option}" for letter_, option in zip("ABCD", shuffled, strict=True))
    return Sample(
        name,
        (_PROMPT.format(question=value(row, "Question"), options=lines),),
        "ABCD"[order.index(0)],
        groups={"domain": str(row.get("High-level domain", "")), "subdomain": str(row.get("Subdomain", ""))},
        facts={"options": shuffled},
    )


GPQA = Benchmark("gpqa", "GPQA, diamond", "Idavidrein/gpqa", ("gpqa_diamond.csv",), load, grade)
