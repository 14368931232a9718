"""On 8 virtual devices: parameters are really split, and nothing changes."""

import jax
import numpy as np
import pytest

from ares_jax.checkpoints.params import to_flat
from ares_jax.cold_start.sft import example
from ares_jax.errors import UserError
from ares_jax.parallel.sharding import batch_sharding, make_mesh, param_shardings
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


def test_a_mesh_must_fill_the_devices():
    with pytest.raises(UserError, match="mesh data=3 fsdp=1 tensor=1 does not fill 8 devices"):
        make_mesh(data=3, fsdp=1)
