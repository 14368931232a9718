"""The final answer in a response: what stands in the box, behind "Answer:", or the option that was chosen."""

import re
from collections.abc import Sequence

from ares_jax.rewards.answer_text import cleaned
from ares_jax.rewards.exact_rules import quantity
from ares_jax.rewards.grading import extract_answer, same_answer

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_WRAP = r"(?:\\(?:text|textbf|mathrm|mathbf|boxed))?\{?\(?([A-Z])\)?\}?"
_OPTION = (  # an option's letter, perhaps in marks; not "A or B", and not the article
    r"[*_$\s]*+(?:\\\()?[(\[（]?[*_]*+" + _WRAP + r"[)\]）*_$]*+"
    r"(?![A-Za-z'’])(?!(?<=[AI])\s+(?!(?:because|since|as|is|which|with|where|so|based|due)\b)[a-z])"
    r"(?!\s*(?:,|/|、|\bor\b|\band\b|或|和|&)\s*\(?[A-Z](?![A-Za-z]))"
)
_ANSWERED = re.compile(
    r"(?:(?i:answer(?:\s+(?:is|would\s+be|should\s+be|must\s+be))?)|答案(?:应为|应该是|是|为|选)?|故选|应选|选(?!项)择?)"
    r"[*_\s]*+[:：=]?[*_$\s]*+(?:(?i:(?:option|choice)\s+)|选?项)?" + _OPTION
)
_PICKED = re.compile(r"(?:(?i:\b(?:option|choice))|选项)[*_\s]*+[:：]?\s*+(?:(?i:is\s+)|[是为])?" + _OPTION)
_ALONE = re.compile(r"[*_$\s(\[（#]*+(?:\\\(\s*+)?" + _WRAP + r"(?:\s*+\\\))?[*_$\s)\]）.:。]*+")
_LEADING = re.compile(r"[*_$]*+\(?([A-Z])[).:][*_]*+\s+\S")
_DISPLAY = r"(?:(?:\\\[|\$\$)[ \t]*+\n\s*+)?"  # of a formula on lines of its own
_BEHIND = re.compile(
    rf"(?:final answer|answer)(?:\s+is)?[*_]*+\s*+[:：]\s*+{_DISPLAY}(.+)|(?:final answer|answer) is\s+(.+)"
    rf"|^[#*_ ]*+(?:final )?answer[*_ ]*+\n\s*+{_DISPLAY}(.+)|答案(?:应为|应该是|是|为)?\s*+[:：]?\s*+(.+)",
    re.IGNORECASE | re.MULTILINE,
)
_GOES_ON = re.compile(r"[.,;]\s+(?=[A-Za-z]{2})(?!and\b|or\b)")


def spoken(response: str) -> str:
    """Returns what stands after the thinking, in the last <answer> if there is any; nothing if the thinking is not over."""
    text = response.rpartition("</think>")[2]
    if "<think>" in text:
        return ""
    before, closed, _ = text.rpartition("</answer>")
    _, opened, tagged = before.rpartition("<answer>")
    return (tagged if closed and opened else text).strip()


def final_text(response: str) -> str | None:
    """Returns the box's content, else the rest of the last line with "answer:" or "answer is", else a one-line response."""
    text = spoken(response)
    if (boxed := extract_answer(response)) is not None:
        return boxed
    if "\\boxed" in text:  # a box that is never closed
        return None
    if found := _BEHIND.findall(text):
        return _alone("".join(found[-1]).strip().rstrip(".。").strip("*_ ")) or None
    return text if text and "\n" not in text and len(text.split()) <= 8 else None


def _alone(text: str) -> str:
    """Returns the number without what is said after it, such as "18" of "18. She sells them."; other texts whole."""
    head = _GOES_ON.split(text, maxsplit=1)[0]
    return head if quantity(cleaned(head)) is not None else text


def letter(response: str, count: int, options: Sequence[str] = ()) -> str | None:
    """Returns the chosen letter of the first `count`, None if none or more than one was.

    In a box: a letter, "(B) text", or the text of exactly one of `options`. Without a box: the last "answer is B" or
    "故选B"; the only line that is a letter; the only "option B"; a start with "B. " or "(B) " where no other is named.
    """
    allowed = LETTERS[:count]
    boxed = extract_answer(response)
    if boxed is not None:
        return _in_box(boxed, allowed, options)
    text = spoken(response)
    if "\\boxed" in text:
        return None
    if (match := _ALONE.fullmatch(text)) and match[1] in allowed:
        return match[1]
    if said := [m[1] for m in _ANSWERED.finditer(text) if m[1] in allowed]:
        return said[-1]
    lines = {m[1] for line in text.splitlines() if (m := _ALONE.fullmatch(line))} & set(allowed)
    if len(lines) == 1:
        return lines.pop()
    if len(picked := {m[1] for m in _PICKED.finditer(text) if m[1] in allowed}) == 1:
        return picked.pop()
    if (match := _LEADING.match(text)) and match[1] in allowed and len(_named(text, allowed)) == 1:
        return match[1]
    return None


def _in_box(boxed: str, allowed: str, options: Sequence[str]) -> str | None:
    bare = untexted(boxed)
    if (match := _ALONE.fullmatch(bare)) and match[1] in allowed:
        return match[1]
    small = bare.strip("(). ")
    if len(small) == 1 and small.upper() in allowed and bare not in options:
        return small.upper()
    if same := [LETTERS[i] for i, option in enumerate(options) if option and same_answer(bare, option)]:
        return same[0] if len(same) == 1 else None
    if match := re.match(r"(?:option|choice|answer)?\s*\(?([A-Z])[).:]\s*\S", bare, re.IGNORECASE):
        return match[1] if match[1] in allowed and len(_named(bare, allowed)) == 1 else None
    if (match := re.fullmatch(r"(?:option|choice|answer)\s+\(?([A-Z])\)?\.?", bare, re.IGNORECASE)) and match[1] in allowed:
        return match[1]
    return None


def _named(text: str, allowed: str) -> set[str]:
    """Returns the letters that the text names as options: (B), B), B. or B: not inside a word."""
    return {m for m in re.findall(r"(?<![A-Za-z0-9])\(?([A-Z])[).:](?![A-Za-z0-9])", text) if m in allowed}


def untexted(text: str) -> str:
    """Returns the text without \\text{...} and its like around words."""
    return re.sub(r"\\(?:text|mathrm|mathbf|textbf)\s*\{([^{}]*)\}", r"\1", text).strip()


def letters(response: str, count: int) -> frozenset[str] | None:
    """Returns the letters of an answer that may hold several, such as "A, C", "AC" or a box each; None if it is else."""
    last = next((line for line in reversed(spoken(response).splitlines()) if "\\boxed" in line), "")
    for text in (last[last.find("\\boxed") :] if last.count("\\boxed") > 1 else "", final_text(response) or ""):
        bare = re.sub(
            r"\\boxed|\b(?:and|options?|choices?)\b|[\s,;、，&和()\[\]{}.$*_\\]", "", untexted(text), flags=re.IGNORECASE
        )
        found = frozenset(bare)
        if bare and found <= set(LETTERS[:count]) and len(found) == len(bare):
            return found
    single = letter(response, count)
    return frozenset(single) if single else None
