"""The teacher of the digits task: chains of thought of several lengths and styles for one problem, all rightly answered.

Every trace has the form *think, derive, conclude*: `<think> ... </think>` and then `\\boxed{answer}`. The styles:
  terse  the running values alone;
  step   every operation spelled out;
  check  step by step, then "wait, let me check" and the running values again; in some the first pass holds a slip, which
         the check notices and corrects.
A trigger word ("first", "then", "now", "next", "so", "wait") stands before each reading of a digit: where a scan is
ambiguous, the entropy window that starts at that word is high.
"""

from collections.abc import Callable, Sequence

import numpy as np

CONNECTIVES = ("then", "now", "next")

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
    word = CONNECTIVES[rng.integers(len(CONNECTIVES))]
    wrong_from = int(rng.integers(1, len(digits)))
    wrong = _slip(digits, operations, wrong_from, rng)
    derivation = _steps(digits, operations, values, word)
    check = " wait, let me check:" + _spaced(values)
    fixed = f"{_steps(digits, operations, wrong, word)} wait, let me check:{_spaced(values)} no, so {values[-1]}"
    return tuple(
        f"<think>{thought}</think>\\boxed{{{values[-1]}}}"
        for thought in (" so" + _spaced(values), derivation, derivation + check + " yes", fixed)
    )


def reading_traces(digits: Sequence[int], rng: np.random.Generator) -> tuple[str, ...]:
    """Returns the traces of a problem that only reads the digits."""
    word = CONNECTIVES[rng.integers(len(CONNECTIVES))]
    derivation = f" first {digits[0]}" + "".join(f" {word} {digit}" for digit in digits[1:])
    check = " wait, let me check:" + _spaced(digits) + " yes"
    answer = "".join(map(str, digits))
    return tuple(
        f"<think>{thought}</think>\\boxed{{{answer}}}"
        for thought in (" so" + _spaced(digits), derivation, derivation + check)
    )


def range_traces(digits: Sequence[int], rng: np.random.Generator) -> tuple[str, ...]:
    """Returns the traces of largest minus smallest digit."""
    word = CONNECTIVES[rng.integers(len(CONNECTIVES))]
    high, low = max(digits), min(digits)
    end = f" max {high} min {low} so {high} - {low} is {high - low}"
    reading = f" first {digits[0]}" + "".join(f" {word} {digit}" for digit in digits[1:])
    check = f" wait, let me check:{_spaced(digits)} max {high} min {low} yes"
    return tuple(
        f"<think>{thought}</think>\\boxed{{{high - low}}}"
        for thought in (f" so max {high} min {low}", reading + end, reading + end + check)
    )


def _steps(digits: Sequence[int], operations: Sequence[str], values: Sequence[int], word: str) -> str:
    first = f" first {digits[0]}"
    rest = zip(operations, digits[1:], values[1:], strict=True)
    return first + "".join(f" {word} {operation.rstrip('%')} {digit} is {value}" for operation, digit, value in rest)


def _slip(digits: Sequence[int], operations: Sequence[str], at: int, rng: np.random.Generator) -> list[int]:
    """Returns running values with a wrong one at index `at`, carried on as if it were right."""
    values = running_values(digits[: at + 1], operations[:at])
    values[at] = abs(values[at] + int(rng.choice([-2, -1, 1, 2]))) % (10 if values[at] < 10 else 100)
    for operation, digit in zip(operations[at:], digits[at + 1 :], strict=True):
        values.append(OPERATIONS[operation](values[-1], digit))
    return values


def _spaced(values: Sequence[int]) -> str:
    return "".join(f" {value}" for value in values)
