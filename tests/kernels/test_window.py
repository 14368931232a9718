import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import topologies

from kernels import window_means, window_push, window_ring_init, window_step
from kernels.window import WindowRing

PALLAS = pytest.mark.parametrize("implementation", ["tpu_interpret", "gpu_interpret"])


def slow(entropy, mask, window):
    means, complete = np.zeros(entropy.shape), np.zeros(entropy.shape, bool)
    for b in range(entropy.shape[0]):
        for t in range(entropy.shape[1] - window + 1):
            if mask[b, t : t + window].all():
                means[b, t], complete[b, t] = np.mean(entropy[b, t : t + window].astype(np.float64)), True
    return means, complete


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 9), st.integers(1, 12))
def test_means_equal_the_definition(seed, window, length):
    rng = np.random.default_rng(seed)
    entropy, mask = rng.exponential(size=(3, length)).astype(np.float32), rng.random((3, length)) < 0.8
    means, complete = window_means(jnp.array(entropy), jnp.array(mask), window)
    expected, where = slow(entropy, mask, window)
    np.testing.assert_array_equal(complete, where)
    np.testing.assert_allclose(means, expected, rtol=1e-6)


def test_the_ring_agrees_bit_for_bit():
    rng = np.random.default_rng(0)
    entropy = rng.exponential(size=(5, 20)).astype(np.float32)
    lengths = np.array([20, 3, 4, 11, 1])
    mask = np.arange(20) < lengths[:, None]
    means, complete = window_means(jnp.array(entropy), jnp.array(mask), 4)
    ring = window_ring_init(5, 4)
    for t in range(20):
        ring, mean, ended = window_push(ring, jnp.array(entropy[:, t]), jnp.array(mask[:, t]))
        if t >= 3:
            np.testing.assert_array_equal(ended, complete[:, t - 3])
            np.testing.assert_array_equal(mean, means[:, t - 3])


def test_an_empty_window_is_refused():
    with pytest.raises(ValueError, match="window=0"):
        window_means(jnp.ones((1, 3)), jnp.ones((1, 3), bool), 0)


@pytest.mark.parametrize("window", [1, 3, 7])
@pytest.mark.parametrize("compiled", [False, True])
def test_the_forms_agree_bit_for_bit_compiled_or_not_with_pauses(window, compiled):
    rng = np.random.default_rng(window)
    steps, rows = 30, 6
    active = rng.random((steps, rows)) < np.array([1.0, 0.9, 0.5, 0.2, 0.05, 0.0])
    entropy = rng.gamma(1.0, size=(steps, rows)).astype(np.float32)
    push = jax.jit(window_push) if compiled else window_push
    ring, ended = window_ring_init(rows, window), []
    for t in range(steps):
        ring, mean, complete = push(ring, jnp.array(entropy[t]), jnp.array(active[t]))
        ended.append((np.asarray(mean), np.asarray(complete)))
    means_at, complete_at = (np.stack(x) for x in zip(*ended, strict=True))
    assert not complete_at[~active].any()
    own, count = np.zeros((rows, steps), np.float32), active.sum(0)
    for row in range(rows):  # a paused row goes on where it was: its window is over its own tokens
        own[row, : count[row]] = entropy[active[:, row], row]
    mask = jnp.arange(steps) < count[:, None]
    for form in (window_means, jax.jit(window_means, static_argnums=2)):
        means, complete = (np.asarray(x) for x in form(jnp.array(own), mask, window))
        for row in range(rows):
            starts = max(count[row] - window + 1, 0)
            on = active[:, row]
            np.testing.assert_array_equal(means_at[on, row][window - 1 :], means[row, :starts])
            np.testing.assert_array_equal(complete_at[on, row][window - 1 :], complete[row, :starts])


