"""The conversion command: bit for bit both ways, everything carried over, every fault named, nothing half-written."""

import gc
import json
import os
import re
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path
from unittest.mock import create_autospec

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from absl import flags
from absl.testing import flagsaver
from etils import epath
from huggingface_hub import CommitInfo, HfApi
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from ares_jax.checkpoints import load_hf, load_orbax, save_hf
from ares_jax.checkpoints.folders import replacing
from ares_jax.checkpoints.huggingface import HFFolder
from ares_jax.checkpoints.manager import Checkpoints
from ares_jax.checkpoints.names import EMBEDDING, HEAD, slots
from ares_jax.checkpoints.orbax_params import OrbaxParams, open_converted, write_orbax
from ares_jax.checkpoints.tensor_file import TensorFile
from ares_jax.checkpoints.verify import verify
from ares_jax.checkpoints.weights import Budget
from ares_jax.commands import convert
from ares_jax.errors import UserError
from ares_jax.models.qwen2_5_vl import Qwen25VLConfig, TextConfig, VisionConfig
from ares_jax.parallel.sharding import make_mesh
from ares_jax.params import to_flat
from ares_jax.run.run import Run, open_run
from configs import digits_cpu

CONFIG = Qwen25VLConfig(TextConfig(40, 16, 24, 3, 4, 2, (1, 0, 1)), VisionConfig(8, 12, 2, 2, (1,)), 1, 2, 3, 4)
ROOT = Path(__file__).parents[2]
SIDE_FILES = ("tokenizer.json", "preprocessor_config.json", "generation_config.json", "chat_template.jinja", "LICENSE")


@pytest.fixture(autouse=True)
def parsed_flags():
    flags.FLAGS.mark_as_parsed()


def run(**given_flags):
    with flagsaver.flagsaver(**given_flags):
        convert.main(None, None)


def there_and_back(tmp_path, **more):
    run(**{"from": "hf"}, to="orbax", source=str(tmp_path / "hf"), target=str(tmp_path / "orbax"), verify=True)
    run(**{"from": "orbax"}, to="hf", source=str(tmp_path / "orbax"), target=str(tmp_path / "back"), verify=True, **more)


def random_bits(shape, dtype, rng):
    """Any bits at all: NaNs with payloads, infinities, both zeros."""
    return np.frombuffer(rng.bytes(int(np.prod(shape)) * np.dtype(dtype).itemsize), dtype).reshape(shape)


def make_hf(folder, *, dtype=jnp.bfloat16, old=False, tied=True, shards=1, stored_head=False, norms=None, seed=0):
    """Writes a folder with every file that a published checkpoint has; returns its tensors."""
    rng = np.random.default_rng(seed)
    config = CONFIG if tied else Qwen25VLConfig(CONFIG.text, CONFIG.vision, 1, 2, 3, 4, tie_word_embeddings=False)
    tensors = {}
    for name, slot in slots(config).items():
        if old:
            name = name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")
        tensors[name] = random_bits(slot.shape, norms if norms and "norm" in name else dtype, rng)
    if stored_head:
        tensors[HEAD] = tensors[EMBEDDING]
    folder.mkdir()
    names = sorted(tensors)
    files = {f"model-{i + 1:05d}-of-{shards:05d}.safetensors": names[i::shards] for i in range(shards)}
    if shards == 1:
        files = {"model.safetensors": names}
    else:
        index = {"metadata": {"total_size": 123, "by": "someone"}}
        index["weight_map"] = {name: file for file, names in files.items() for name in names}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for file, names in files.items():
        save_file({name: tensors[name] for name in names}, folder / file, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**config.to_hf(), "torch_dtype": "bfloat16", "own": [1]}))
    for name in SIDE_FILES:
        (folder / name).write_text(f"{name} é")
    (folder / "training_args.bin").write_bytes(b"a pickle")
    return tensors


def bits(folder):
    """Every tensor by file and name, as type, shape and bytes."""
    return {
        (file.name, name): (str(t.dtype), t.shape, t.tobytes())
        for file in folder.glob("*.safetensors") for name, t in load_file(file).items()
    }  # fmt: skip


