"""DynaMath: 501 seed questions, each in 10 variants; the average, and the worst case (Zou et al., ICLR 2025).

Layout: https://huggingface.co/datasets/DynaMath/DynaMath_Sample, `data/sample<k>-00000-of-<k>.parquet`, k = 1 to 10
(splits sample_variant1 to 10). Prompt, with its typing error: VLMEvalKit's
(https://github.com/open-compass/VLMEvalKit, vlmeval/dataset/dynamath.py); the authors' scripts
(https://github.com/DynaMath/DynaMath, evaluation) ask for the same JSON, worded anew for each model. Score: numbers
within 0.001 and the option's letter, as both; a text is right if the reference contains it (VLMEvalKit) or if it names
the reference (the authors). Upstream an empty text counts as contained; here it does not.
"""

import json
import math
import re
from fractions import Fraction
from pathlib import Path

from ares_jax.evaluation.benchmark import Benchmark, Metric, Sample, Verdict
from ares_jax.evaluation.final_answer import final_text, letter, spoken
from ares_jax.evaluation.published import image_bytes, rows, value
from ares_jax.rewards.answer_text import cleaned
from ares_jax.rewards.exact_rules import Quantity, quantity

_GUIDE = """
## Answer Instruction Please provide an answer to the question outlined above. Your response should adhere to the following \
JSON format, which includes two keys: 'solution' and 'short answer'. The 'solution' key can contain detailed steps needed \
to solve the question, and the 'short answer' key should provide a concise response. {instruction}

Example of expected JSON response format:

{{
    "solution": "[Detailed step-by-step explanation]",
    "short answer": "[Concise Answer]"
}}"""
_INSTRUCTIONS = {
    "multiple choice": "Provide the corresponing choice option in the 'short answer' key, such as 'A', 'B', 'C', or 'D'.",
    "float": "Format the answer as a three-digit floating-point number and provide it in the 'short answer' key.",
    "text": "Float numbers in the answer should be formatted as three-digit floating-point numbers.",
}
_TOLERANCE = 0.001
_VARIANT = re.compile(r"sample(?:_variant)?(\d+)")
_SMALL = re.compile(r"^\s*\(?[a-e]\)?[.:]?(?=\s|$)")  # an option in a small letter
_SHORT = re.compile(r'"short answer"\s*:\s*"?((?:[^"\\\n}]|\\.)*)"?')
_QUOTED = re.compile(r"'short answer'\s*:\s*'([^'\n]*)'")  # as Python writes it


def load(folder: Path) -> list[Sample]:
    return [_sample(row, path) for path, row in rows(folder, "data/sample*.parquet")]


def grade(sample: Sample, response: str) -> Verdict:
    text, kind = short_answer(response), sample.facts["answer_type"]
    if kind == "multiple choice":
        chosen = letter(response if text is None else _SMALL.sub(lambda match: match[0].upper(), text), 5)
        return Verdict(None if chosen is None else chosen == sample.answer.strip("() .").upper(), chosen)
    text = final_text(response) if text is None else text
    if text is None or not text.strip():
        return Verdict(None if text is None else False, text)
    if kind == "float":
        given, wanted = number(text), number(sample.answer)
        return Verdict(None if given is None or wanted is None else abs(given - wanted) <= _TOLERANCE, text)
    words, reference = text.strip().lower(), sample.answer.strip().lower()
    return Verdict(words in reference or bool(re.search(rf"(?<!\w){re.escape(reference)}(?!\w)", words)), text)


def number(text: str) -> float | None:
    """Returns the number that a short answer is, behind any "x =", also as a multiple of pi; None if it is none."""
    bare, pi, rest = re.split(r"=|\\approx", cleaned(text))[-1].strip().partition(r"\pi")
    found = quantity(cleaned(bare)) if bare else Quantity(Fraction(1), "", False, -1)
    return None if found is None or rest.strip() else found.real * (math.pi if pi else 1.0)


def short_answer(response: str) -> str | None:
    """Returns the JSON's "short answer", also of JSON that is damaged by LaTeX; None if there is none."""
    text = spoken(response)
    start, end = text.find("{"), text.rfind("}")
    if 0 <= start < end:
        try:
            found = json.loads(text[start : end + 1], strict=False)
            if isinstance(found, dict) and found.get("short answer") is not None:
                return str(found["short answer"])
        except ValueError:
            pass
    found = _SHORT.findall(text) or _QUOTED.findall(text)
    return found[-1].strip() if found else None


def _sample(row, path: Path) -> Sample:
    match = _VARIANT.search(path.name)
    seed, variant = str(value(row, "id")), match[1] if match else "1"
    kind = str(value(row, "answer_type"))
    prompt = f"## Question\n {value(row, 'question')}" + _GUIDE.format(
        instruction=_INSTRUCTIONS.get(kind, _INSTRUCTIONS["text"])
    )
    return Sample(
        f"{seed}/{variant}",
        (image_bytes(value(row, "decoded_image"), path.parent), prompt),
        str(value(row, "ground_truth", "answer")),
        unit=seed,
        groups={
            "subject": str(row.get("subject", "")),
            "level": str(row.get("knowledge_level", row.get("level", ""))),
            "variant": variant,
        },
        facts={"answer_type": kind},
    )


DYNAMATH = Benchmark(
    "dynamath", "DynaMath", "DynaMath/DynaMath_Sample", ("data/sample*.parquet",), load, grade,
    metrics=(
        Metric("worst", lambda graded: min(item.score for item in graded)),
        Metric("average"),
    ),
    judge_rule="Numbers are right within 0.001; an option by its letter; a text if it says what the reference says.",
)  # fmt: skip
