"""MATH-Vision: 3040 problems of real competitions, 16 subjects, 5 levels (Wang et al., NeurIPS 2024).

Layout: https://huggingface.co/datasets/MathLLMs/MathVision, `data/test-*.parquet`. Prompt: the authors' for reasoning
(https://github.com/mathllm/MATH-V, models/Qwen-VL.py), without options that are only drawn; ARES's own harness words it
otherwise (https://github.com/shawn0728/ARES, eval/src/utils/data_loaders.py). Score: theirs (evaluation/evaluate.py):
boxed answers; the letter or the option's value, equal as mathematics or, as numbers, when rounded to two decimals.
Rules alone.
"""

from pathlib import Path

from ares_jax.evaluation.benchmark import Benchmark, Sample, Verdict
from ares_jax.evaluation.final_answer import LETTERS, final_text, letter, spoken
from ares_jax.evaluation.published import image_bytes, rows, value
from ares_jax.rewards.answer_text import cleaned
from ares_jax.rewards.exact_rules import quantity
from ares_jax.rewards.grading import same_answer

_INSTRUCTION = (
    'Please solve the problem step by step and put your answer in one "\\boxed{}". If it is a multiple choice question, '
    'only one letter is allowed in the "\\boxed{}".\n'
)


def load(folder: Path) -> list[Sample]:
    return [_sample(row, folder) for _, row in rows(folder, "data/test-*.parquet")]


def grade(sample: Sample, response: str) -> Verdict:
    options = sample.facts["options"]
    if options and (chosen := letter(response, len(options), options)) is not None:
        return Verdict(chosen == sample.answer, chosen)
    text = final_text(response)
    said = spoken(response)
    if "\\boxed" not in said and quantity(cleaned(tail := said.rpartition("is ")[2])) is not None:
        text = tail  # "the length is 2.5."
    if text is None:
        return Verdict(False)
    wanted = [options[LETTERS.index(sample.answer)]] if options and sample.answer in LETTERS else [sample.answer]
    return Verdict(any(same_answer(text, answer) or _same_rounded(text, answer) for answer in wanted), text)


def _same_rounded(given: str, wanted: str) -> bool:
    a, b = quantity(cleaned(given)), quantity(cleaned(wanted))
    return a is not None and b is not None and a.unit in ("", b.unit) and round(a.real, 2) == round(b.real, 2)


def _sample(row, folder: Path) -> Sample:
    options = [str(option) for option in row.get("options") or []]
    drawn = "".join(options) == LETTERS[: len(options)]
    choices = "" if drawn else "".join(f"({LETTERS[i]}) {option}\n" for i, option in enumerate(options))
    return Sample(
        str(value(row, "id")),
        (f"{_INSTRUCTION}{value(row, 'question')}\n{choices}", image_bytes(value(row, "decoded_image"), folder)),
        str(value(row, "answer")),
        groups={"subject": str(row.get("subject", "")), "level": str(row.get("level", ""))},
        facts={"options": options},
    )


MATHVISION = Benchmark("mathvision", "MATH-Vision", "MathLLMs/MathVision", ("data/test-*.parquet",), load, grade)
