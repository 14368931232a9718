"""Difficulty of a prompt, from how many of its leaves are right (App. G of the paper)."""

from collections.abc import Mapping

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


def update_difficulty(table: Mapping[str, int], measured: Mapping[str, int]) -> tuple[dict[str, int], dict[str, float]]:
    """Returns the table of each problem's last bucket with `measured` in it, and what that says of the training:

    difficulty/known: problems in the table; difficulty/easier, difficulty/harder: of those measured, how many are in an
    easier or a harder bucket than when they were drawn before.
    """
    moves = [now - table[name] for name, now in measured.items() if name in table]
    updated = {**table, **measured}
    counts = {"known": len(updated), "easier": sum(m < 0 for m in moves), "harder": sum(m > 0 for m in moves)}
    return updated, {f"difficulty/{name}": float(count) for name, count in counts.items()}
