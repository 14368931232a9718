"""The entropy part of the hierarchical reward (section 3.2.2): how much exploration a problem deserves.

N is the number of validated windows of a leaf, the target that of its difficulty bucket; delta = N - target.
"""

from jaxtyping import Array, Bool, Float, Int

from ares_jax.aepo.difficulty import EASY, HARD, MEDIUM
from ares_jax.aepo.namespace import namespace

# Per bucket: margin factor f, Huber width k, temperature of the saturation, factor c of the cap. From the released code.
_F, _K, _TEMPERATURE, _CAP = (0.15, 0.25, 0.35), (2.0, 3.0, 4.0), (2.0, 2.5, 3.0), (1.0, 1.0, 1.2)
_WRONG = (0.6, 0.8, 1.0)  # what a wrong answer earns for exploring, as a share of the cap
_EPS = 1e-6


def released_entropy_reward(
    num_windows: Float[Array, "N"],
    target: Float[Array, "N"],
    difficulty: Int[Array, "N"],
    correct: Bool[Array, "N"],
    alpha: Float[Array, "N"] | float,
) -> Float[Array, "N"]:
    """Returns the reward of the authors' released code; `alpha` scales it (method.md, the table of section 3)."""
    xp = namespace(num_windows, target, difficulty, correct, alpha)
    d = xp.asarray(difficulty)
    factor, width, temperature, cap = (xp.asarray(t)[d] for t in (_F, _K, _TEMPERATURE, _CAP))
    cap = cap * alpha
    delta = xp.asarray(num_windows) - target
    margin = _margin(target, factor)

    def penalty(excess, share):
        return _penalty(excess, margin, width, cap, share)

    def saturated(x):
        return 0.5 * (1 + xp.tanh(0.5 * x / temperature))  # the logistic function, without overflow

    wrong = xp.asarray(_WRONG)[d] * cap * saturated(xp.maximum(delta - margin, 0.0))
    hard = xp.where(delta >= -margin, cap * saturated(delta + margin), penalty(-delta, 0.5))
    right = xp.where(d == EASY, penalty(delta, 1.0), xp.where(d == MEDIUM, penalty(xp.abs(delta), 1.0), hard))
    return xp.where(xp.asarray(correct), right, wrong)


def paper_entropy_reward(
    num_windows: Float[Array, "N"],
    target: Float[Array, "N"],
    difficulty: Int[Array, "N"],
    correct: Bool[Array, "N"],
    mean: Float[Array, "N"],
    variance: Float[Array, "N"],
    scale: float = 1.0,
    max_multiplier: float = float("inf"),
    easy_excess: float = 0.0,
) -> Float[Array, "N"]:
    """Returns -1[wrong] * lambda_d * g_d(delta), the paper's equation with its multiplier repaired.

    lambda_d = max(0, (mean - target) / (variance + eps)) with the mean and variance of N in the bucket's present batch;
    with a target of the same batch it would be 0 always, so `target` must come from earlier ones. For hard problems too
    few windows are the violation, so the numerator's sign is reversed. `max_multiplier` bounds lambda_d: a bucket of a
    few like leaves has next to no variance, and lambda_d would be in the thousands (seen: a mean reward of -4600).

    `easy_excess`: what a right but wavering answer to an easy problem loses at most, which the equation never takes but
    the paper's case study does (target 28: 0 at 20 windows, -0.5 at 51: the released penalty, with a cap of 0.5).
    """
    xp = namespace(num_windows, target, difficulty, correct, mean, variance)
    d = xp.asarray(difficulty)
    delta = xp.asarray(num_windows) - target
    violation = xp.where(d == HARD, target - mean, mean - target)
    multiplier = xp.clip(violation / (variance + _EPS), 0.0, max_multiplier)
    excess = xp.where(d == EASY, xp.maximum(0.0, delta), xp.where(d == MEDIUM, xp.abs(delta), xp.maximum(0.0, -delta)))
    easy = xp.where(d == EASY, _penalty(delta, _margin(target, _F[EASY]), _K[EASY], easy_excess), 0.0)
    return xp.where(xp.asarray(correct), easy, -scale * multiplier * excess)


def overlong_penalty(lengths: Float[Array, "N"], limit: int, buffer: int) -> Float[Array, "N"]:
    """Returns 0 up to limit - buffer tokens and from there on a line down to -1 at the limit; 0 without a buffer.

    "Soft overlong punishment" of DAPO (arXiv 2503.14476, section 3.4).
    """
    xp = namespace(lengths)
    over = xp.asarray(lengths) - (limit - buffer)
    return -xp.clip(over / max(buffer, 1), 0.0, 1.0) if buffer > 0 else xp.zeros(over.shape)


def updated_alpha(alpha: Float[Array, "3"], mean: Float[Array, "3"], target: Float[Array, "3"]) -> Float[Array, "3"]:
    """Returns the scale per bucket, moved by 0.05 x (mean - target) and kept within 0 and 2; NaN means no leaf: kept."""
    xp = namespace(alpha, mean, target)
    moved = xp.clip(alpha + 0.05 * (mean - target), 0.0, 2.0)
    return xp.where(xp.isnan(moved), alpha, moved)


def _margin(target, factor):
    xp = namespace(target, factor)
    return xp.maximum(1.0, factor * xp.maximum(target, 1.0))


def _penalty(excess, margin, width, cap, share=1.0):
    xp = namespace(excess, margin, cap)
    return -xp.minimum(cap, share * _huber(excess - margin, width) / (margin + width) * cap)


def _huber(x, width):
    xp = namespace(x)
    x = xp.maximum(x, 0.0)
    return xp.where(x <= width, x**2 / (2 * width), x - width / 2)
