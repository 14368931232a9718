"""Confidence intervals of measured shares."""

from math import sqrt


def wilson_interval(correct: int, problems: int, z: float = 1.96) -> tuple[float, float]:
    """Returns the Wilson score interval of a binomial share; z = 1.96 gives 95 %.

    Wilson, "Probable inference", JASA 1927.
    """
    if problems == 0:
        return 0.0, 1.0
    share, n = correct / problems, problems
    center = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, center - half), min(1.0, center + half)
