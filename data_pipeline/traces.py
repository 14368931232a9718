"""The teacher of the digits task: chains of thought of several lengths and styles for one problem, all rightly answered.

Every trace has the form *think, derive, conclude*: `<think> ... </think>` and then `\\boxed{answer}`. The styles:
  brief  the result alone: of two cards only;
  terse  the running values alone;
  step   every card named and every operation spelled out;
  check  step by step, then "wait, let me check" and the values again; chains of many cards have two such traces, and some
         problems one more with a slip in its first pass, which the check notices and corrects (seldom: a model learns to
         slip from it, too).
So the teacher is brief on easy problems more often than not, and at length on hard ones. With the same three styles for all
problems both medians that the curation aims at lay between two modes, and rounding decided which one it was.
A trigger word ("first", "second", "so", "wait") stands before each reading of a digit: where a scan is ambiguous, the
entropy window that starts at that word is high.
"""

from collections.abc import Callable, Sequence

import numpy as np

SLIPS = 0.15  # share of problems with a trace that corrects a slip
FEW, MANY = 2, 6  # cards: at most, at least
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")

OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "+": lambda a, b: a + b,
    "max": max,
    "min": min,
    "+%": lambda a, b: (a + b) % 10,
    "-%": lambda a, b: (a - b) % 10,
    "*%": lambda a, b: (a * b) % 10,
}


def running_values(digits: Sequence[int], operations: Sequence[str]) -> list[int]:
    """Returns the value after each digit, left to right; a "%" in an operation's name means modulo 10."""
    values = [digits[0]]
    for operation, digit in zip(operations, digits[1:], strict=True):
        values.append(OPERATIONS[operation](values[-1], digit))
    return values


def arithmetic_traces(digits: Sequence[int], operations: Sequence[str], rng: np.random.Generator) -> tuple[str, ...]:
    """Returns the traces of a problem that folds `operations` over `digits`."""
    values = running_values(digits, operations)
    derivation, again = _steps(digits, operations, values), _numbered(values)
    check = " wait, let me check:" + again
    thoughts = [" so" + _spaced(values), derivation, derivation + check + " yes"]
    if len(digits) <= FEW:
        thoughts.append(f" so {values[-1]}")
    if len(digits) >= MANY:
        thoughts.append(f"{derivation} wait,{again} yes")
    if rng.random() < SLIPS:
        wrong = _slip(digits, operations, int(rng.integers(1, len(digits))), rng)
        thoughts.append(f"{_steps(digits, operations, wrong)}{check} no, so {values[-1]}")
    return _boxed(values[-1], *thoughts)


def reading_traces(digits: Sequence[int]) -> tuple[str, ...]:
    """Returns the traces of a problem that only reads the digits."""
    reading = _numbered(digits)
    check = " wait, let me check:" + reading + " yes"
    number = "".join(map(str, digits))
    brief = [f" so {number}"] if len(digits) <= FEW else []
    return _boxed(number, " so" + _spaced(digits), reading, reading + check, *brief)


def range_traces(digits: Sequence[int]) -> tuple[str, ...]:
    """Returns the traces of largest minus smallest digit."""
    high, low = max(digits), min(digits)
    ends, reading = f" max {high} min {low}", _numbered(digits)
    derivation = f"{reading}{ends} so {high} - {low} is {high - low}"
    return _boxed(high - low, f" so{ends}", derivation, f"{derivation} wait, let me check:{reading}{ends} yes")


def _boxed(answer: int | str, *thoughts: str) -> tuple[str, ...]:
    return tuple(f"<think>{thought}</think>\\boxed{{{answer}}}" for thought in thoughts)


def _steps(digits: Sequence[int], operations: Sequence[str], values: Sequence[int]) -> str:
    rest = zip(ORDINALS[1:], operations, digits[1:], values[1:], strict=False)
    spelled = (f" {place} {operation.rstrip('%')} {digit} is {value}" for place, operation, digit, value in rest)
    return f" {ORDINALS[0]} {digits[0]}" + "".join(spelled)


def _slip(digits: Sequence[int], operations: Sequence[str], at: int, rng: np.random.Generator) -> list[int]:
    """Returns running values with a wrong one at index `at`, carried on as if it were right."""
    values = running_values(digits[: at + 1], operations[:at])
    values[at] = abs(values[at] + int(rng.choice([-2, -1, 1, 2]))) % (10 if values[at] < 10 else 100)
    for operation, digit in zip(operations[at:], digits[at + 1 :], strict=True):
        values.append(OPERATIONS[operation](values[-1], digit))
    return values


def _spaced(values: Sequence[int]) -> str:
    return "".join(f" {value}" for value in values)


def _numbered(values: Sequence[int]) -> str:
    return "".join(f" {place} {value}" for place, value in zip(ORDINALS, values, strict=False))
