"""On 8 virtual devices: parameters are really split, and nothing changes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ares_jax.cold_start.sft import example
from ares_jax.errors import UserError
from ares_jax.models.params import to_flat
from ares_jax.parallel.sharding import batch_sharding, make_mesh, param_shardings, place_model
from ares_jax.training import Update, initial_state
from ares_jax.training.log_probs import token_statistics
from data_pipeline.packing import pack
from tests import digits


@pytest.mark.parametrize("data, fsdp, tensor", [(1, 8, 1), (2, 2, 2), (1, 2, 4)])
def test_the_sharded_forward_is_the_single_device_one(data, fsdp, tensor):
    mesh = make_mesh(data=data, fsdp=fsdp, tensor=tensor)
    segments = [example(p, np.arange(20, 30, dtype=np.int32)) for p in digits.prompts(8)]
    (batch,) = pack(segments, row_tokens=64, row_patches=48, rows=8)
    statistics = jax.jit(token_statistics(digits.model(), np.zeros(digits.VOCABULARY, bool)))
    params = to_flat(digits.model())
    shardings = param_shardings(digits.model(), mesh)
    sharded = {name: jax.device_put(value, shardings[name]) for name, value in params.items()}
    own = sum(value.addressable_shards[0].data.size for value in sharded.values())
    assert own < 0.6 * sum(value.size for value in params.values())
    results = statistics(sharded, jax.device_put(batch, batch_sharding(mesh)))
    for mine, expected in zip(results, statistics(params, batch), strict=True):
        np.testing.assert_allclose(mine, expected, atol=2e-5)


@pytest.mark.parametrize("data, fsdp, tensor", [(1, 8, 1), (2, 2, 2), (1, 2, 4)])
def test_the_sharded_update_is_the_single_device_one(data, fsdp, tensor):
    """Gradients, moments and weights, from two micro-batches; every device holds its part of each and no more."""
    segments = [example(p, np.arange(20, 30, dtype=np.int32)) for p in digits.prompts(16)]
    batches = pack(segments, row_tokens=64, row_patches=48, rows=8)
    assert len(batches) == 2
    statistics = token_statistics(digits.model(), jnp.zeros(digits.VOCABULARY, bool))

    def loss(params, batch):
        return -jnp.sum(batch["weight"] * statistics(params, batch)[0]) / 160, {}

    def after(mesh):
        place = place_model(digits.model(), mesh)
        params = {name: value.copy() for name, value in place.put(to_flat(digits.model())).items()}
        optimizer = optax.chain(optax.trace(0.9), optax.sgd(1.0))  # momentum: moments without Adam's signs
        return Update(loss, optimizer, place)(initial_state(params, optimizer, place), batches)

    state, metrics = after(make_mesh(data=data, fsdp=fsdp, tensor=tensor))
    expected, reference = after(make_mesh(devices=jax.devices()[:1]))
    np.testing.assert_allclose(metrics["grad_norm"], reference["grad_norm"], rtol=1e-5)
    for mine, single in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(mine, single, atol=1e-5)
    for tree in (state.params, state.optimizer):
        leaves = jax.tree.leaves(tree)
        assert sum(x.addressable_shards[0].data.nbytes for x in leaves) < 0.6 * sum(x.nbytes for x in leaves)


def test_rows_that_cannot_be_split_are_refused_with_the_remedy():
    place = place_model(digits.model(), make_mesh(data=2, fsdp=4))
    with pytest.raises(UserError, match="rows=12 cannot be split over mesh data x fsdp = 8; make it a multiple of 8"):
        place.put_batch({"tokens": np.zeros((12, 3))})


def test_a_mesh_must_fill_the_devices():
    with pytest.raises(UserError, match="mesh data=3 fsdp=1 tensor=1 does not fill 8 devices"):
        make_mesh(data=3, fsdp=1)
