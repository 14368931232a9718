"""The trigger vocabulary V_sem: words at which reasoning turns or starts (App. H of the paper). Our own list."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool

from ares_jax.errors import UserError

TRANSITIONS = (
    "actually", "alternatively", "although", "also", "and", "besides", "but", "conversely", "else", "however", "instead",
    "later", "meanwhile", "moreover", "nevertheless", "next", "nonetheless", "now", "otherwise", "rather", "similarly",
    "still", "then", "though", "unless", "until", "whereas", "while", "yet",
)  # fmt: skip
INITIATORS = (
    "again", "assume", "assuming", "because", "check", "compare", "compute", "consider", "consequently", "count", "double",
    "eighth", "estimate", "examine", "fifth", "finally", "first", "fourth", "given", "guess", "hence", "hmm", "hold", "if",
    "imagine", "indeed", "let", "likely", "look", "looking", "maybe", "notice", "observe", "oh", "okay", "perhaps",
    "possibly", "probably", "recall", "recheck", "reconsider", "remember", "second", "see", "seems", "seventh", "since",
    "sixth", "so", "start", "step", "suppose", "sure", "therefore", "think", "third", "thus", "try", "verify", "wait",
    "what", "when", "whether", "which", "why",
)  # fmt: skip
WORDS = frozenset(TRANSITIONS + INITIATORS)


def normalized(token: str) -> str:
    """Returns a token's text without leading-space markers and in lower case."""
    return token.lstrip("Ġ▁ \t\n").rstrip().lower()


def read_words(path: Path) -> frozenset[str]:
    """Returns the words of a file, one a line. Raises `UserError` if it is not there or holds none."""
    words = frozenset(map(normalized, path.read_text().splitlines())) - {""} if path.is_file() else frozenset()
    if not words:
        raise UserError(f"aepo.trigger_words={path}: no file with a word a line; ares_jax.cold_start.triggers writes one")
    return words


def trigger_mask(tokens: Sequence[str], words: frozenset[str] = WORDS) -> Bool[np.ndarray, "V"]:
    """Says which tokens of a vocabulary are triggers: whole words of the list, whatever space stands before them."""
    return np.array([normalized(token) in words for token in tokens], bool)
