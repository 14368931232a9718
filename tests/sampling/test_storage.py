"""The sampler stores no weight wider than it multiplies with: half the memory and half of what is sent, the same bits."""

import jax
import jax.numpy as jnp
import numpy as np

from ares_jax.parallel.sharding import make_mesh
from ares_jax.run import run as module
from ares_jax.run.run import open_run
from ares_jax.sampling.local import LocalSampler
from configs import digits_cpu
from tests.sampling.test_engine import request


def test_a_sampler_that_multiplies_in_bfloat16_stores_bfloat16_and_draws_the_same(tmp_path, monkeypatch):
    config = digits_cpu.get_config()
    config.model.update(dtype="bfloat16", param_dtype="float32")
    config.sampler.update(slots=8, pages=200, decode_steps=4)
    workspace = open_run(config, tmp_path, mesh=make_mesh(devices=jax.devices()[:1]))
    params = workspace.initial_params()
    assert {value.dtype for value in params.values()} == {jnp.dtype("float32")}
    narrow = workspace.engine(params)
    assert {spec.dtype for spec in narrow.weight_specs().values()} == {jnp.dtype("bfloat16")}
    assert {value.dtype for value in workspace.host_params(params).values()} == {jnp.dtype("bfloat16")}

    requests = [request(prompt, seed=i) for i, prompt in enumerate(workspace.prompts("train", limit=3))]
    with monkeypatch.context() as patch:
        patch.setattr(module, "narrower", lambda *types: jnp.dtype("float32"))
        wide = workspace.engine(params)
    assert {spec.dtype for spec in wide.weight_specs().values()} == {jnp.dtype("float32")}
    for ours, theirs in zip(narrow.generate(requests), wide.generate(requests), strict=True):
        for a, b in zip(ours.leaves, theirs.leaves, strict=True):
            np.testing.assert_array_equal(a.token_ids, b.token_ids)
            np.testing.assert_array_equal(a.log_probs, b.log_probs)
            np.testing.assert_array_equal(a.entropies, b.entropies)

    other = {name: value * 0.5 for name, value in params.items()}
    workspace.push(LocalSampler(narrow), other, 1)
    assert narrow.policy_version == 1
    halved = workspace.engine(other)
    again, fresh = narrow.generate(requests[:1])[0], halved.generate(requests[:1])[0]
    np.testing.assert_array_equal(again.leaves[0].log_probs, fresh.leaves[0].log_probs)
