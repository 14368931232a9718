"""We-Math, testmini: 525 multi-step problems, each also asked step by step (Qiao et al., ACL 2025); strict and loose
score.

Layout: https://huggingface.co/datasets/We-Math/We-Math, `data/testmini-*.parquet`. Prompt: the paper's template, as
public code that answers We-Math holds it (lmms-eval, VLMEvalKit; their line breaks differ). Extraction and score:
https://github.com/We-Math/We-Math, evaluation/four_dimensional_metrics.py: (525 - IG / 2 - RM - IK) / 525, that is, the
mean over problems of

| | multi-step problem right | wrong |
|---|---|---|
| every step right | 1 | 1/2 (inadequate generalisation) |
| strict: a step wrong | 0 (rote memorisation) | 0 (insufficient knowledge) |
| loose: a step wrong | 1, and 0 only if all are | 0 |
"""

import re
from collections.abc import Sequence
from pathlib import Path

from ares_jax.evaluation.benchmark import Benchmark, Graded, Metric, Sample, Verdict
from ares_jax.evaluation.final_answer import letter, spoken, untexted
from ares_jax.evaluation.published import image_bytes, rows, value

_OPTION = re.compile(  # not "A, B or C", and not the article
    r"(?:option\s+)?([A-H])(?![A-Za-z])(?!\s*(?:,|/|\bor\b|\band\b)\s*[A-H]\b)(?!(?<=A)\s+[a-z])", re.IGNORECASE
)
_PROMPT = """Now, we require you to solve a multiple-choice math question. Please briefly describe your thought process and \
provide the final answer(option).
Question: {question}
Option: {option}
Regarding the format, please answer following the template below, and be sure to include two <> symbols:
<Thought process>: <<your thought process>> <Answer>: <<your option>>"""


def load(folder: Path) -> list[Sample]:
    return [_sample(row, folder) for _, row in rows(folder, "data/testmini-*.parquet")]


def grade(sample: Sample, response: str) -> Verdict:
    """A boxed letter; else, as upstream, what stands behind the last "Answer", without <, >, colon and full stop."""
    said = spoken(response)
    chosen = letter(response, 8) if "\\boxed" in said else None
    if chosen is None and "\\boxed" not in said:
        tail = re.sub(r"[<>:.*()$]", "", untexted(said.replace("</Answer>", "").rpartition("Answer")[2])).strip()
        found = _OPTION.match(tail)
        chosen = found[1].upper() if found else letter(response, 8)
    return Verdict(chosen == sample.answer.strip(), chosen)


def strict(graded: Sequence[Graded]) -> float:
    """Returns a problem's score: every step must be right."""
    steps, whole = _parts(graded)
    return (1.0 if whole else 0.5) if all(steps) else 0.0


def loose(graded: Sequence[Graded]) -> float:
    """Returns a problem's score: of a right problem one right step is enough."""
    steps, whole = _parts(graded)
    if whole:
        return float(any(steps))
    return 0.5 if all(steps) else 0.0


def _parts(graded: Sequence[Graded]) -> tuple[list[float], float]:
    steps = [item.score for item in graded if item.sample.groups["step"] != "multi"]
    return steps, max((item.score for item in graded if item.sample.groups["step"] == "multi"), default=0.0)


def _sample(row, folder: Path) -> Sample:
    key = str(value(row, "key"))  # 2steps_1, 2steps_2, 2steps_multi, 3steps_1, ...
    steps, _, step = key.partition("_")
    return Sample(
        f"{row['ID']}/{key}",
        (
            image_bytes(value(row, "image_path"), folder),
            _PROMPT.format(question=value(row, "question"), option=value(row, "option")),
        ),
        str(value(row, "answer")),
        unit=f"{row['ID']}/{steps}",
        groups={"steps": steps, "step": step, "concept": str(row.get("knowledge concept", ""))},
    )


WEMATH = Benchmark(
    "wemath", "We-Math, testmini", "We-Math/We-Math", ("data/testmini-*.parquet",), load, grade,
    metrics=(Metric("strict", strict), Metric("loose", loose)),
)  # fmt: skip
