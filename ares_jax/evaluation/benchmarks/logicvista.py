"""LogicVista: 448 visual puzzles, five kinds of logical reasoning (Xiao et al., 2024).

Layout: https://huggingface.co/datasets/lscpku/LogicVista, split test; columns as lmms-eval
(https://github.com/EvolvingLMMs-Lab/lmms-eval, lmms_eval/tasks/logicvista) and others read them; the file's name is the
one that the hub gives to a split. Or the authors' own, a clone of https://github.com/Yijia-Xiao/LogicVista:
data/dataset.json and data/images. Prompt: the question alone, as lmms-eval. Score: the set of chosen options must be the
reference's: letters ("A, C"), or numbers where the question numbers its options; upstream GPT extracts them
(https://github.com/open-compass/VLMEvalKit, vlmeval/dataset/utils/logicvista.py), here rules do, and the judge where
they find none.
"""

import re
from pathlib import Path

from ares_jax.evaluation.benchmark import Benchmark, Sample, Verdict
from ares_jax.evaluation.final_answer import final_text, letters, untexted
from ares_jax.evaluation.published import first_rows, image_bytes, value

_FILES = ("data/test-*.parquet", "*/test-*.parquet", "test*.parquet", "*.parquet", "data/dataset.json")
_NUMBERS = re.compile(r"(?i)\W*+(?:options?|choices?|statements?|numbers?|no)?(?:[\W\d]|\band\b)*")


def load(folder: Path) -> list[Sample]:
    return [_sample(row, number, folder) for number, (_, row) in enumerate(first_rows(folder, *_FILES))]


def grade(sample: Sample, response: str) -> Verdict:
    wanted = frozenset(re.findall(r"[A-Z]|[0-9]+", sample.answer.upper()))
    found = _numbers(response) if sample.answer.strip()[:1].isdigit() else letters(response, 26)
    return Verdict(None if found is None else found == wanted, None if found is None else ", ".join(sorted(found)))


def _numbers(response: str) -> frozenset[str] | None:
    """Returns the numbers of an answer that consists of them, such as "3" or "options 1 and 4"."""
    text = untexted(final_text(response) or "")
    return frozenset(re.findall("[0-9]+", text)) or None if _NUMBERS.fullmatch(text) else None


def _sample(row, number: int, folder: Path) -> Sample:
    skill = row.get("skill") or ""
    image = f"data/images/{row['imagename']}" if "imagename" in row else value(row, "image")
    return Sample(
        str(row.get("id", row.get("key", number))),
        (image_bytes(image, folder), str(value(row, "question"))),
        str(value(row, "answer")),
        groups={"skill": skill if isinstance(skill, str) else ", ".join(map(str, skill))},
    )


LOGICVISTA = Benchmark(
    "logicvista", "LogicVista", "lscpku/LogicVista", _FILES, load, grade,
    judge_rule="The letters (or numbers) of the chosen options must be exactly those of the reference.",
)  # fmt: skip