@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"dtype": np.float32, "tied": False, "shards": 3},
        {"old": True, "shards": 4},
        {"stored_head": True},
        {"norms": np.float32, "old": True, "tied": False},
        {"dtype": np.float16},
    ],
    ids=str,
)
def test_there_and_back_is_bit_identical(tmp_path, variant):
    make_hf(tmp_path / "hf", **variant)
    there_and_back(tmp_path)
    assert bits(tmp_path / "back") == bits(tmp_path / "hf")
    carried = ["config.json", *SIDE_FILES, *(["model.safetensors.index.json"] if "shards" in variant else [])]
    for name in carried:
        before, after = ((tmp_path / folder / name).read_text() for folder in ("hf", "back"))
        assert json.loads(before) == json.loads(after) if "index" in name else before == after
    assert {file.name for file in (tmp_path / "back").iterdir()} == {
        *carried,
        *(file for file, _ in bits(tmp_path / "back")),
    }
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back", "hf", "orbax"]


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 5), st.sampled_from([jnp.bfloat16, np.float32]), st.integers(1, 20))
def test_there_and_back_of_any_bits_in_any_shards(tmp_path_factory, seed, shards, dtype, kilobytes):
    tmp_path = tmp_path_factory.mktemp("any")
    tensors = make_hf(tmp_path / "hf", seed=seed, shards=shards, dtype=dtype)
    there_and_back(tmp_path, max_shard_size=f"{kilobytes}KB")
    written = bits(tmp_path / "back")
    assert {name: t[2] for (_, name), t in written.items()} == {name: t.tobytes() for name, t in tensors.items()}
    sizes = {}
    for (file, _), tensor in written.items():
        sizes.setdefault(file, []).append(len(tensor[2]))
    assert all(sum(parts) <= 1000 * kilobytes or len(parts) == 1 for parts in sizes.values())
    assert verify(HFFolder(tmp_path / "hf"), HFFolder(tmp_path / "back")) == len(tensors)


def test_the_orbax_folder_restores_as_the_model(tmp_path):
    make_hf(tmp_path / "hf", old=True, dtype=np.float32)
    run(**{"from": "hf"}, to="orbax", source=str(tmp_path / "hf"), target=str(tmp_path / "orbax"))
    expected = to_flat(load_hf(tmp_path / "hf"))
    mesh = make_mesh(fsdp=4, tensor=2)
    plain = ocp.StandardCheckpointer().restore(tmp_path / "orbax" / "params", expected)
    for found in (plain, to_flat(load_orbax(tmp_path / "orbax")), to_flat(load_orbax(tmp_path / "orbax", mesh=mesh))):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_array_equal(found[name], value)
    assert len(found["text.layers.up_kernel"].sharding.device_set) == 8
    assert to_flat(load_orbax(tmp_path / "orbax", dtype=jnp.bfloat16))["text.norm"].dtype == jnp.bfloat16


UP = "model.language_model.layers.1.mlp.up_proj.weight"


def edit(folder, **changes):
    file = folder / "model.safetensors"
    tensors = {**load_file(file), **changes}
    save_file({name: t for name, t in tensors.items() if t is not None}, file)


FAULTS = {
    f"{UP} is missing": lambda f: edit(f, **{UP: None}),
    f"{UP} has shape .3, 16. here, config.json says .24, 16.": lambda f: edit(f, **{UP: np.ones((3, 16), np.float32)}),
    "1 tensors do not belong to Qwen2.5-VL, the first is model.extra": lambda f: edit(f, **{"model.extra": np.ones(2)}),
    f"model.layers.1.mlp.up_proj.weight and {UP}|{UP} and model.layers.1.* are the same": lambda f: edit(
        f, **{UP.replace("language_model.", ""): np.ones((24, 16), np.float32)}
    ),
    "tensor model.extra is I64; only F32": lambda f: edit(f, **{"model.extra": np.ones(2, np.int64)}),
    r"model.safetensors: cannot be read \(a header of .* in a file of 5,000\); it is truncated": lambda f: os.truncate(
        f / "model.safetensors", 5000
    ),
    rf"model.safetensors: cannot be read \(truncated at byte [\d,]+: tensor {UP} ends at [\d,]+\)": lambda f: os.truncate(
        f / "model.safetensors", TensorFile(epath.Path(f / "model.safetensors")).parts[UP].end - 1
    ),
    "lm_head.weight differs from .*set tie_word_embeddings": lambda f: edit(f, **{HEAD: np.ones((40, 16), np.float32)}),
    "no .safetensors file, only pytorch_model.bin, a pickle, which is never opened": lambda f: (
        f / "model.safetensors"
    ).rename(f / "pytorch_model.bin"),
    "config.json: no such file": lambda f: (f / "config.json").unlink(),
}


