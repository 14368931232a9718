"""Every remat policy gives the same gradient; what each keeps for the backward pass falls in the order of the names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ares_jax.cold_start.sft import example
from ares_jax.errors import UserError
from ares_jax.models.qwen2_5_vl import Qwen25VLConfig, TextConfig, VisionConfig, layers
from ares_jax.models.qwen2_5_vl.layers import REMAT, scan_layers
from ares_jax.models.qwen2_5_vl.model import abstract_model
from ares_jax.parallel.sharding import make_mesh
from ares_jax.params import to_flat, with_params
from ares_jax.planning.aot import topology_devices
from ares_jax.training.log_probs import token_statistics
from data_pipeline.packing import pack
from tests import digits

INPUTS = 8, 256, 256


def gradient(model):
    statistics = token_statistics(model, jnp.zeros(model.config.text.vocab_size, bool))
    return jax.jit(jax.grad(lambda params, batch: jnp.sum(jnp.where(batch["weight"] > 0, statistics(params, batch)[0], 0))))


def test_the_gradient_is_the_same(monkeypatch):
    """Also of layers in a loop: few of them, as here, are compiled one by one."""
    segments = [example(p, np.arange(20, 30, dtype=np.int32)) for p in digits.prompts(2)]
    (batch,) = pack(segments, row_tokens=48, row_patches=24, rows=2)
    results = {}
    for remat in REMAT:
        model = abstract_model(digits.model().config, remat=remat)
        results[remat] = gradient(model)(to_flat(digits.model()), batch)
    monkeypatch.setattr(layers, "SHALLOW", 0)
    results["none, in a loop"] = gradient(abstract_model(digits.model().config, remat="none"))(
        to_flat(digits.model()), batch
    )
    for remat, gradients in results.items():
        for name, value in gradients.items():
            np.testing.assert_allclose(value, results["none"][name], rtol=1e-4, atol=1e-5, err_msg=f"{remat} {name}")


def memory(remat, mesh):
    """Of the gradient of four text layers over 8 x 256 tokens."""
    config = Qwen25VLConfig(TextConfig(512, 256, 768, 4, 4, 2, (8, 12, 12)), VisionConfig(64, 64, 1, 2, (0,)), 1, 2, 3, 4)
    model = abstract_model(config, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, remat=remat)
    here = jax.NamedSharding(mesh, jax.P())

    def array(*shape, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=here)

    def loss(params, x, positions, ids):
        return with_params(model, params).text(x, positions, ids).astype(jnp.float32).sum()

    params = {name: array(*x.shape, dtype=x.dtype) for name, x in to_flat(model).items()}
    inputs = array(*INPUTS, dtype=jnp.bfloat16), array(8, 3, 256), array(8, 256)
    with jax.set_mesh(mesh):
        return jax.jit(jax.grad(loss)).lower(params, *inputs).compile().memory_analysis()


def test_memory_falls_in_the_order_of_the_names():
    kept = [memory(remat, make_mesh(devices=jax.devices()[:1])).temp_size_in_bytes for remat in ("none", "dots", "full")]
    assert kept == sorted(set(kept), reverse=True)


def test_the_layers_inputs_are_in_the_memory_of_the_host():
    """By the TPU's compiler: the CPU has no other memory."""
    analysis = memory("offload", make_mesh(devices=topology_devices("v5e:2x2")[:1]))
    assert analysis.host_temp_size_in_bytes >= 4 * np.prod(INPUTS) * 2


def test_an_unknown_name_is_refused():
    with pytest.raises(UserError, match="model.remat='some' is not one of none, dots, full, offload"):
        scan_layers(lambda x, _: (x, None), jnp.ones(3), jnp.ones((2, 3)), remat="some")