@PALLAS
@pytest.mark.parametrize("window, length", [(1, 5), (4, 130), (7, 1100), (9, 4)])
def test_the_kernels_means_are_their_twins_bits(implementation, window, length):
    rng = np.random.default_rng(window)
    mask = jnp.array(rng.random((11, length)) < 0.9)
    entropy = jnp.where(mask, jnp.array(rng.gamma(1.0, size=mask.shape), jnp.float32), jnp.nan)
    for mine, twins in zip(
        window_means(entropy, mask, window, implementation=implementation), window_means(entropy, mask, window), strict=True
    ):
        np.testing.assert_array_equal(mine, twins)


@PALLAS
@pytest.mark.parametrize("window", [1, 3])
def test_the_kernels_step_is_its_twins_bits(implementation, window):
    rng = np.random.default_rng(window)
    rows, steps, vocabulary = 6, 7, 30
    trigger, tau = jnp.array(rng.random(vocabulary) < 0.5), jnp.array(rng.uniform(0.5, 1.5, rows), jnp.float32)
    start = window_ring_init(rows, window), jnp.zeros((rows, window), jnp.int32)
    mine, twins, hits = start, start, 0
    step, twins_step = (
        jax.jit(functools.partial(window_step, tau_high=tau, trigger=trigger, implementation=name))
        for name in (implementation, "xla")
    )
    for _ in range(steps):
        drawn = (
            jnp.array(rng.gamma(1.0, size=rows), jnp.float32), jnp.array(rng.integers(0, vocabulary, rows), jnp.int32),
            jnp.array(rng.random(rows) < 0.8),
        )  # fmt: skip
        *mine, mean, hit = step(*mine, *drawn)
        *twins, twins_mean, twins_hit = twins_step(*twins, *drawn)
        for a, b in zip(jax.tree.leaves((mine, mean, hit)), jax.tree.leaves((twins, twins_mean, twins_hit)), strict=True):
            np.testing.assert_array_equal(a, b)
        hits += int(hit.sum())
    assert 0 < hits < rows * steps


def test_a_hit_is_a_high_window_that_starts_with_a_trigger():
    trigger, tau, hits = jnp.arange(5) == 2, jnp.array([0.5]), []
    state = window_ring_init(1, 2), jnp.zeros((1, 2), jnp.int32)
    for entropy, token in ((0.9, 2), (0.1, 3), (0.9, 2), (0.05, 2), (0.94, 2)):
        *state, _, hit = window_step(
            *state, jnp.array([entropy]), jnp.array([token]), jnp.array([True]), tau_high=tau, trigger=trigger
        )
        hits.append(bool(hit[0]))
    assert hits == [False, True, False, False, False]  # 2 3 at 0.5; 3 2 starts with 3; 2 2 at 0.475; 2 2 at 0.495


@pytest.mark.parametrize("platform", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "cuda"])
def test_compilers_take_the_kernels(platform):
    place = None
    if platform != "cuda":
        devices = topologies.get_topology_desc(platform="tpu", topology_name=platform).devices
        place = jax.sharding.SingleDeviceSharding(devices[0])

    def of(dtype, *shape):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    name = "gpu" if platform == "cuda" else "tpu"
    means = jax.jit(functools.partial(window_means, window=4, implementation=name))
    ring = WindowRing(of(jnp.float32, 64, 4), of(jnp.int32, 64))
    step = jax.jit(functools.partial(window_step, implementation=name))
    for traced in (
        means.trace(of(jnp.float32, 64, 16_384), of(bool, 64, 16_384)),
        step.trace(
            ring, of(jnp.int32, 64, 4), of(jnp.float32, 64), of(jnp.int32, 64), of(bool, 64),
            tau_high=of(jnp.float32, 64), trigger=of(bool, 151_936),
        ),
    ):  # fmt: skip
        if platform == "cuda":
            assert "triton" in traced.lower(lowering_platforms=("cuda",)).as_text()
        else:
            assert "tpu_custom_call" in traced.lower().compile().as_text()
