"""CharXiv, validation, reasoning questions: 1000 questions about charts of arXiv papers (Wang et al., NeurIPS 2024).

Layout: https://huggingface.co/datasets/princeton-nlp/CharXiv, `val.parquet`. Prompt:
https://github.com/princeton-nlp/CharXiv (src/reasoning_utils.py and constants.py), by the answer's type (column
`reasoning_a_type`). Score: upstream GPT-4o grades every response; here an answer that equals the reference is right, a
number that does not is wrong, and the judge decides the rest. The 4000 descriptive questions (columns `descriptive_*`)
are another score upstream and are not asked: ARES reports one number, and what we could read of it does not say which.
"""

from pathlib import Path

from ares_jax.evaluation.benchmark import Benchmark, Sample, Verdict
from ares_jax.evaluation.final_answer import final_text
from ares_jax.evaluation.published import image_bytes, rows, value
from ares_jax.rewards.answer_text import cleaned
from ares_jax.rewards.exact_rules import quantity
from ares_jax.rewards.grading import same_answer

_TEXT_IN_CHART, _TEXT, _NUMBER_IN_CHART, _NUMBER = 1, 2, 3, 4
_TYPES = {1: "text in chart", 2: "text in general", 3: "number in chart", 4: "number in general"}
_INSTRUCTIONS = {
    _TEXT_IN_CHART: """{}
    * Your final answer must be grounded to some text that is explicitly written and relevant to the question in the chart.
    * If you need to answer multiple terms, separate them with commas.
    * Unless specified in the question (such as answering with a letter), you are required to answer the full names of \
subplots and/or labels by default.
    """,
    _TEXT: """{}
    * If there are options in the question, your final answer must conform to one of the options.
    * If there are additional instructions in the question, follow them accordingly.
    * If there are neither options nor additional instructions, you are allowed to respond with a short phrase only.
    """,
    _NUMBER_IN_CHART: """{}
    * Your final answer must be grounded to a number that is exlicitly written and relevant to the question in the chart, \
even if it's an approximate value.
    * You are allowed to extract numbers within some text when needed.
    """,
    _NUMBER: """{}
    {}
    """,
}
_RULE = (
    "Texts are right if they name the same term (another notation or, for several terms, another order may be used; any "
    "other term is wrong); a phrase if it means the same, an option only if it is that option; numbers only if their "
    "values are equal."
)


def load(folder: Path) -> list[Sample]:
    return [_sample(row, number, folder) for number, (_, row) in enumerate(rows(folder, "val.parquet"))]


def grade(sample: Sample, response: str) -> Verdict:
    text = final_text(response)
    if text is None:
        return Verdict(None)
    if same_answer(text, sample.answer):
        return Verdict(True, text)
    numbers = [quantity(cleaned(item)) for item in (text, sample.answer)]
    if sample.facts["type"] in (_NUMBER_IN_CHART, _NUMBER) and all(number is not None for number in numbers):
        return Verdict(False, text)
    return Verdict(None, text)


def number_instruction(answer: str) -> str:
    """Returns the line that says how many decimals a number must have: as many as the reference."""
    _, point, decimals = answer.partition(".")
    if not point:
        return "* Your final answer must be an exact integer."
    return f"* Your final answer must be a number with {len(decimals)} decimal places."


def _sample(row, number: int, folder: Path) -> Sample:
    question, answer, kind = (str(value(row, name)) for name in ("reasoning_q", "reasoning_a", "reasoning_a_type"))
    filled = [question, number_instruction(answer)] if int(kind) == _NUMBER else [question]
    return Sample(
        str(row.get("figure_path") or number),
        (image_bytes(value(row, "image"), folder), _INSTRUCTIONS[int(kind)].format(*filled)),
        answer,
        groups={"category": str(row.get("category", "")), "answer_type": _TYPES[int(kind)]},
        facts={"type": int(kind)},
    )


CHARXIV = Benchmark(
    "charxiv", "CharXiv, reasoning", "princeton-nlp/CharXiv", ("val.parquet",), load, grade, judge_rule=_RULE
)
