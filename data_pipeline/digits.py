"""The digits task: verifiable arithmetic over real handwriting (scikit-learn's `load_digits`, 1797 scans of 8 x 8).

A digit stands on a card of 28 x 28 pixels, exactly one merged vision token; dots along the card's lower edge number it.
Some scans are faint or partly covered, so that
reading them is really uncertain. The scans are divided into train, validation and test before any problem is made.
"""

from functools import cache

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image

from data_pipeline.errors import DataError
from data_pipeline.problems import Problem
from data_pipeline.traces import ORDINALS, arithmetic_traces, range_traces, reading_traces, running_values

LEVELS = ("easy", "medium", "hard")
SPLITS = {"train": 0.67, "validation": 0.11, "test": 0.22}  # shares of the scans of each digit
SIDE = 28  # pixels of a digit
BOARD = 116  # grey of the board; chalk is white. The image processor's mean: an empty patch is near 0
FAINT = {"easy": 0.05, "medium": 0.08, "hard": 0.08}  # share of scans at a quarter of the contrast, with noise
COVERED = {"easy": 0.05, "medium": 0.08, "hard": 0.08}  # share of scans with a bar over a third of them
SYMBOLS = ("+%", "-%", "*%")


class DigitsSource:
    """Random access to `size` problems of a split; problem i is a pure function of (seed, split, i), its level of i."""

    def __init__(self, split: str, size: int, seed: int):
        if split not in SPLITS:
            raise DataError(f"digits: split {split!r} is not one of {', '.join(SPLITS)}")
        self._split, self._size, self._seed = split, size, seed

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Problem:
        if not 0 <= index < self._size:
            raise IndexError(f"problem {index} of {self._size}")
        rng = np.random.default_rng([self._seed, list(SPLITS).index(self._split), index])
        level = LEVELS[index % len(LEVELS)]
        scans, labels = scans_of(self._split)
        kind, count = _kind(level, rng)
        picked = rng.integers(len(labels), size=count)
        digits = labels[picked].tolist()
        if kind == "read":
            question, answer, responses = "Read the digits.", "".join(map(str, digits)), reading_traces(digits)
        elif kind == "range":
            question = "What is the largest digit minus the smallest?"
            answer, responses = str(max(digits) - min(digits)), range_traces(digits)
        else:
            operations = [str(rng.choice(SYMBOLS)) for _ in digits[1:]] if kind == "chain" else [kind] * (count - 1)
            question = {
                "+": "Add the digits.",
                "max": "What is the largest digit?",
                "min": "What is the smallest digit?",
            }.get(kind, "Modulo 10: " + _spelled(operations))
            answer = str(running_values(digits, operations)[-1])
            responses = arithmetic_traces(digits, operations, rng)
        cards = [_card(_spoil(scans[i], level, rng), number) for number, i in enumerate(picked, start=1)]
        image = _draw(cards, rng)
        name = f"digits-{self._split}-{self._seed}-{index}"
        return Problem(name, "digits", level, question, (image,), answer, responses)


def captioned_cards(split: str, seed: int, index: int) -> tuple[UInt8[np.ndarray, "H W 3"], list[tuple[str, str]]]:
    """Returns an image of cards and, for each card, its caption: the number on it and its digit, as words."""
    rng = np.random.default_rng([seed, list(SPLITS).index(split), index, 1])
    scans, labels = scans_of(split)
    picked = rng.integers(len(labels), size=int(rng.integers(2, 9)))
    cards = [_card(_spoil(scans[i], "easy", rng), number) for number, i in enumerate(picked, start=1)]
    captions = [(ORDINALS[place], str(labels[i])) for place, i in enumerate(picked)]
    return _draw(cards, rng), captions


def corpus() -> list[str]:
    """Returns questions and traces with all the task's words: the text the tokenizer is trained on."""
    source = DigitsSource("train", 1500, seed=0)
    problems = [source[i] for i in range(len(source))]
    return [text for p in problems for text in (p.question, *p.responses)]


@cache
def scans_of(split: str) -> tuple[Float[np.ndarray, "S 8 8"], Int[np.ndarray, "S"]]:
    """Returns the scans (0 to 1, ink is 1) and labels of a split. The three splits are disjoint and fixed."""
    from sklearn.datasets import load_digits

    data = load_digits()
    rng = np.random.default_rng(0)
    chosen = []
    for digit in range(10):
        mine = rng.permutation(np.flatnonzero(data.target == digit))
        edges = np.round(np.cumsum([0.0, *SPLITS.values()]) * len(mine)).astype(int)
        at = list(SPLITS).index(split)
        chosen.append(mine[edges[at] : edges[at + 1]])
    indices = np.sort(np.concatenate(chosen))
    return data.images[indices] / 16.0, data.target[indices].astype(np.int64)


def _spelled(operations: list[str]) -> str:
    named = zip(ORDINALS[1:], operations, strict=False)
    return ORDINALS[0] + "".join(f" {place} {operation[0]}" for place, operation in named)


def _kind(level: str, rng: np.random.Generator) -> tuple[str, int]:
    if level == "easy":
        return str(rng.choice(["read", "+"])), 2
    if level == "medium":
        return str(rng.choice(["+", "max", "min", "range"])), 4
    return "chain", int(rng.integers(6, 9))


def _spoil(scan: Float[np.ndarray, "8 8"], level: str, rng: np.random.Generator) -> UInt8[np.ndarray, "28 28"]:
    ink = np.asarray(Image.fromarray((scan * 255).astype(np.uint8)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)) / 255
    chance = rng.random()
    if chance < FAINT[level]:
        ink = 0.25 * ink + rng.normal(0, 0.06, ink.shape)
    elif chance < FAINT[level] + COVERED[level]:
        start = int(rng.integers(0, SIDE - SIDE // 3))
        bar = (slice(start, start + SIDE // 3), slice(None))
        ink = ink.copy()
        ink[bar if rng.random() < 0.5 else bar[::-1]] = 0.5
    return (BOARD + (255 - BOARD) * np.clip(ink, -0.5, 1)).astype(np.uint8)


def _card(digit: UInt8[np.ndarray, "28 28"], number: int) -> UInt8[np.ndarray, "28 28"]:
    card = digit.copy()
    card[-3:] = BOARD
    for dot in range(number):
        card[-2:, 3 * dot + 2 : 3 * dot + 4] = 255
    return card


def _draw(digits: list[UInt8[np.ndarray, "28 28"]], rng: np.random.Generator) -> UInt8[np.ndarray, "H W 3"]:
    """A strip; an even number above four stands in two rows half of the time."""
    rows = 2 if len(digits) > 4 and len(digits) % 2 == 0 and rng.random() < 0.5 else 1
    width = len(digits) // rows
    image = np.concatenate([np.concatenate(digits[r * width : (r + 1) * width], axis=1) for r in range(rows)], axis=0)
    return np.repeat(image[:, :, None], 3, axis=2)
