"""Thresholds and validated windows: definitions on small examples, and what is missing."""

import math

import numpy as np
import pytest

from ares_jax.aepo.windows import batch_threshold, smoothed, validated


def test_the_two_definitions_by_hand():
    """Medians. Of H: 1 and 4. Of the means of pairs, [0.5, 1.5] and [3, 4, 20]: 1 and 4 too. A third one tells."""
    trajectories = [np.array([0.0, 1.0, 2.0]), np.array([3.0, 3.0, 5.0, 35.0]), np.zeros(0)]
    assert batch_threshold(trajectories, definition="trajectory", quantile=0.5, window=2) == (1 + 4) / 2
    assert batch_threshold(trajectories, definition="window_median", quantile=0.5, window=2) == (1 + 4) / 2
    longer = [*trajectories, np.array([9.0, 9.0])]
    assert batch_threshold(longer, definition="trajectory", quantile=0.5, window=2) == (1 + 4 + 9) / 3
    assert batch_threshold(longer, definition="window_median", quantile=0.5, window=2) == 4
    with pytest.raises(ValueError, match="tau_definition='mean'"):
        batch_threshold(trajectories, definition="mean", quantile=0.5, window=2)


def test_the_first_batch_initialises_the_average():
    assert smoothed(math.nan, 2.0, 0.99) == 2.0
    assert smoothed(2.0, 3.0, 0.75) == 2.25
    assert smoothed(2.0, math.nan, 0.99) == 2.0
    assert math.isnan(smoothed(math.nan, math.nan, 0.99))


def test_a_window_is_validated_if_complete_high_and_triggered():
    means, yes = np.array([1.0, 1.0, 1.0, 0.9]), np.ones(4, bool)
    assert validated(means, yes, yes, 1.0).tolist() == [True, True, True, False]  # at the threshold counts
    assert validated(means, np.array([0, 1, 1, 1], bool), np.array([1, 0, 1, 1], bool), 1.0).tolist() == [0, 0, 1, 0]
    assert not validated(means, yes, yes, math.inf).any()
    assert not validated(means, yes, yes, math.nan).any()
    assert validated(np.zeros(0), np.zeros(0, bool), np.zeros(0, bool), 0.0).shape == (0,)
