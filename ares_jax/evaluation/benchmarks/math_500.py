"""MATH-500: the 500 problems of MATH that Lightman et al. held out (2023).

Layout: https://huggingface.co/datasets/HuggingFaceH4/MATH-500, `test.jsonl`. Prompt: there is no official one for
reasoning models; this is Qwen2.5-Math's (https://github.com/QwenLM/Qwen2.5-Math). Score: the boxed answer, equal as
mathematics.
"""

from pathlib import Path

from ares_jax.evaluation.benchmark import Benchmark, Sample, Verdict
from ares_jax.evaluation.published import rows, value
from ares_jax.rewards.grading import extract_answer, same_answer

BOX_IT = "\nPlease reason step by step, and put your final answer within \\boxed{}."


def grade(sample: Sample, response: str) -> Verdict:
    """The boxed answer against the reference."""
    boxed = extract_answer(response)
    return Verdict(boxed is not None and same_answer(boxed, sample.answer), boxed)


def load(folder: Path) -> list[Sample]:
    return [
        Sample(
            str(value(row, "unique_id")), (str(value(row, "problem")) + BOX_IT,), str(value(row, "answer")),
            groups={"subject": str(row.get("subject", "")), "level": str(row.get("level", ""))},
        )
        for _, row in rows(folder, "test.jsonl")
    ]  # fmt: skip


MATH_500 = Benchmark("math_500", "MATH-500", "HuggingFaceH4/MATH-500", ("test.jsonl",), load, grade)
