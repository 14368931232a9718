"""MathVerse: one geometry problem in six versions, from text-rich to all in the picture (Zhang et al., ECCV 2024).

Layout: https://huggingface.co/datasets/AI4Math/MathVerse, `testmini.parquet`, 3940 rows (788 problems, 5 versions with
a picture). Prompt: the column `query_cot`, as in
https://github.com/shawn0728/ARES/blob/main/eval/src/utils/data_loaders.py. Score:
https://github.com/ZrrSkywalker/MathVerse extracts and compares with GPT-4; here rules decide what they can and the
judge the rest. The seventh version, without a picture, is another file upstream and not read.
"""

from collections.abc import Sequence
from pathlib import Path

from ares_jax.evaluation.benchmark import Benchmark, Sample, Verdict
from ares_jax.evaluation.final_answer import final_text, letter
from ares_jax.evaluation.published import image_bytes, rows, value
from ares_jax.rewards.grading import same_answer

_RULE = (
    "It is right only if it matches the reference completely; for questions without options the same meaning in another "
    "form counts, such as 0.5 m and 50 cm."
)


def load(folder: Path) -> list[Sample]:
    return [_sample(row, path.parent) for path, row in rows(folder, "testmini.parquet")]


def load_vision_only(folder: Path) -> list[Sample]:
    return [sample for sample in load(folder) if sample.groups["version"] == "Vision Only"]


def grade(sample: Sample, response: str) -> Verdict:
    if sample.facts["choices"]:
        chosen = letter(response, 8)
        return Verdict(None if chosen is None else chosen == sample.answer.strip("(). ").upper(), chosen)
    text = final_text(response)
    return Verdict(True if text is not None and same_answer(text, sample.answer) else None, text)


def _sample(row, folder: Path) -> Sample:
    metadata = row.get("metadata") or {}
    groups = {
        "version": str(value(row, "problem_version")),
        "subject": str(metadata.get("subject", "")),
        "subfield": str(metadata.get("subfield", "")),
    }
    parts: Sequence = (str(value(row, "query_cot")), image_bytes(value(row, "image"), folder))
    return Sample(
        str(value(row, "sample_index")), tuple(parts), str(value(row, "answer")), groups=groups,
        facts={"choices": row.get("question_type") == "multi-choice"},
    )  # fmt: skip


VISION_ONLY = Benchmark(
    "mathverse_vision_only", "MathVerse, vision only", "AI4Math/MathVerse", ("testmini.parquet",), load_vision_only, grade,
    judge_rule=_RULE,
)  # fmt: skip
ALL = Benchmark(
    "mathverse", "MathVerse, all versions", "AI4Math/MathVerse", ("testmini.parquet",), load, grade, judge_rule=_RULE
)
