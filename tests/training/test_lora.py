"""Updates with LoRA: nothing else changes, has gradients or moments, on one device and on a mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ares_jax.cold_start.sft import example, fine_tune
from ares_jax.metrics import read_jsonl
from ares_jax.models.lora import Lora, is_lora
from ares_jax.models.qwen2_5_vl.model import abstract_model, new_lora
from ares_jax.parallel.sharding import make_mesh, place_model
from ares_jax.params import to_flat
from ares_jax.run.run import open_run
from ares_jax.training import Update, initial_state, trainable
from ares_jax.training.log_probs import token_statistics
from configs.digits_cpu import get_config
from data_pipeline.packing import pack
from tests import digits

LORA = Lora(rank=4, alpha=8.0)


def segments(count):
    return [example(p, np.arange(20, 30, dtype=np.int32)) for p in digits.prompts(count)]


@functools.cache
def after_an_update(**mesh):
    """Returns the parameters before, state and metrics after an update of LoRA alone on two micro-batches."""
    model = abstract_model(digits.model().config, lora=LORA)
    place = place_model(model, make_mesh(**(mesh or {"devices": jax.devices()[:1]})))
    params = place.put(to_flat(digits.model()) | new_lora(model.config, 0, LORA))
    params = {name: value + 0.01 if name.endswith("_b") else value.copy() for name, value in params.items()}
    statistics = token_statistics(model, jnp.zeros(digits.VOCABULARY, bool))
    optimizer, trained = optax.chain(optax.trace(0.9), optax.sgd(1.0)), trainable(get_config().optimizer, lora=True)
    update = Update(lambda p, b: (-jnp.sum(b["weight"] * statistics(p, b)[0]) / 160, {}), optimizer, place, trained)
    before = jax.tree.map(np.array, params)
    batches = pack(segments(16), row_tokens=64, row_patches=48, rows=8)
    return before, *update(initial_state(params, optimizer, place, trained), batches)


def test_an_update_changes_lora_alone_and_only_it_has_moments():
    before, state, metrics = after_an_update()
    for name, value in before.items():
        assert np.array_equal(value, state.params[name]) != is_lora(name), name
    assert float(metrics["grad_norm"]) > 0
    moments = [leaf for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim]
    assert sum(leaf.size for leaf in moments) == sum(value.size for name, value in before.items() if is_lora(name))


def test_the_update_on_a_mesh_is_the_single_device_one():
    (_, state, metrics), (_, alone, expected) = after_an_update(fsdp=4, tensor=2), after_an_update()
    np.testing.assert_allclose(metrics["grad_norm"], expected["grad_norm"], rtol=1e-5)
    for mine, single in zip(jax.tree.leaves(state), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(mine, single, atol=1e-5)
    for name, parts in (("q_lora_a", 4), ("q_lora_b", 2), ("down_lora_a", 2), ("down_lora_b", 4)):  # and it is split
        value = state.params[f"text.layers.{name}"]
        assert value.addressable_shards[0].data.size * parts == value.size


class Batches:
    """The same batch again and again."""

    def __next__(self):
        return [example(p, np.arange(20, 30, dtype=np.int32), 0.5) for p in digits.prompts(4)]

    def get_state(self):
        return {"position": 0}

    def set_state(self, state):
        pass


@pytest.mark.parametrize("lora, stops", [(True, (2, 3)), (False, (1,))])
def test_fine_tuning_trains_lora_or_the_model_and_is_guided_by_where_it_began(tmp_path, lora, stops):
    """Also when it is cut off and goes on."""
    config = get_config()
    with config.unlocked():
        config.model.text.update(hidden_size=64, intermediate_size=96, num_layers=2, mrope_section=(2, 3, 3))
        config.packing.update(rows=4)
        config.cold_start.update(save_every=1)
        config.lora.rank = 2
    workspace = open_run(config, tmp_path, mesh=make_mesh(devices=jax.devices()[:1]))
    for steps in stops:
        fine_tune(
            workspace, "cold_start", workspace.initial_params, Batches(), steps=steps, learning_rate=1e-2, lora=lora,
            guided=lora,
        )  # fmt: skip
    start, end = workspace.initial_params(), workspace.params("cold_start")
    for name, value in start.items():
        frozen = name.startswith("visual.") or is_lora(name) != lora
        assert np.array_equal(value, end[name]) == frozen, name
    lines = read_jsonl(tmp_path / "cold_start" / "metrics.jsonl")
    assert all(0 <= line["padding"] < 1 and 0 <= line["time/data"] < line["time/step"] for line in lines)
    if lora:
        kl = [line["kl"] for line in lines]
        assert len(kl) == 3 and kl[0] < 1e-6 < min(kl[1:])
