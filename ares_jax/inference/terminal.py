"""Answers in a terminal: plain, or with each token on a colour for its entropy and with high-entropy windows underlined."""

import math
from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import Bool

from ares_jax.inference.asker import Answer, Windows, find_windows
from ares_jax.inference.texts import TokenTexts

# As uncertain as between 1.5, 2, 4 and 8 equally likely tokens; backgrounds of the 256-colour palette, text in black.
_COLOURS = ((math.log(1.5), 229), (math.log(2), 222), (math.log(4), 215), (math.log(8), 203))
_MOST_LISTED = 20


class Printer:
    """Writes one answer as it is drawn. With `colour`, windows above a known `tau_high` are marked on the way."""

    def __init__(
        self,
        write: Callable[[str], object],
        trigger: Bool[np.ndarray, "V"],
        *,
        colour: bool,
        tau_high: float,
        window: int,
    ):
        """`tau_high`: nats; NaN: windows cannot be marked before the answer is complete."""
        self._write, self._trigger, self._colour, self._tau, self._window = write, trigger, colour, tau_high, window
        self._shown = 0

    def show(self, leaf: Answer, texts: TokenTexts) -> None:
        """Writes what is new and certain: a token is in no window only once all windows over it are complete."""
        marks = self._colour and not math.isnan(self._tau)
        ready = len(leaf.token_ids)
        if marks and not leaf.finish_reason:
            ready = max(self._shown, ready - self._window + 1)
        new = slice(self._shown, ready)
        if self._colour:
            inside = starts = np.zeros(len(leaf.token_ids), bool)
            if marks:
                windows = find_windows(leaf, self._trigger, tau=self._tau, window=self._window)
                inside, starts = windows.inside(self._window), windows.validated
            tokens = zip(texts.texts[new], leaf.entropies[new], inside[new], starts[new], strict=True)
            self._write("".join(painted(text, float(h), underline=bool(u), bold=bool(b)) for text, h, u, b in tokens))
        else:
            self._write("".join(texts.texts[new]))
        self._shown = ready


def painted(text: str, entropy: float, *, underline: bool, bold: bool) -> str:
    """Returns a token with its colours and marks; each line ends without them."""
    colour = next((number for least, number in reversed(_COLOURS) if entropy >= least), None)
    codes = ["1"] * bold + ["4"] * underline + ([f"38;5;16;48;5;{colour}"] if colour else [])
    if not codes:
        return text
    return "\n".join(f"\x1b[{';'.join(codes)}m{line}\x1b[0m" if line else "" for line in text.split("\n"))


def legend() -> str:
    """Returns what the colours mean."""
    samples = " ".join(painted(f" {least:.1f}+ ", least, underline=False, bold=False) for least, _ in _COLOURS)
    return f"entropy in nats: {samples}  underlined: high-entropy window, bold: it starts with a trigger word"


def window_lines(
    leaf: Answer, texts: TokenTexts, windows: Windows, *, window: int, colour: bool, measured: str
) -> Iterator[str]:
    """Yields a summary of an answer's windows and a line for each run of them.

    `measured` says where the threshold comes from; without `colour` the tokens are plain, and a trigger word has a star.
    """
    high, validated = int(windows.high.sum()), int(windows.validated.sum())
    yield (
        f"{high} high-entropy windows ({window} tokens of {windows.tau:.2f} nats or more on average, {measured}), "
        f"{validated} at a trigger word"
    )
    spans = _runs(windows.inside(window))
    for first, end in spans[:_MOST_LISTED]:
        own = range(first, end)
        star = "*" if windows.validated[first:end].any() else " "
        peak = float(leaf.window_means[first:end][windows.high[first:end]].max())
        tokens = [
            painted(texts.texts[i], float(leaf.entropies[i]), underline=True, bold=bool(windows.validated[i]))
            if colour
            else texts.texts[i]
            for i in own
        ]
        yield f"  {star} token {first:5d}  {peak:5.2f}  " + "".join(tokens).replace("\n", "\u23ce")
    if len(spans) > _MOST_LISTED:
        yield f"    and {len(spans) - _MOST_LISTED} more"


def _runs(marks: Bool[np.ndarray, "N"]) -> list[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(marks.astype(np.int8), prepend=0, append=0))
    return [(int(first), int(end)) for first, end in edges.reshape(-1, 2)]