@pytest.mark.parametrize("message", FAULTS)
def test_a_fault_is_named_and_nothing_is_written(tmp_path, message):
    make_hf(tmp_path / "hf", dtype=np.float32)
    FAULTS[message](tmp_path / "hf")
    with pytest.raises(UserError, match=message):
        run(**{"from": "hf"}, to="orbax", source=str(tmp_path / "hf"), target=str(tmp_path / "orbax"))
    with pytest.raises(UserError, match=message):
        load_hf(tmp_path / "hf")
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_a_shard_or_a_tensor_of_the_index_that_is_not_there(tmp_path):
    make_hf(tmp_path / "hf", shards=3)
    index = tmp_path / "hf" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.other"] = "model-00002-of-00003.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(UserError, match="model.other is missing, though the index lists it"):
        HFFolder(tmp_path / "hf")
    (tmp_path / "hf" / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match="model-00002-of-00003.safetensors is listed in the index but not there"):
        HFFolder(tmp_path / "hf")


@pytest.mark.parametrize("to", ["hf", "orbax"])
def test_a_failure_half_way_leaves_nothing(tmp_path, monkeypatch, to):
    make_hf(tmp_path / "hf", shards=3)
    (tmp_path / ".new.partial" / "left by a killed run").mkdir(parents=True)
    real, calls = HFFolder.read, []

    def read(self, name):
        calls.append(name)
        if len(calls) == 40:
            raise OSError(28, "No space left on device")
        return real(self, name)

    monkeypatch.setattr(HFFolder, "read", read)
    with pytest.raises(UserError, match="new: cannot be written .No space left on device.; free space"):
        run(**{"from": "hf"}, to=to, source=str(tmp_path / "hf"), target=str(tmp_path / "new"))
    assert len(calls) >= 40 and [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_verify_names_the_first_tensor_that_differs(tmp_path):
    make_hf(tmp_path / "hf")
    run(**{"from": "hf"}, to="orbax", source=str(tmp_path / "hf"), target=str(tmp_path / "orbax"))
    flipped = load_file(tmp_path / "hf" / "model.safetensors")[UP].copy()
    flipped.view(np.uint16)[2, 5] ^= 0x8000  # the sign alone: of a zero or a NaN, values would not show it
    edit(tmp_path / "hf", **{UP: flipped})
    with pytest.raises(UserError, match=rf"tensor {UP} differs, first at \(2, 5\)"):
        run(**{"from": "hf"}, to="orbax", source=str(tmp_path / "hf"), target=str(tmp_path / "orbax"), verify=True)
    edit(tmp_path / "hf", **{UP: flipped.astype(np.float32)})
    with pytest.raises(UserError, match=f"tensor {UP} differs: float32 .24, 16. and bfloat16"):
        verify(HFFolder(tmp_path / "hf"), open_converted(tmp_path / "orbax"))
    edit(tmp_path / "hf", **{UP: flipped, HEAD: load_file(tmp_path / "hf" / "model.safetensors")[EMBEDDING]})
    with pytest.raises(UserError, match="tensor lm_head.weight is in .*hf only"):
        verify(open_converted(tmp_path / "orbax"), HFFolder(tmp_path / "hf"))


def test_a_damaged_orbax_folder_is_named(tmp_path):
    make_hf(tmp_path / "hf")
    write_orbax(HFFolder(tmp_path / "hf"), epath.Path(tmp_path / "orbax"))
    shutil.copy(tmp_path / "hf" / "config.json", tmp_path / "orbax")
    description = tmp_path / "orbax" / "huggingface.json"
    content = json.loads(description.read_text())
    content["tensors"][UP]["file"] = "../evil.safetensors"
    description.write_text(json.dumps(content))
    with pytest.raises(UserError, match="'../evil.safetensors' is no file name"):
        run(**{"from": "orbax"}, to="hf", source=str(tmp_path / "orbax"), target=str(tmp_path / "back"))
    for file in (tmp_path / "orbax" / "params").rglob("d/*"):
        os.truncate(file, 10)
    with pytest.raises(UserError, match="cannot be read|no readable"):
        weights = open_converted(tmp_path / "orbax")
        weights.read(UP)
    with pytest.raises(UserError, match="cannot be read|no readable"):
        load_orbax(tmp_path / "orbax")
    description.unlink()
    with pytest.raises(UserError, match="no huggingface.json in it"):
        open_converted(tmp_path / "orbax")
    assert not (tmp_path / "back").exists() and not (tmp_path / "evil.safetensors").exists()


@pytest.mark.parametrize("to", ["hf", "orbax"])
def test_memory_stays_below_a_shard_and_a_half_and_a_tensor(tmp_path, monkeypatch, to):
    text = TextConfig(1000, 256, 512, 16, 4, 2, (16, 8, 8))
    monkeypatch.setitem(globals(), "CONFIG", Qwen25VLConfig(text, CONFIG.vision, 1, 2, 3, 4))
    tensors = make_hf(tmp_path / "hf", dtype=np.float32, shards=12)
    total, largest = sum(t.nbytes for t in tensors.values()), max(t.nbytes for t in tensors.values())
    shard = max(file.stat().st_size for file in (tmp_path / "hf").glob("*.safetensors"))
    source = tmp_path / "hf"
    if to == "hf":
        run(**{"from": "hf"}, to="orbax", source=str(source), target=str(tmp_path / "orbax"))
        source = tmp_path / "orbax"
    del tensors
    tracemalloc.start()
    run(**{"from": source.name}, to=to, source=str(source), target=str(tmp_path / "new"), verify=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.5 * shard + largest < total / 2, (peak, shard, largest, total)


def test_a_budget_bounds_what_is_in_flight():
    budget = Budget(10)
    with budget.take(4), budget.take(6):
        assert budget._free == 0
    with budget.take(99):  # more than there is: alone, not never
        assert budget._free == 0
    assert budget._free == 10


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run with two steps of each stage, the first one the better; and its config and parameters by step."""
    folder = tmp_path_factory.mktemp("run")
    config = digits_cpu.get_config()
    config.model.text.num_layers = 2
    workspace = open_run(config, folder)
    params = {}
    for number, name in enumerate(("cold_start", "aepo")):
        manager = Checkpoints(folder / "checkpoints" / name)
        for step in (3, 7):
            keys = iter(jax.random.split(jax.random.key(10 * number + step), 100))
            params[name, step] = {
                n: jax.random.normal(next(keys), v.shape, v.dtype) for n, v in to_flat(workspace.model).items()
            }
            manager.save(step, params[name, step], {"m": jnp.zeros(2)}, {}, score=1 / step)
        manager.close()
    return folder, config, params


@pytest.mark.parametrize(
    "chosen, expected",
    [
        ({}, ("aepo", 7)),
        ({"step": "best"}, ("aepo", 3)),
        ({"stage": "cold_start", "step": "3"}, ("cold_start", 3)),
        ({"stage": "cold_start", "max_shard_size": "100KB"}, ("cold_start", 7)),
    ],
    ids=str,
)
def test_any_training_checkpoint_is_exported(workdir, tmp_path, chosen, expected):
    folder, config, params = workdir
    for _ in range(2):  # the second time over the first
        with flagsaver.flagsaver(**chosen, target=str(tmp_path / "export"), verify=True):
            convert.main(config, folder)
        (tmp_path / "export" / "README.md").write_text("mine")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["export"]
    loaded = to_flat(load_hf(tmp_path / "export"))
    for name, value in params[expected].items():
        np.testing.assert_array_equal(loaded[name], value)
    names = {p.name for p in (tmp_path / "export").iterdir()}
    assert {"tokenizer.json", "preprocessor_config.json", "config.json", "README.md"} <= names
    assert ("model.safetensors.index.json" in names) == ("max_shard_size" in chosen)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_chunk_that_is_damaged_is_named_by_its_tensor(tmp_path):
    """What lists the chunks is whole, so the folder opens; the chunks are cut short."""
    make_hf(tmp_path / "hf", dtype=np.float32)
    run(**{"from": "hf"}, to="orbax", source=str(tmp_path / "hf"), target=str(tmp_path / "orbax"))
    for data in (tmp_path / "orbax" / "params" / "ocdbt.process_0" / "d").iterdir():
        os.truncate(data, 10)
    open_converted(tmp_path / "orbax")
    with pytest.raises(UserError, match=r"params: tensor [\w.]+\.(weight|bias) cannot be read \(.*\); copy it again"):
        load_orbax(tmp_path / "orbax")
    gc.collect()  # Orbax leaves the reads of other arrays pending


@pytest.mark.parametrize("stored, computed, chosen, written", [
    ("float32", "bfloat16", {}, "bfloat16"),  # as the configs of 3B and 7B
    ("float32", "bfloat16", {"dtype": "keep", "max_shard_size": "100KB"}, "float32"),
    ("float32", "float32", {"dtype": "bfloat16", "max_shard_size": "100KB"}, "bfloat16"),
    ("bfloat16", "float32", {}, "bfloat16"),
])  # fmt: skip
def test_a_run_is_written_in_the_type_it_computes_in(workdir, tmp_path, capsys, stored, computed, chosen, written):
    folder, config, params = workdir
    other = config.copy_and_resolve_references()
    other.model.dtype = computed
    if stored == "bfloat16":  # of which there is a run, too
        shutil.copytree(folder, tmp_path / "run")
        folder = tmp_path / "run"
        shutil.rmtree(folder / "checkpoints" / "aepo")
        manager = Checkpoints(folder / "checkpoints" / "aepo")
        manager.save(7, {n: v.astype(jnp.bfloat16) for n, v in params["aepo", 7].items()}, {"m": jnp.zeros(2)}, {})
        manager.close()
    with flagsaver.flagsaver(**chosen, target=str(tmp_path / "export"), verify=True):
        convert.main(other, folder)
    assert ("are the source's in bfloat16, bit" in capsys.readouterr().out) == (stored != written)
    assert json.loads((tmp_path / "export" / "config.json").read_text())["dtype"] == written
    for name, value in to_flat(load_hf(tmp_path / "export")).items():
        assert value.dtype == jnp.dtype(written)
        np.testing.assert_array_equal(value, params["aepo", 7][name].astype(written), err_msg=name)
    if "max_shard_size" in chosen:
        index = json.loads((tmp_path / "export" / "model.safetensors.index.json").read_text())
        sizes = [load_file(file).values() for file in (tmp_path / "export").glob("*.safetensors")]
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for part in sizes for tensor in part)
    flipped = next((tmp_path / "export").glob("*.safetensors"))
    flipped.write_bytes(flipped.read_bytes()[:-1] + b"\x17")
    with flagsaver.flagsaver(**chosen), pytest.raises(UserError, match="tensor .* differs, first at"):
        weights, _ = convert._stage_weights(open_run(other, folder, read_only=True), "aepo", "7")
        verify(convert._as(written, weights), HFFolder(tmp_path / "export"))


@pytest.mark.parametrize("to", ["hf", "orbax"])
def test_a_folder_is_converted_into_another_type(tmp_path, to):
    tensors = make_hf(tmp_path / "hf", dtype=np.float16, shards=3)
    flags_ = {"from": "hf", "to": to, "source": str(tmp_path / "hf"), "target": str(tmp_path / "new"), "verify": True}
    run(**flags_, dtype="float32")
    found = (HFFolder if to == "hf" else open_converted)(tmp_path / "new")
    assert set(found.entries) == set(tensors)
    for name, value in tensors.items():
        assert found.entries[name].dtype == np.float32
        np.testing.assert_array_equal(found.read(name), value.astype(np.float32))
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    assert config["torch_dtype"] == "float32" and config["own"] == [1]
    with pytest.raises(UserError, match="tensor .* differs: float16 .* and float32"):
        run(**flags_)
    if to == "hf":
        index = json.loads((tmp_path / "new" / "model.safetensors.index.json").read_text())
        assert index["metadata"] == {"total_size": sum(2 * value.nbytes for value in tensors.values())}


KILLED = """
import os, sys
from etils import epath
from ares_jax.checkpoints.folders import replacing
kind = type(epath.Path("x"))
rename, count = kind.rename, 0
def dying(self, target):
    global count
    count += 1
    if count == int(sys.argv[2]):
        os.kill(os.getpid(), 9)
    return rename(self, target)
kind.rename = dying
with replacing(epath.Path(sys.argv[1])) as folder:
    (folder / "new").write_text("whole")
"""


@pytest.mark.parametrize("at, left", [(1, "old"), (2, "new")])
def test_a_kill_at_either_renaming_loses_nothing(tmp_path, at, left):
    """Before the first the old folder stands; between the two none does, and the next run puts the new one there."""
    folder = epath.Path(tmp_path / "export")
    folder.mkdir()
    (folder / "old").write_text("whole")
    done = subprocess.run([sys.executable, "-c", KILLED, folder, str(at)], cwd=ROOT)
    assert done.returncode == -9 and folder.exists() == (at == 1)
    with pytest.raises(ZeroDivisionError), replacing(folder):
        raise ZeroDivisionError  # a next run that comes to nothing
    assert [file.name for file in folder.iterdir()] == [left]
    assert [p.name for p in tmp_path.iterdir()] == ["export"]


def test_an_error_at_the_second_renaming_brings_the_old_folder_back(tmp_path, monkeypatch):
    folder = epath.Path(tmp_path / "export")
    folder.mkdir()
    (folder / "old").write_text("whole")
    real = type(folder).rename

    def rename(self, target):
        if self.name.endswith(".partial"):
            raise OSError(5, "Input/output error")
        return real(self, target)

    monkeypatch.setattr(type(folder), "rename", rename)
    with pytest.raises(UserError, match="export: cannot be written .Input/output error"), replacing(folder) as new:
        (new / "new").write_text("whole")
    assert [file.name for file in folder.iterdir()] == ["old"] and [p.name for p in tmp_path.iterdir()] == ["export"]


def test_a_run_of_a_larger_mesh_is_exported_by_one_device_and_stays_as_it_is(tmp_path, workdir):
    folder, config, _ = workdir
    before = (folder / "config.json").read_text()
    larger = digits_cpu.get_config()
    larger.update(config)
    larger.mesh.update(fsdp=4, tensor=16)  # more devices than there are here
    with flagsaver.flagsaver(target=str(tmp_path / "export")):
        convert.main(larger, folder)
    assert (tmp_path / "export" / "model.safetensors").is_file()
    assert (folder / "config.json").read_text() == before


def test_a_run_from_pretrained_weights_keeps_their_files(tmp_path, workdir, monkeypatch):
    folder, config, _ = workdir
    with flagsaver.flagsaver(target=str(tmp_path / "base")):
        convert.main(config, folder)
    (tmp_path / "base" / "generation_config.json").write_text('{"top_k": 7}')
    run(**{"from": "hf"}, to="orbax", source=str(tmp_path / "base"), target=str(tmp_path / "orbax"))
    for pretrained in ("base", "orbax"):
        tuned = digits_cpu.get_config()
        tuned.model.pretrained, tuned.model.param_dtype = str(tmp_path / pretrained), "bfloat16"
        tuned.cold_start.warmup_steps = 0
        (tmp_path / f"run_{pretrained}").mkdir()
        monkeypatch.setattr(Run, "load", lambda *_: pytest.fail("the whole model in memory"))
        with flagsaver.flagsaver(stage="base", verify=True):
            convert.main(tuned, tmp_path / f"run_{pretrained}")
        export = tmp_path / f"run_{pretrained}" / "export"
        assert (export / "generation_config.json").read_text() == '{"top_k": 7}'
        assert json.loads((export / "config.json").read_text())["dtype"] == "bfloat16"
        for name, value in to_flat(load_hf(tmp_path / "base", dtype=jnp.bfloat16)).items():
            np.testing.assert_array_equal(to_flat(load_hf(export))[name], value)


def test_training_checkpoints_are_chunked_by_layer_so_that_exporting_streams(workdir):
    folder, config, _ = workdir
    weights = OrbaxParams(epath.Path(folder / "checkpoints/aepo/7/params"), open_run(config, folder).model.config)
    for name in ("text.layers.up_kernel", "visual.layers.qkv_kernel"):
        assert weights._stores[name].chunk_layout.read_chunk.shape[0] == 1 < weights._stores[name].shape[0]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--from=hf"], "give --from, --to, --source and --target to convert a folder"),
        (["--from=pt"], "value should be one of <hf|orbax>"),
        (["--from=hf", "--to=orbax", "--source={}", "--target={}/hf"], "is already there"),
        (["--from=hf", "--to=orbax", "--source={}/hf", "--target={}/o", "--push_to=me/x"], "use --to=hf"),
        (["--from=orbax", "--to=hf", "--source={}/hf", "--target={}/o"], "no huggingface.json in it"),
        (
            ["--from=hf", "--to=hf", "--source={}/hf", "--target={}/o", "--max_shard_size=x"],
            "--max_shard_size=x: not a size",
        ),
    ],
)
def test_the_command_says_what_is_wrong_in_one_line(tmp_path, arguments, message):
    make_hf(tmp_path / "hf")
    arguments = [a.format(tmp_path) for a in arguments]
    with pytest.raises((UserError, flags.Error), match=re.escape(message)):
        with flagsaver.flagsaver():
            flags.FLAGS(["convert", *arguments])
            convert.main(None, None)
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_the_command_itself_prints_nothing_but_its_result(tmp_path):
    make_hf(tmp_path / "hf")
    arguments = ["--from=hf", "--to=orbax", f"--source={tmp_path}/hf", f"--target={tmp_path}/orbax", "--verify"]
    done = subprocess.run([sys.executable, "-m", "ares_jax.convert", *arguments], capture_output=True, text=True)
    assert done.returncode == 0 and "bit for bit" in done.stdout and not done.stderr


def test_the_best_step_outlives_a_restart(tmp_path):
    params = {"a": np.zeros(2)}
    for step, score in ((1, 0.9), (2, None), (3, 0.5), (4, 0.6), (5, None)):
        manager = Checkpoints(tmp_path / "c", keep=2)
        manager.save(step, params, params, {}, score=score)
        manager.wait()
        manager.close()
    manager = Checkpoints(tmp_path / "c", keep=2)
    assert manager.steps() == [1, 4, 5] and manager.best() == 1 and manager.latest() == 5


def test_a_step_that_is_not_there(workdir):
    folder, config, _ = workdir
    with flagsaver.flagsaver(step="5"), pytest.raises(UserError, match="--step=5: no such step in .* one of 3, 7"):
        convert.main(config, folder)


def test_push(tmp_path, monkeypatch):
    hub = create_autospec(HfApi, instance=True)
    hub.upload_folder.return_value = CommitInfo("https://huggingface.co/me/model/commit/1", "m", "d", "1")
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    make_hf(tmp_path / "hf")
    flags_ = {"from": "hf", "to": "hf", "source": str(tmp_path / "hf")}
    run(**flags_, target=str(tmp_path / "a"), push_to="me/model")
    hub.create_repo.assert_called_once_with("me/model", exist_ok=True, private=True)
    (given,) = hub.upload_folder.call_args_list
    assert given.kwargs["repo_id"] == "me/model" and os.fspath(given.kwargs["folder_path"]) == str(tmp_path / "a")
    hub.create_repo.side_effect = OSError("no token")
    with pytest.raises(UserError, match="me/refused: no token; the folder .* is complete"):
        run(**flags_, target=str(tmp_path / "b"), push_to="me/refused")
    assert hub.upload_folder.call_count == 1


def test_save_hf_is_whole_or_not_at_all(tmp_path, monkeypatch):
    make_hf(tmp_path / "hf", dtype=np.float32)
    before = bits(tmp_path / "hf")
    model = load_hf(tmp_path / "hf")
    with monkeypatch.context() as patch:
        patch.setattr("ares_jax.checkpoints.huggingface.write_config", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            save_hf(model, tmp_path / "hf")
    assert bits(tmp_path / "hf") == before and [p.name for p in tmp_path.iterdir()] == ["hf"]
