"""Each TPU kernel once in the interpreter that looks for races between its copies and its steps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax._src.pallas.mosaic.interpret.race_detection_state import RaceDetectionState
from jax.experimental.pallas import tpu as pltpu

from kernels import sample_with_entropy, token_log_probs_and_entropy, window_means, window_ring_init, window_step

NAME = "tpu_interpret"


def draw(hidden, head):
    return sample_with_entropy(hidden, head, jax.random.key(0), temperature=1.0, top_k=0, top_p=0.9, implementation=NAME)


def learn(hidden, head):
    def loss(hidden, head):
        targets = jnp.arange(len(hidden))
        return sum(x.sum() for x in token_log_probs_and_entropy(hidden, head, targets, temperature=1.0, implementation=NAME))

    return jax.grad(loss, argnums=(0, 1))(hidden, head)


def windows(hidden, head):
    tokens, row = jnp.zeros((9, 3), jnp.int32), hidden[:, 0]
    step = window_step(
        window_ring_init(9, 3), tokens, row, tokens[:, 0], row > 0, tau_high=row, trigger=head[:, 0] > 0, implementation=NAME
    )
    return step, window_means(hidden, hidden > -9, 3, implementation=NAME)


@pytest.mark.parametrize("kernels, count", [(draw, 2), (learn, 3), (windows, 2)])
def test_no_kernel_races(kernels, count, monkeypatch):
    states = []  # one a kernel

    def state(**options):
        states.append(RaceDetectionState(**options))
        return states[-1]

    monkeypatch.setattr(interpret_pallas_call, "RaceDetectionState", state)
    monkeypatch.setattr(pltpu, "InterpretParams", functools.partial(pltpu.InterpretParams, detect_races=True))
    rng = np.random.default_rng(0)
    hidden, head = (jnp.asarray(rng.normal(size=(size, 16)), jnp.float32) for size in (9, 1100))
    jax.block_until_ready(kernels(hidden, head))
    assert len(states) >= count and all(x.writes for x in states)  # what is not watched has none
    assert not any(x.races_found for x in states)
