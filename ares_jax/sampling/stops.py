"""Stop strings: which token completes one. They are looked for in bytes: a character may take several tokens."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int


def stop_bytes(stops: Sequence[str]) -> tuple[bytes, ...]:
    """Returns the UTF-8 bytes of the strings; half a surrogate pair becomes what no text holds."""
    return tuple(stop.encode(errors="surrogatepass") for stop in stops)


def tokens_until_stop(
    token_ids: Int[np.ndarray, "N"], stops: Sequence[bytes], table: Sequence[bytes], *, seen: int
) -> int | None:
    """Returns the number of tokens up to the one that completes a stop string, None if none does.

    `table`: the bytes of each token. `seen`: so many tokens hold no stop string, but one may begin in them.
    """
    reach = max(map(len, stops), default=1) - 1  # bytes before the new ones that can belong to a stop string
    text, begin = b"", seen
    while begin and len(text) < reach:
        begin -= 1
        text = table[token_ids[begin]] + text
    for count, token in enumerate(token_ids[seen:], seen + 1):
        text += table[token]
        if any(stop in text for stop in stops):
            return count
    return None
