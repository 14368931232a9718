"""Checkpoints with LoRA: they hold it beside the model's own weights, and whoever takes the model gets it merged."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from etils import epath

from ares_jax.checkpoints import load_hf
from ares_jax.checkpoints.orbax_params import OrbaxParams
from ares_jax.commands import convert
from ares_jax.errors import UserError
from ares_jax.models.lora import is_lora, merged
from ares_jax.params import to_flat
from ares_jax.run.run import open_run
from configs import digits_cpu


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with one checkpoint, split over 8 devices and so in several chunks a kernel; its config and parameters."""
    flags.FLAGS.mark_as_parsed()
    folder = tmp_path_factory.mktemp("run")
    config = digits_cpu.get_config()
    config.model.text.num_layers, config.lora.rank = 2, 3
    config.mesh.tensor = 2
    workspace = open_run(config, folder)
    keys = iter(jax.random.split(jax.random.key(0), 100))
    params = {n: jax.random.normal(next(keys), v.shape, v.dtype) for n, v in to_flat(workspace.model).items()}
    manager = workspace.checkpoints("aepo")
    manager.save(1, workspace.placement.put(params), {"m": jnp.zeros(2)}, {})
    manager.close()
    return folder, config, params


def test_the_export_is_the_merged_model(run, tmp_path):
    folder, config, params = run
    with flagsaver.flagsaver(target=str(tmp_path / "export"), verify=True):
        convert.main(config, folder)
    exported, workspace = to_flat(load_hf(tmp_path / "export")), open_run(config, folder)
    expected = dict(merged(params, workspace.model.lora))
    taken = to_flat(workspace.load("aepo")), workspace.host_params(workspace.params("aepo"))
    for name, value in expected.items():
        for found in (exported, *taken):
            np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-4, err_msg=name)
        assert np.array_equal(value, params[name]) != (name.endswith("_kernel") and ".layers." in name and "text" in name)
    assert all(set(found) == set(expected) for found in (exported, *taken))


def test_it_streams_layer_by_layer_in_several_chunks(run):
    folder, config, _ = run
    model = open_run(config, folder).model
    weights = OrbaxParams(epath.Path(folder / "checkpoints/aepo/1/params"), model.config, lora=model.lora)
    for name in ("text.layers.up_kernel", "text.layers.up_lora_a"):
        assert weights._stores[name].chunk_layout.read_chunk.shape[0] == 1
    shape = weights._stores["text.layers.up_kernel"].shape
    assert np.prod(weights._stores["text.layers.up_kernel"].chunk_layout.read_chunk.shape) == np.prod(shape[1:]) / 8


def test_a_pretrained_checkpoint_gets_fresh_factors(run, tmp_path):
    folder, config, _ = run
    with flagsaver.flagsaver(target=str(tmp_path / "export")):
        convert.main(config, folder)
    tuned = digits_cpu.get_config()
    tuned.model.pretrained, tuned.model.param_dtype = str(tmp_path / "export"), "bfloat16"
    tuned.cold_start.warmup_steps, tuned.lora.rank = 0, 5
    (tmp_path / "run").mkdir()
    workspace = open_run(tuned, tmp_path / "run")
    params, theirs = workspace.params("base"), to_flat(load_hf(tmp_path / "export", dtype=jnp.bfloat16))
    assert set(params) == set(to_flat(workspace.model)) and sum(map(is_lora, params)) == 14
    for name, value in params.items():
        assert value.sharding == workspace.placement.params[name]
        assert value.dtype == (jnp.float32 if is_lora(name) else jnp.bfloat16)
        assert not is_lora(name) or bool(value.any()) == name.endswith("_a")
    base = to_flat(workspace.load("base"))
    for name, value in theirs.items():
        np.testing.assert_array_equal(params[name], value)
        np.testing.assert_array_equal(base[name], value)


@pytest.mark.parametrize("rank", [0, 4])
def test_exporting_with_another_rank_than_the_checkpoints_is_refused(run, rank):
    folder, config, _ = run
    other = config.copy_and_resolve_references()
    other.lora.rank = rank
    with pytest.raises(UserError, match="lora"), flagsaver.flagsaver(target=str(folder / "other")):
        convert.main(other, folder)
    assert not (folder / "other").exists()
