"""MMMU, validation: 900 college questions of 30 subjects, several pictures a question (Yue et al., CVPR 2024).

Layout: https://huggingface.co/datasets/MMMU/MMMU, `<Subject>/validation-*.parquet`; `options` is a list written as a
string, and "<image 1>" in question and options says where column `image_1` stands. Prompt: the authors'
mmmu/configs/llava1.5.yaml. Score: https://github.com/MMMU-Benchmark/MMMU, eval/eval_utils.py; upstream guesses at
random where a response names no option, here that is wrong. A boxed or announced answer counts before the rules for
free text, in which "A" and "I" before a word in small letters are no options.
"""

import ast
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ares_jax.evaluation.benchmark import Benchmark, Part, Sample, Verdict
from ares_jax.evaluation.final_answer import LETTERS, final_text, letter, spoken
from ares_jax.evaluation.published import image_bytes, rows, value
from ares_jax.rewards.grading import same_answer

_CHOOSE = "Answer with the option's letter from the given choices directly."
_OPEN = "Answer the question using a single word or phrase."
_PLACE = re.compile(r"<image (\d)>")
_NAMED = (  # an option's letter; not the article or the pronoun
    re.compile(r"\(([A-Z])\)"), re.compile(r"(?<= )([A-Z]) (?!(?<=[AI] )[a-z])"), re.compile(r"(?<= )([A-Z])\.")
)  # fmt: skip
_NUMBERS = re.compile(r"-?\d{1,3}(?:,\d{3})+|-?\d+(?:\.\d+)?[eE][+-]?\d+|-?\d*\.?\d+")
_KEYS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ", "=")


def load(folder: Path) -> list[Sample]:
    return [_sample(row, path.parent) for path, row in rows(folder, "*/validation-*.parquet")]


def grade(sample: Sample, response: str) -> Verdict:
    options = sample.facts["options"]
    if options:
        chosen = named_option(response, options)
        return Verdict(chosen == sample.answer, chosen)
    text = final_text(response)
    wanted = sample.facts["answers"]
    if text is not None and any(same_answer(text, answer) for answer in wanted):
        return Verdict(True, text)
    found = open_answers(text if text is not None else spoken(response))
    return Verdict(any(_matches(answer, item) for answer in wanted for item in found), text)


def named_option(response: str, options: Sequence[str]) -> str | None:
    """Returns the chosen letter: announced, else the last "(B)", " B ", "B." or the last option's text that is named."""
    if (chosen := letter(response, len(options), options)) is not None or "\\boxed" in spoken(response):
        return chosen
    text = f" {spoken(response).strip(',.!?;:' + chr(39))} "
    for pattern in _NAMED:
        if named := [m[1] for m in pattern.finditer(text) if m[1] in LETTERS[: len(options)]]:
            return named[-1]
    if len(text.split()) > 5:
        places = {LETTERS[i]: text.lower().rfind(option.lower()) for i, option in enumerate(options) if option}
        if places and max(places.values()) >= 0:
            return max(places, key=lambda name: places[name])
    return None


def open_answers(text: str) -> list[str | float]:
    """Returns the texts and numbers that a free answer may mean: behind words such as "is", or all of it."""
    tails = []
    for part in re.split(r"\.\s(?=[A-Z])|\n", text.strip().strip(".")):
        part = part.lower()
        found = [part.rpartition(key)[2].strip() for key in _KEYS if key in part]
        if found and (shortest := min(found, key=len)).strip(":,.!?;'"):
            tails.append(shortest)
    tails = tails or [text.strip().lower()]
    return [*tails, *(_number(n) for tail in tails for n in _NUMBERS.findall(tail))]


def _matches(answer: str, found: str | float) -> bool:
    number = _maybe_number(answer)
    if number is not None:
        other = _maybe_number(found) if isinstance(found, str) else found
        return other is not None and round(other, 2) == round(number, 2)
    if not isinstance(found, str):
        return False
    answer = answer.strip().lower()
    return answer in found if len(answer) > 1 else f" {answer}" in found or f"{answer} " in found or answer == found


def _maybe_number(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


def _number(text: str) -> float:
    return float(text.replace(",", ""))


def interleaved(text: str, row: Mapping, folder: Path) -> tuple[Part, ...]:
    """Returns the text with the pictures where "<image 1>" says; pictures that it does not name stand before it."""
    named = set(_PLACE.findall(text))
    first = [f"image_{i}" for i in range(1, 8) if str(i) not in named and row.get(f"image_{i}") is not None]
    parts: list[Part] = [] if named else [image_bytes(row[name], folder) for name in first]
    for place, piece in enumerate(_PLACE.split(text)):
        if place % 2 == 0:
            parts += [piece] if piece else []
        else:
            parts.append(image_bytes(value(row, f"image_{piece}"), folder))
    return tuple(parts)


def listed(options) -> list[str]:
    """Returns the options, which upstream stores as the text of a Python list."""
    return [str(option) for option in (ast.literal_eval(options) if isinstance(options, str) else options or [])]


def _sample(row: Mapping, folder: Path) -> Sample:
    options = listed(row.get("options"))
    many = row.get("question_type", "multiple-choice") == "multiple-choice"
    lines = "".join(f"({LETTERS[i]}) {option}\n" for i, option in enumerate(options)) if many else ""
    text = f"{value(row, 'question')}\n{lines}{chr(10) if many else ''}{_CHOOSE if many else _OPEN}"
    answer = str(value(row, "answer"))
    answers = listed(answer) if not many and answer.startswith("[") else [answer]
    groups = {
        "subject": folder.name,
        "level": str(row.get("topic_difficulty", "")),
        "question_type": str(row.get("question_type", "")),
    }
    return Sample(
        str(value(row, "id")), interleaved(text, row, folder), answer, groups=groups,
        facts={"options": options if many else [], "answers": answers},
    )  # fmt: skip


MMMU = Benchmark("mmmu", "MMMU, validation", "MMMU/MMMU", ("*/validation-*.parquet",), load, grade)
