"""Is a response right? The last boxed answer against the reference: exact rules first, then math-verify."""

import re

from ares_jax.rewards.answer_text import cleaned
from ares_jax.rewards.exact_rules import exact_verdict
from ares_jax.rewards.verifier import same_mathematics

_LONGEST = 10_000  # characters of an answer that is looked at
_BOX = re.compile(r"\\boxed\s*\{")
_BRACE = re.compile(r"\\[{}]|[{}]")


def extract_answer(response: str) -> str | None:
    """Returns the content of the last outermost `\\boxed{...}` after the thinking, braces balanced.

    None if there is none, if the last one is never closed, or if the thinking is not over. Linear in the length.
    """
    text = response.rpartition("</think>")[2]
    if "<think>" in text:
        return None
    answer, position = None, 0
    while (box := _BOX.search(text, position)) is not None:
        if (end := _closing(text, box.end())) is None:
            return None
        answer, position = text[box.end() : end].strip(), end
    return answer


def has_format(response: str) -> bool:
    """Says whether the response is one thought, `<think> ... </think>`, and then an answer in a box.

    The original asks for <think>.*</think>.*\\boxed\\{.*\\}.*; this also wants one thought only and the box closed.
    """
    one = response.count("<think>") == 1 and response.count("</think>") == 1
    return one and response.lstrip().startswith("<think>") and extract_answer(response) is not None


def is_correct(response: str, answer: str) -> bool:
    """Says whether the boxed answer equals `answer`: as text, choice or quantity, or else by math-verify's rules.

    Never hangs and never raises for any text. Safe in threads.
    """
    given = extract_answer(response)
    return given is not None and same_answer(given, answer)


def same_answer(given: str, wanted: str, tolerance: float = 0.0) -> bool:
    """Says whether two bare answers are equal. An empty one equals nothing.

    Numbers that only algebra finds, such as sqrt(5), may be `tolerance` apart.
    """
    if len(given) > _LONGEST:
        return False
    given, wanted = cleaned(given), cleaned(wanted)
    if not given or not wanted:
        return False
    verdict = exact_verdict(given, wanted)
    return same_mathematics(_latex(given), _latex(wanted), tolerance) if verdict is None else verdict


def _latex(text: str) -> str:
    return re.sub(r"(?<!\\)%", r"\\%", text.replace(r"\$", "").replace("$", ""))


def _closing(text: str, start: int) -> int | None:
    """Returns the index of the brace that closes the one before `start`."""
    depth = 1
    for match in _BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match[0], 0)  # an escaped brace is a set's
        if depth == 0:
            return match.start()
    return None
