"""An update on a toy loss: micro-batches add up, frozen parameters stay, a gradient that is not finite is left out."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ares_jax.config import default_config
from ares_jax.parallel.sharding import Placement, make_mesh
from ares_jax.training import Update, initial_state, make_optimizer, trainable

ALONE = NamedSharding(make_mesh(devices=jax.devices()[:1]), PartitionSpec())
HERE = Placement(ALONE.mesh, {"text.w": ALONE, "visual.b": ALONE})


def loss(params, batch):
    error = batch["x"] @ params["text.w"] + params["visual.b"] - batch["y"]
    return jnp.sum(batch["weight"] * error**2), {"rows": jnp.sum(batch["weight"] > 0)}


@pytest.fixture
def problem():
    rng = np.random.default_rng(0)
    batch = {"x": rng.normal(size=(12, 3)), "y": rng.normal(size=12), "weight": np.full(12, 1 / 12)}
    return {"text.w": jnp.ones(3), "visual.b": jnp.ones(())}, {k: v.astype(np.float32) for k, v in batch.items()}


def parts(batch, count):
    return [{name: value[i::count] for name, value in batch.items()} for i in range(count)]


@pytest.mark.parametrize("count", [1, 3, 4])
def test_micro_batches_add_up_to_the_gradient_by_hand(problem, count):
    params, batch = problem
    error = batch["x"] @ np.ones(3) + 1 - batch["y"]
    gradient = 2 * batch["x"].T @ (error / 12), 2 * np.mean(error)
    state, metrics = Update(loss, optax.sgd(0.1), HERE)(initial_state(params, optax.sgd(0.1), HERE), parts(batch, count))
    np.testing.assert_allclose(state.params["text.w"], 1 - 0.1 * gradient[0], rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], np.hypot(np.linalg.norm(gradient[0]), gradient[1]), rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], np.mean(error**2), rtol=1e-5)
    assert int(metrics["rows"]) == 12 and int(state.step) == 1


def test_frozen_parameters_have_neither_moments_nor_updates(problem):
    params, batch = problem
    options = default_config().optimizer
    options.freeze_vision = True
    optimizer, trained = make_optimizer(options, learning_rate=0.1, steps=5), trainable(options)
    state = initial_state(params, optimizer, HERE, trained)
    assert not any("visual.b" in str(path) for path, _ in _leaves(state.optimizer))
    state, metrics = Update(loss, optimizer, HERE, trained)(state, [batch])
    assert float(state.params["visual.b"]) == 1 and not np.allclose(state.params["text.w"], 1)
    error = batch["x"] @ np.ones(3) + 1 - batch["y"]
    np.testing.assert_allclose(metrics["grad_norm"], np.linalg.norm(2 * batch["x"].T @ (error / 12)), rtol=1e-5)


def test_a_gradient_that_is_not_finite_changes_only_the_counters(problem):
    params, batch = problem
    optimizer = optax.adam(0.1)
    state = initial_state(params, optimizer, HERE)
    batch["y"][3] = np.nan
    after, _ = Update(loss, optimizer, HERE)(state, parts(batch, 3))
    assert (int(after.step), int(after.skipped)) == (1, 1)
    np.testing.assert_array_equal(after.params["text.w"], np.ones(3))
    assert all(np.all(np.asarray(leaf) == 0) for _, leaf in _leaves(after.optimizer))


def test_the_first_moment_is_stored_as_told(problem):
    options = default_config().optimizer
    options.mu_dtype = "bfloat16"
    kinds = {str(leaf.dtype) for path, leaf in _leaves(make_optimizer(options, learning_rate=0.1, steps=5).init(problem[0]))}
    assert kinds == {"bfloat16", "float32", "int32"}


def test_no_micro_batch_is_an_error(problem):
    with pytest.raises(ValueError, match="at least one"):
        Update(loss, optax.sgd(0.1), HERE)(initial_state(problem[0], optax.sgd(0.1), HERE), [])


def _leaves(tree):

    return jax.tree_util.tree_leaves_with_path(tree)
