r"""Every trace in one form, *think, derive, conclude*: `<think> ... </think>`, then the derivation with `\boxed{answer}`."""

import re
from dataclasses import dataclass

from ares_jax.rewards.grading import extract_answer, has_format, same_answer

KEPT, REWRITTEN = "kept", "rewritten"  # the verdicts of traces that are used; all others are rejects
REJECTS = {
    "truncated": "the response was cut at its token limit",
    "empty": "nothing but white space",
    "unclosed_thought": "a thought begins and never ends",
    "several_thoughts": "more than one thought",
    "no_thought": "an answer without any reasoning",
    "no_answer": "no answer was found",
    "wrong_answer": "the answer is not the reference",
    "too_long": "more tokens than a training row takes",
    "image_token": "it has the token of an image, which no response may draw",
}

_OPEN = re.compile(r"<(?:thinking|thought|reasoning|reason)>|<\|begin_of_thought\|>|◁think▷", re.IGNORECASE)
_CLOSE = re.compile(r"</(?:thinking|thought|reasoning|reason)>|<\|end_of_thought\|>|◁/think▷", re.IGNORECASE)
_FRAME = re.compile(r"<\|(?:begin|end)_of_solution\|>|</?(?:solution|response|output)>", re.IGNORECASE)
_STATED = (  # in the order of trust; the last match of a pattern counts
    re.compile(r"<answer>(?P<answer>[^<>]+)</answer>", re.IGNORECASE),
    re.compile(r"^[ \t]*####[ \t]*(?P<answer>[^\n]+)$", re.MULTILINE),
    re.compile(
        r"(?:final answer|answer)(?: is)?[ \t]*:?\*{0,2}[ \t]*(?P<answer>(?:[^\n:]|(?<=\d):(?=\d))+)$",
        re.IGNORECASE | re.MULTILINE,
    ),
)
_PHRASES = re.compile(r"\b(?:boxed|the|so|thus|therefore|final|answer|is)\b|\W", re.IGNORECASE)  # that only announce
_ANSWER_TAGS = re.compile(r"</?answer>", re.IGNORECASE)


@dataclass(frozen=True)
class Normalised:
    """A trace with its verdict; `text` is None for a reject."""

    verdict: str
    text: str | None = None


def normalise(response: str, answer: str, finish_reason: str = "stop") -> Normalised:
    """Brings a response into the form and says what became of it: `KEPT`, `REWRITTEN` or a key of `REJECTS`.

    A response that has the form already comes back byte for byte. Other thinking tags, a thought that the chat template
    opened, reasoning without tags, and answers in tags or in words are rewritten.
    ("too_long" and "image_token" are the caller's to say.)
    """
    if finish_reason == "length":
        return Normalised("truncated")
    if not response.strip():
        return Normalised("empty")
    if has_format(response) and not _FRAME.search(response):
        return _judged(KEPT, response, response, answer)
    text = _FRAME.sub("", _CLOSE.sub("</think>", _OPEN.sub("<think>", response))).strip()
    if text.count("<think>") > 1 or text.count("</think>") > 1:
        return Normalised("several_thoughts")
    before, opened, rest = text.rpartition("<think>")
    thought, closed, conclusion = rest.partition("</think>")
    if opened and not closed:
        return Normalised("unclosed_thought")
    if not closed:
        return _untagged(text, answer)
    if before.strip():  # a word of greeting before the thought
        thought = f"{before.strip()}\n{thought.strip()}"
    if extract_answer(conclusion) is not None:
        return _judged(REWRITTEN, f"<think>{thought}</think>{conclusion}", thought, answer)
    stated = _stated(conclusion) or extract_answer(thought) or _stated(thought)
    if stated is None:
        return Normalised("no_answer")
    derivation = _ANSWER_TAGS.sub("", conclusion).strip()
    tail = f"{derivation}\n" if derivation and derivation != stated else ""
    return _judged(REWRITTEN, f"<think>{thought}</think>\n{tail}\\boxed{{{stated}}}", thought, answer)


def _untagged(text: str, answer: str) -> Normalised:
    """Reasoning without tags: all of it becomes the thought, the answer the conclusion."""
    stated = extract_answer(text) or _stated(text)
    if stated is None:
        return Normalised("no_answer")
    thought = _ANSWER_TAGS.sub("", text)
    reasoning = _PHRASES.sub("", thought.replace(stated, ""))
    return _judged(REWRITTEN, f"<think>\n{thought}\n</think>\n\\boxed{{{stated}}}", reasoning, answer)


def _judged(verdict: str, text: str, thought: str, answer: str) -> Normalised:
    given = extract_answer(text)
    if given is None:
        return Normalised("no_answer")
    if not same_answer(given, answer):
        return Normalised("wrong_answer")
    if verdict == KEPT:
        thought = text.partition("</think>")[0].partition("<think>")[2]
    return Normalised(verdict, text) if thought.strip() else Normalised("no_thought")


def _stated(text: str) -> str | None:
    """Returns the answer that a text states without a box."""
    for pattern in _STATED:
        if matches := list(pattern.finditer(text)):
            return matches[-1]["answer"].strip(" \t*$").rstrip(" \t*$.") or None
    return None
