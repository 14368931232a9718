"""OlympiadBench: olympiad problems of mathematics and physics, English and Chinese (He et al., ACL 2024).

Layout: https://huggingface.co/datasets/Hothan/OlympiadBench, `OlympiadBench/OE_*/OE_*.parquet`: the open-ended ones;
proofs (TP) cannot be scored by rules upstream either. Prompts: https://github.com/OpenBMB/OlympiadBench,
inference/code/evaluators/evaluator.py. Score: inference/judge.py and eval/auto_scoring_judge.py: the boxed answers
behind "So the final answer is", each paired with one of the reference's, numbers within the problem's `error`. Where
that sentence has no box, what it says counts, then boxes elsewhere (upstream all that there are, here those of the last
line that has any), then the formulas of the last line. Upstream a number is also right a hundred times too large or too
small; here only as a percentage.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ares_jax.evaluation.benchmark import Benchmark, Part, Sample, Verdict
from ares_jax.evaluation.final_answer import final_text, spoken
from ares_jax.evaluation.published import image_bytes, rows, value
from ares_jax.rewards.answer_text import cleaned
from ares_jax.rewards.exact_rules import quantity
from ares_jax.rewards.grading import extract_answer, same_answer

_FILES = ("OlympiadBench/OE_*/*.parquet",)
_MATHS_EN = ("OlympiadBench/OE_TO_maths_en_COMP/*.parquet",)
_ENGLISH = (
    "The following is an open-ended problem from an International {subject} competition. {kind}Please calculate the answer "
    "according to the given requirements and the information provided. Please use LaTeX format to represent the variables "
    "and formulas used in the solution process and results. Please end your solution with "
    '"So the final answer is {box}." and give '
    "the result explicitly{unit}."
)
_CHINESE = (
    "以下是中国{subject}竞赛中的解答题{kind}。请根据题目的要求和所提供的信息计算得出答案。解答过程和结果中使用的变量和公式请使用LaTeX格式表示。"
    "请在最后以“所以最终答案是{box}。”显式给出结果{unit}。"
)
_KINDS = {
    "Numerical": ("a numerical value", "数值"),
    "Expression": ("an expression", "表达式"),
    "Equation": ("an equation", "方程"),
    "Interval": ("an interval", "区间"),
}
_PLACE = re.compile(r"<(?:img_\d+|image_(\d+))>")
_PRECISION = 1e-8
_HAN = re.compile(r"\\(?:text|mathrm)\{[\u4e00-\u9fff/]+\}|[\u4e00-\u9fff/]*[\u4e00-\u9fff]")  # units: 9.8米/秒


def load(folder: Path) -> list[Sample]:
    return [_sample(row, path) for path, row in rows(folder, *_FILES)]


def load_maths_en(folder: Path) -> list[Sample]:
    return [_sample(row, path) for path, row in rows(folder, *_MATHS_EN)]


def grade(sample: Sample, response: str) -> Verdict:
    wanted = _split(sample.answer)
    found = _final(response, len(wanted))
    if found is None:
        return Verdict(False)
    given = _split(found)
    precisions = sample.facts["precisions"]
    precisions = list(precisions) + [precisions[-1]] * (len(wanted) - len(precisions))
    return Verdict(_paired(given, wanted, precisions), found)


def _final(response: str, count: int) -> str | None:
    """Returns the answers of the last "final answer" sentence, joined by commas; else of the last boxes, or formulas."""
    text = spoken(response)
    sentence = ([""] + re.findall(r"(?:So the final answer is|所以最终答案是)(.*)", text))[-1]
    if boxes := _boxes(sentence):
        return ",".join(boxes)
    if "\\boxed" not in sentence and re.search(r"\w", sentence):
        return _formulas(sentence) or sentence.strip(" .。:：")
    if "\\boxed" in text:
        boxes = _boxes([line for line in text.splitlines() if "\\boxed" in line][-1])
        return ",".join(boxes) if len(boxes) == count else extract_answer(response)
    return _formulas(text.rpartition("\n")[2]) or final_text(response)


def _boxes(text: str) -> list[str]:
    """Returns the contents of all boxes; none if one is never closed."""
    found = [extract_answer("\\boxed" + part) for part in text.split("\\boxed")[1:]]
    return [] if None in found else [box for box in found if box]


def _formulas(text: str) -> str:
    return ",".join(re.findall(r"\$([^$]+)\$", text))


def _split(answer: str) -> list[str]:
    """Returns the answers between commas that stand in no bracket; x \\pm y is two."""
    text = re.sub(r"\\left|\\right|\$|(?<!\\)\\[,; ]", "", answer.replace("，", ",").replace("\\{", "").replace("\\}", ""))
    text = text.partition("\\in ")[2] or text  # x \in [0, 1]
    text = re.sub(r"\\text\{\s*(?:and|or|或|和)\s*\}", ",", text)
    parts, depth, start = [], 0, 0
    for place, character in enumerate(text):
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(character, 0)
        if character == "," and depth == 0:
            parts.append(text[start:place])
            start = place + 1
    parts.append(text[start:])
    thousands = re.fullmatch(r"\s*-?\d{1,3}(,\d{3})+\s*", text)  # 1,000 is one number
    parts = [text] if thousands else parts
    return [form for part in parts if part.strip() for form in _signs(part.strip())]


def _signs(part: str) -> list[str]:
    return [part.replace("\\pm", "+"), part.replace("\\pm", "-")] if "\\pm" in part else [part]


def _paired(given: Sequence[str], wanted: Sequence[str], precisions: Sequence[float]) -> bool:
    left = list(given)
    if len(left) != len(wanted):
        return False
    for answer, precision in zip(wanted, precisions, strict=False):
        match = next((item for item in left if _equal(item, answer, precision)), None)
        if match is None:
            return False
        left.remove(match)
    return True


def _equal(given: str, wanted: str, precision: float) -> bool:
    if same_answer(given, wanted):
        return True
    given, wanted = _HAN.sub("", given), _HAN.sub("", wanted)
    if same_answer(given, wanted):
        return True
    a, b = quantity(cleaned(given)), quantity(cleaned(wanted))
    if a is None or b is None:  # one is written as sqrt(5), or is no number
        return same_answer(given, wanted, precision * 1.01)
    return abs(a.real - b.real) <= precision * 1.01


def _sample(row: Mapping, path: Path) -> Sample:
    config = path.parent.name  # OE_MM_maths_en_COMP
    chinese, maths = "_zh_" in config, "_maths_" in config
    question = str(value(row, "question"))
    if not maths and row.get("context"):
        question = f"{row['context']}\n{question}"
    answers = value(row, "final_answer")
    answers = [answers] if isinstance(answers, str) else list(answers)
    errors = [float(e) if e.strip() else _PRECISION for e in str(row.get("error") or "").split(",")]
    return Sample(
        f"{config}/{value(row, 'id')}",
        _parts(f"{prompt(row, chinese=chinese, maths=maths)}\n{question}", row, path.parent),
        ",".join(map(str, answers)),
        groups={
            "subject": "maths" if maths else "physics",
            "language": "zh" if chinese else "en",
            "modality": "text" if "_TO_" in config else "image",
            "subfield": str(row.get("subfield", "")),
            "level": str(row.get("difficulty", "")),
        },
        facts={"precisions": errors},
    )


def prompt(row: Mapping, *, chinese: bool, maths: bool) -> str:
    """Returns the official instruction for a problem: it names the answer's kind, and asks for a unit outside the box."""
    many, kind = bool(row.get("is_multiple_answer")), str(row.get("answer_type") or "")
    kinds = [] if "Tuple" in kind or "Need_human" in kind else kind.split(",") if many else [kind]
    names = [name for part in kinds if (name := _kind(part, chinese))]
    names = names[:1] if len(set(names)) == 1 else names
    unit = bool(row.get("unit"))
    if chinese:
        said = (
            f"，题目有多个答案，答案类型{'均' if len(names) == 1 else '分别'}为{'、'.join(names)}"
            if many
            else f"，答案类型为{'、'.join(names)}"
        )
        box = ("\\boxed{用英文逗号连接的多个答案}" if many else "\\boxed{答案}") + ("(单位)" if unit else "")
        note = "，注意答案的单位不要放在\\boxed{}中" if unit else ""
        return _CHINESE.format(subject="数学" if maths else "物理", kind=said if names else "", box=box, unit=note)
    if many:
        each = (
            f"each of them should be {names[0]}"
            if len(names) == 1
            else f"with the answers in order being {', '.join(names)}"
        )
        said = f"The problem has multiple answers, {each}. "
    else:
        said = f"The answer of The problem should be {', '.join(names)}. "
    box = ("\\boxed{multiple answers connected with commas}" if many else "\\boxed{answer}") + ("(unit)" if unit else "")
    note = ", note that the unit of the answer should not be included in \\boxed{}" if unit else ""
    return _ENGLISH.format(subject="Math" if maths else "Physics", kind=said if names else "", box=box, unit=note)


def _kind(name: str, chinese: bool) -> str:
    return next((words[chinese] for kind, words in _KINDS.items() if kind in name), "")


def _parts(text: str, row: Mapping, folder: Path) -> tuple[Part, ...]:
    """Returns the text with its pictures where <image_1> or <img_3362> stand, else before it."""
    images = [image_bytes(row[f"image_{i}"], folder) for i in range(1, 10) if row.get(f"image_{i}") is not None]
    if not images:
        return (text,)
    if len(_PLACE.findall(text)) != len(images):
        return (*images, text)
    first, *pieces = re.split(r"<(?:img|image)_\d+>", text)
    mixed: list[Part] = [first]
    for image, piece in zip(images, pieces, strict=True):
        mixed += [image, piece]
    return tuple(part for part in mixed if part)


OLYMPIADBENCH = Benchmark("olympiadbench", "OlympiadBench, open-ended", "Hothan/OlympiadBench", _FILES, load, grade)
MATHS_EN = Benchmark(
    "olympiadbench_maths_en", "OlympiadBench, English text-only mathematics", "Hothan/OlympiadBench", _MATHS_EN,
    load_maths_en, grade,
)  # fmt: skip
