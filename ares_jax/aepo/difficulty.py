"""Difficulty of a prompt, from how many of its leaves are right (App. G of the paper)."""

from jaxtyping import Array, Int

from ares_jax.aepo.namespace import namespace

EASY, MEDIUM, HARD = 0, 1, 2
NAMES = ("easy", "medium", "hard")
# Least shares of right leaves to be easy and medium. "released": the authors' code.
RULES = {"paper": (6 / 8, 3 / 8), "released": (2 / 3, 1 / 3)}


def bucket(num_correct: Int[Array, "..."] | int, group_size: int, rule: str = "paper") -> Int[Array, "..."]:
    """Returns 0, 1 or 2 (easy, medium, hard). With 8 leaves, "paper" is easy from 6 and medium from 3."""
    if rule not in RULES:
        raise ValueError(f"difficulty_rule={rule!r} is not one of {', '.join(RULES)}")
    easy, medium = (share * group_size - 1e-6 for share in RULES[rule])
    xp = namespace(num_correct)
    count = xp.asarray(num_correct)
    return xp.where(count >= easy, EASY, xp.where(count >= medium, MEDIUM, HARD))
