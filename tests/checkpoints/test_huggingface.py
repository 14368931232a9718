"""Hugging Face folders: bit for bit, both layouts, and clear errors."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ares_jax.checkpoints import huggingface, load_hf, save_hf
from ares_jax.errors import UserError
from ares_jax.parallel.sharding import make_mesh
from ares_jax.params import to_flat
from tests import digits


@pytest.fixture
def folder(tmp_path):
    save_hf(digits.model(), tmp_path / "hf")
    return tmp_path / "hf"


def assert_same(model):
    for name, value in to_flat(digits.model()).items():
        np.testing.assert_array_equal(to_flat(model)[name], value)


def test_round_trip_is_bit_identical_also_in_shards_and_on_a_mesh(folder, monkeypatch, tmp_path):
    assert_same(load_hf(folder))
    assert_same(load_hf(folder, mesh=make_mesh(fsdp=4, tensor=2)))
    monkeypatch.setattr(huggingface, "SHARD_BYTES", 100_000)
    (folder / "tokenizer.json").write_text("{}")
    save_hf(digits.model(), folder)
    assert (folder / "model.safetensors.index.json").exists() and not (folder / "model.safetensors").exists()
    assert (folder / "tokenizer.json").exists()
    assert_same(load_hf(folder))
    save_hf(load_hf(folder, dtype=jnp.bfloat16), tmp_path / "b")
    save_hf(load_hf(tmp_path / "b"), tmp_path / "c")
    first, second = (load_file_bits(tmp_path / name) for name in "bc")
    assert first == second


def load_file_bits(folder):
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}


def test_the_older_key_layout_loads_too(folder):
    tensors = load_file(folder / "model.safetensors")
    old = {n.replace("model.language_model.", "model.").replace("model.visual.", "visual."): t for n, t in tensors.items()}
    save_file(old, folder / "model.safetensors")
    assert_same(load_hf(folder))


def test_what_is_wrong_is_named(folder, tmp_path):
    file = folder / "model.safetensors"
    good = load_file(file)
    name = "model.language_model.layers.1.mlp.up_proj.weight"
    for change, message in (
        ({name: None}, f"{name} is missing"),
        ({name: good[name][:3]}, f"{name} has shape"),
        ({"model.extra": good[name]}, "first is model.extra"),
    ):
        save_file({n: t for n, t in {**good, **change}.items() if t is not None}, file)
        with pytest.raises(UserError, match=message):
            load_hf(folder)
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(UserError, match="truncated"):
        load_hf(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(UserError, match="model_type is 'llama'"):
        load_hf(folder)
    with pytest.raises(UserError, match="no such file"):
        load_hf(tmp_path / "nowhere")
