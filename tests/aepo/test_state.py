"""What moves from one iteration to the next."""

import json

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ares_jax.aepo.difficulty import update_difficulty
from ares_jax.aepo.state import bucket_means, from_json, initial_state, to_json, updated_state
from ares_jax.config import default_config


def advance(state, aepo, **changes):
    values = {
        "batch_tau": 1.0, "window_means": np.ones(3), "control_kl": np.full(3, 0.05), "kept_share": 0.5,
    } | changes  # fmt: skip
    return updated_state(state, aepo, **values)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31))
def test_averages_over_iterations(seed):
    """The averages equal the weighted sum over batches written out; a batch without a bucket leaves it alone."""
    rng, aepo = np.random.default_rng(seed), default_config().aepo
    state, taus, counts = initial_state(aepo), [], []
    for _ in range(5):
        taus.append(rng.exponential())
        counts.append(np.where(rng.random(3) < 0.3, np.nan, rng.uniform(0, 9, 3)))
        state = advance(state, aepo, batch_tau=taus[-1], window_means=counts[-1])

    def average(values, decay):
        if not values:
            return np.nan
        first, *rest = values
        weights = [decay ** len(rest), *((1 - decay) * decay**i for i in reversed(range(len(rest))))]
        return sum(w * v for w, v in zip(weights, [first, *rest], strict=True))

    np.testing.assert_allclose(state.tau_high, average(taus, aepo.tau_decay), atol=1e-9)
    for d in range(3):
        seen = [count[d] for count in counts if not np.isnan(count[d])]
        np.testing.assert_allclose(state.target[d], average(seen, aepo.target_decay), atol=1e-9)


def test_alpha_moves_against_the_target_of_earlier_batches():
    aepo = default_config().aepo
    first = advance(initial_state(aepo), aepo, window_means=np.array([4.0, 4.0, np.nan]))
    np.testing.assert_allclose(first.alpha, 0.5)  # nothing to compare with yet
    second = advance(first, aepo, window_means=np.array([6.0, 2.0, 5.0]))
    np.testing.assert_allclose(second.alpha, [0.6, 0.4, 0.5], atol=1e-6)
    np.testing.assert_allclose(second.target, [4.2, 3.8, 5.0])


def test_kappa_moves_only_where_there_are_tokens_and_only_if_dynamic():
    config = default_config()
    observed = np.array([0.10, np.nan, 0.0])
    state = advance(initial_state(config.aepo), config.aepo, control_kl=observed)
    np.testing.assert_allclose(state.kappa, [0.011, 0.01, 0.009], atol=1e-8)
    config.aepo.kl.dynamic = False
    np.testing.assert_array_equal(advance(initial_state(config.aepo), config.aepo, control_kl=observed).kappa, 0.01)


def test_json_keeps_every_bit():
    aepo = default_config().aepo
    state = advance(initial_state(aepo), aepo, batch_tau=1 / 3, window_means=np.array([1 / 7, np.nan, 2]))
    for value in (initial_state(aepo), state):
        again = from_json(json.loads(json.dumps(to_json(value))))
        for a, b in zip(value, again, strict=True):
            np.testing.assert_array_equal(a, b)
            assert a.shape == b.shape


def test_bucket_means_of_an_empty_bucket_are_nothing():
    means, variances = bucket_means(np.array([1.0, 3.0, 5.0]), np.array([0, 0, 2]))
    np.testing.assert_array_equal(means, [2, np.nan, 5])
    np.testing.assert_array_equal(variances, [1, np.nan, 0])


def test_the_difficulty_table_keeps_each_problems_last_bucket_and_counts_moves():
    table = {"a": 0, "b": 1, "c": 2}
    updated, values = update_difficulty(table, {"a": 2, "b": 0, "c": 2, "d": 1})
    assert updated == {"a": 2, "b": 0, "c": 2, "d": 1} and table["a"] == 0
    assert values == {"difficulty/known": 4, "difficulty/easier": 1, "difficulty/harder": 1}
