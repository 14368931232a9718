"""The reward tables of method.md, section 3, by hand."""

import numpy as np
import pytest

from ares_jax.aepo.reward import overlong_penalty, paper_entropy_reward, released_entropy_reward, updated_alpha

# alpha = 0.5. Medium, target 8: margin 2, k 3, cap 0.5. Hard, target 10: margin 3.5, k 4, cap 0.6.
CELLS = [
    (1, 8, 8.0, True, 0.0),
    (1, 8, 12.0, True, -0.4 / 6),  # huber(2) = 4 / 6; over 5, times 0.5
    (1, 8, 2.0, True, -0.25),  # huber(4) = 2.5
    (1, 8, 100.0, True, -0.5),  # the cap
    (1, 8, 8.0, False, 0.2),  # 0.8 x 0.5 x sat(0)
    (1, 8, 12.5, False, 0.4 * 0.7310585786),  # sat(2.5 / 2.5)
    (2, 10, 10.0, True, 0.6 * 0.7625424),  # sat(3.5 / 3)
    (2, 10, 6.5, True, 0.3),  # delta = -margin: still a reward
    (2, 10, 2.5, True, -0.08),  # huber(4) = 2; half of it over 7.5, times 0.6
    (2, 10, 10.0, False, 0.3),
    (2, 10, 16.5, False, 0.6 * 0.7310585786),  # sat(3 / 3)
    (0, 0, 0.0, True, 0.0),  # no windows, none expected
    (0, 0, 0.0, False, 0.15),
]


@pytest.mark.parametrize("difficulty, target, windows, correct, expected", CELLS)
def test_released(difficulty, target, windows, correct, expected):
    value = released_entropy_reward(
        np.array([windows]), np.array([target]), np.array([difficulty]), np.array([correct]), 0.5
    )
    np.testing.assert_allclose(value, [expected], atol=1e-6)


def test_the_paper_penalises_only_wrong_answers_and_only_the_wrong_direction():
    """Target 6, variance 1: lambda is 2 wherever the mean is 2 on the violating side, else 0."""
    rows = [  # difficulty, windows, correct, mean, expected
        (0, 9, False, 8, -6), (0, 3, False, 8, 0), (0, 9, True, 8, 0), (0, 9, False, 4, 0),
        (1, 9, False, 8, -6), (1, 3, False, 8, -6), (1, 3, False, 6, 0),
        (2, 3, False, 4, -6), (2, 9, False, 4, 0), (2, 3, False, 8, 0), (2, 3, True, 4, 0),
    ]  # fmt: skip
    difficulty, windows, correct, mean, expected = (np.array(column) for column in zip(*rows, strict=True))
    value = paper_entropy_reward(windows, np.full(11, 6.0), difficulty, correct, mean, np.ones(11))
    np.testing.assert_allclose(value, expected, atol=1e-4)


def test_alpha_follows_the_deviation_and_keeps_its_bounds():
    nan = np.nan
    moved = updated_alpha(np.array([0.5, 1.99, 0.01]), np.array([4.0, 5.0, 1.0]), np.array([2.0, 2.0, 3.0]))
    np.testing.assert_allclose(moved, [0.6, 2.0, 0.0], atol=1e-6)
    kept = updated_alpha(np.array([0.5, 0.6, 0.7]), np.array([nan, 5.0, nan]), np.array([2.0, nan, nan]))
    np.testing.assert_allclose(kept, [0.5, 0.6, 0.7], atol=1e-6)


def test_the_case_study_of_the_paper():
    """Easy, target 28: a right answer loses nothing at 20 windows and 0.5 at 51; by the equation alone, never."""
    windows, target, easy, right, any_ = np.array([20, 51]), np.full(2, 28.0), np.zeros(2, int), np.ones(2, bool), np.ones(2)
    for cap, expected in ((0.5, [0.0, -0.5]), (0.0, [0.0, 0.0])):
        value = paper_entropy_reward(windows, target, easy, right, any_, any_, easy_excess=cap)
        np.testing.assert_allclose(value, expected, atol=1e-6)
    for level in (1, 2):
        value = paper_entropy_reward(windows, target, easy + level, right, any_, any_, easy_excess=0.5)
        np.testing.assert_array_equal(value, 0.0)


def test_overlong_answers_lose_more_towards_the_limit():
    """DAPO's own numbers: a limit of 20,480, the last 4,096 of which cost up to 1."""
    value = overlong_penalty(np.array([1, 16_384, 18_432, 20_480, 20_481]), 20_480, 4096)
    np.testing.assert_allclose(value, [0, 0, -0.5, -1, -1])
    np.testing.assert_array_equal(overlong_penalty(np.array([20_480]), 20_480, 0), 0.0)
