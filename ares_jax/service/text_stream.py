"""Tokens to text as they are drawn: no half characters, nothing of a stop string."""

import codecs
from collections.abc import Sequence

from ares_jax.sampling.stops import stop_bytes


class TextStream:
    """The text of one response. `stopped` is set by the token that completes a stop string; the text ends before it."""

    def __init__(self, table: Sequence[bytes], stops: Sequence[str] = ()):
        self._table, self._stops = table, stop_bytes(stops)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = b""  # may be the beginning of a stop string
        self.stopped = False

    def push(self, token_id: int) -> str:
        """Takes one token; returns the text that is certain now."""
        text = self._held + self._table[token_id]
        begins = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        if begins:
            self.stopped, self._held = True, b""
            return self._decoder.decode(text[: min(begins)], final=True)
        certain = len(text) - max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[certain:]
        return self._decoder.decode(text[:certain])

    def finish(self) -> str:
        """Returns what was held back: the response ends here."""
        rest, self._held = self._held, b""
        return self._decoder.decode(rest, final=True)


def _overlap(text: bytes, stop: bytes) -> int:
    """Returns the length of the longest end of `text` with which `stop` begins."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
