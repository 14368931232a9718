"""Is a response right? The last boxed answer against the reference: exact or numeric first, then math-verify."""

import logging
import re

_NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?")


def extract_answer(response: str) -> str | None:
    """Returns the content of the last `\\boxed{...}` after the thinking, braces balanced; None if there is none."""
    text = response.rsplit("</think>", 1)[-1]
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, begin = 0, start + len("\\boxed{")
    for position in range(begin - 1, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[begin:position].strip()
    return None


def has_format(response: str) -> bool:
    """Says whether the response thinks, closes its thought, then boxes an answer."""
    return response.count("<think>") == 1 and response.count("</think>") == 1 and extract_answer(response) is not None


def is_correct(response: str, answer: str) -> bool:
    """Says whether the boxed answer equals `answer` as text, as a number, or by math-verify's rules."""
    given, wanted = extract_answer(response), answer.strip()
    if given is None:
        return False
    if given == wanted:
        return True
    if _NUMBER.fullmatch(given) and _NUMBER.fullmatch(wanted):
        return float(given) == float(wanted)
    return _verified(given, wanted)


def _verified(given: str, wanted: str) -> bool:
    from math_verify import parse, verify  # sympy takes a second to import, and most answers need none of it

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns of the missing timeouts at every call
    # Timeouts work through signals, which only the main thread may use: without them it runs in any thread.
    gold, target = (parse(f"${text}$", parsing_timeout=None) for text in (wanted, given))
    return bool(verify(gold, target, timeout_seconds=None))
