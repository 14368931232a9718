"""GSM8K: 1319 school problems (Cobbe et al., 2021).

Layout: https://huggingface.co/datasets/openai/gsm8k, `main/test-*.parquet`; the reference stands behind "####". There
is no official prompt for reasoning models; this is Qwen2.5-Math's. Score: the boxed answer, or else the last "answer
is" or "####", as a number.
"""

from pathlib import Path

from ares_jax.evaluation.benchmark import Benchmark, Sample, Verdict
from ares_jax.evaluation.benchmarks.math_500 import BOX_IT
from ares_jax.evaluation.final_answer import final_text, spoken
from ares_jax.evaluation.published import rows, value
from ares_jax.rewards.grading import same_answer


def load(folder: Path) -> list[Sample]:
    return [
        Sample(f"test-{number}", (str(value(row, "question")) + BOX_IT,), _reference(str(value(row, "answer"))))
        for number, (_, row) in enumerate(rows(folder, "main/test-*.parquet"))
    ]


def grade(sample: Sample, response: str) -> Verdict:
    text = spoken(response)
    found = text.rpartition("####")[2].strip() if "####" in text and "\\boxed" not in text else final_text(response)
    return Verdict(bool(found) and same_answer(str(found), sample.answer), found)


def _reference(answer: str) -> str:
    return answer.rpartition("####")[2].strip().replace(",", "")


GSM8K = Benchmark("gsm8k", "GSM8K", "openai/gsm8k", ("main/test-*.parquet",), load, grade)
