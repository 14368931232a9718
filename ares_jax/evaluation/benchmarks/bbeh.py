"""BIG-Bench Extra Hard: 4520 questions of 23 tasks (Kazemi et al., ACL 2025).

Layout: https://huggingface.co/datasets/BBEH/bbeh, split train (columns task, input, target, mini, as
https://github.com/UKGovernmentBEIS/inspect_evals and others read them; the file's name could not be found, so any
Parquet, JSONL or JSON file there is read). Prompt: the paper's appendix, with "Think step by step". Extraction and
score: https://github.com/google-deepmind/bbeh, bbeh/evaluate.py; a boxed answer behind the prefix counts too, whatever
stands around it. The headline is the harmonic mean over tasks of accuracy + 1 percent, as the paper reports the full
set; `micro` is the accuracy over the mini subset, as it reports that.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from ares_jax.evaluation.benchmark import Benchmark, Metric, Sample, Verdict
from ares_jax.evaluation.final_answer import spoken
from ares_jax.evaluation.published import first_rows, value
from ares_jax.rewards.grading import extract_answer

_FILES = ("*.parquet", "*/*.parquet", "*.jsonl", "*/*.jsonl", "*.json")
_SUFFIX = """
Think step by step, and when you provide the final answer, please use the prefix "The answer is:" without any modification, \
and provide the answer directly, with no formatting, no bolding, and no markup. For instance: "The answer is: 42" or "The \
answer is: yes". If the question is multiple choice with a single correct answer, the final answer must only be the letter \
corresponding to the correct answer. For example, "The answer is: (a)"."""
_COMMA = re.compile(r",\s+")
_PREFIXES = ("The answer is:", "The final answer is ", "The final answer is: ", "The answer is ")


def load(folder: Path) -> list[Sample]:
    return [_sample(row, number) for number, (_, row) in enumerate(first_rows(folder, *_FILES))]


def grade(sample: Sample, response: str) -> Verdict:
    found = extracted(response)
    return Verdict(found is not None and _fuzzy(found, _COMMA.sub(",", sample.answer.strip().lower())), found)


def extracted(response: str) -> str | None:
    """Returns what stands behind the last "The answer is:", else in the last box; as upstream, else the first line."""
    text = spoken(response)
    if not text:
        return None
    boxed = extract_answer(response)
    announced = text
    for prefix in _PREFIXES:
        if prefix in announced:
            announced = announced.rpartition(prefix)[2].strip()
    if boxed is not None and (announced == text or "\\boxed" in announced):
        announced = boxed
    announced = announced.removesuffix(".")
    if announced.startswith("$") and announced.endswith("$"):
        announced = announced[1:-1]
    for opening in ("boxed{", "text{", "texttt{"):
        if opening in announced and announced.endswith("}"):
            announced = announced[:-1].partition(opening)[2]
    line = _COMMA.sub(",", announced.lower().replace("**", "").partition("\n")[0]).strip()
    return line.removesuffix(".").strip('`"') or None


def _fuzzy(given: str, wanted: str) -> bool:
    forms = {given, given.replace("'", ""), f"[{given}]", given.removesuffix("?")}
    if wanted in forms or wanted.replace("'", "") in forms or f"[{wanted}]" == given:
        return True
    if len(given) == 3 and given[0] == "(" and given[-1] == ")" and given[1] == wanted:
        return True
    if len(wanted) == 3 and wanted[0] == "(" and wanted[-1] == ")" and wanted[1] == given:
        return True
    try:
        return float(given) == float(wanted)
    except ValueError:
        return False


def harmonic(values: Float[np.ndarray, "U"], groups: Sequence[Mapping[str, str]]) -> float:
    """Returns the harmonic mean over tasks of their accuracies + 0.01."""
    tasks, place = np.unique([group["task"] for group in groups], return_inverse=True)
    accuracies = np.bincount(place, weights=values) / np.bincount(place)
    return float(len(tasks) / np.sum(1 / (accuracies + 0.01)))


def mini_accuracy(values: Float[np.ndarray, "U"], groups: Sequence[Mapping[str, str]]) -> float:
    """Returns the accuracy over the mini subset; over all, where no sample says that it belongs to it."""
    mini = np.array([group["mini"] == "yes" for group in groups])
    return float(values[mini].mean() if mini.any() else values.mean())


def _sample(row, number: int) -> Sample:
    task = str(value(row, "task"))
    groups = {"task": task, "mini": "yes" if str(row.get("mini")) in ("1", "True", "true") else "no"}
    return Sample(f"{task}/{number}", (str(value(row, "input")) + _SUFFIX,), str(value(row, "target")), groups=groups)


BBEH = Benchmark(
    "bbeh", "BIG-Bench Extra Hard", "BBEH/bbeh", _FILES, load, grade,
    metrics=(Metric("harmonic", combine=harmonic), Metric("micro", combine=mini_accuracy)),
)  # fmt: skip
