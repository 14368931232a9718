"""Checkpoints in a bucket: read by ranges, written shard by shard, and nothing left where that fails."""

import os

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from ares_jax.checkpoints import load_hf, load_orbax, save_hf
from ares_jax.checkpoints.folders import PARTIAL, open_folder
from ares_jax.checkpoints.huggingface import HFFolder
from ares_jax.checkpoints.names import EMBEDDING, HEAD
from ares_jax.commands import convert
from ares_jax.commands.cli import _parse
from ares_jax.errors import UserError
from ares_jax.params import to_flat
from ares_jax.run.run import open_run
from configs import digits_cpu
from tests.checkpoints.bucket import mount
from tests.checkpoints.test_convert import UP, bits, edit, make_hf, run


@pytest.fixture(autouse=True)
def parsed_flags():
    flags.FLAGS.mark_as_parsed()


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "buckets").mkdir()
    return mount(monkeypatch, tmp_path / "buckets")


def files(folder):
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())


@pytest.mark.parametrize("variant", [{}, {"shards": 4, "old": True}], ids=str)
def test_through_a_bucket_and_back_every_way(tmp_path, bucket, variant):
    make_hf(tmp_path / "hf", **variant)
    hops = [("hf", "hf", "gs://b/deep/hf"), ("hf", "orbax", "gs://b/orbax"), ("orbax", "hf", str(tmp_path / "back"))]
    source = str(tmp_path / "hf")
    for from_, to, target in hops:
        run(**{"from": from_}, to=to, source=source, target=target, verify=True)
        source = target
    for found in (tmp_path / "back", tmp_path / "buckets/b/deep/hf"):
        assert bits(found) == bits(tmp_path / "hf")
        assert files(found) == [name for name in files(tmp_path / "hf") if name != "training_args.bin"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back", "buckets", "hf"]  # no local folder `gs:`
    assert not any(PARTIAL in name for name in files(tmp_path / "buckets"))
    assert bucket.written[-1].startswith("b/orbax/") and bucket.written[0] == f"b/deep/hf/{PARTIAL}"
    for load, folder in ((load_hf, "gs://b/deep/hf"), (load_orbax, "gs://b/orbax")):
        for name, value in to_flat(load_hf(tmp_path / "hf")).items():
            found = to_flat(load(folder))[name]
            np.testing.assert_array_equal(np.asarray(found).view(np.uint16), np.asarray(value).view(np.uint16), err_msg=name)


def test_what_is_there_stays_and_what_is_left_over_goes(tmp_path, bucket):
    make_hf(tmp_path / "hf", dtype=np.float32)
    there = {"from": "hf", "to": "hf", "source": str(tmp_path / "hf"), "target": "gs://b/new"}
    foreign = tmp_path / "buckets/b/new/thesis.txt"
    foreign.parent.mkdir(parents=True)
    foreign.write_text("mine")
    with pytest.raises(UserError, match="gs://b/new: is already there"):
        run(**there)
    with pytest.raises(UserError, match="gs://b/new: is already there, and a bucket knows no renaming"):
        save_hf(load_hf(tmp_path / "hf"), "gs://b/new")
    with pytest.raises(UserError, match="gs://empty: is a whole bucket; name a folder in it"):
        run(**there | {"target": "gs://empty"})
    assert files(tmp_path / "buckets") == ["b/new/thesis.txt"]
    (foreign.parent / PARTIAL).write_text("")  # now it is what a killed conversion left
    run(**there, verify=True)
    assert "b/new/thesis.txt" not in files(tmp_path / "buckets") and bits(foreign.parent) == bits(tmp_path / "hf")


@pytest.mark.parametrize("to", ["hf", "orbax"])
def test_a_failure_half_way_leaves_nothing_in_the_bucket(tmp_path, bucket, monkeypatch, to):
    make_hf(tmp_path / "hf", shards=3)
    real, calls = HFFolder.read, []

    def read(self, name):
        calls.append(name)
        if len(calls) == 40:
            assert files(tmp_path / "buckets")
            raise OSError(28, "No space left on device")
        return real(self, name)

    monkeypatch.setattr(HFFolder, "read", read)
    with pytest.raises(UserError, match="gs://b/new: cannot be written .No space left on device.; free space"):
        run(**{"from": "hf"}, to=to, source=str(tmp_path / "hf"), target="gs://b/new")
    assert len(calls) >= 40 and not files(tmp_path / "buckets")


def test_faults_in_a_bucket_are_named(tmp_path, bucket):
    folder = tmp_path / "buckets/b/hf"
    folder.parent.mkdir()
    make_hf(folder, dtype=np.float32)
    edit(folder, **{HEAD: np.ones((40, 16), np.float32)})
    with pytest.raises(UserError, match=f"gs://b/hf: {HEAD} differs from {EMBEDDING}"):
        HFFolder("gs://b/hf")
    edit(folder, **{HEAD: None, UP: np.ones((3, 16), np.float32)})
    with pytest.raises(UserError, match=f"gs://b/hf: tensor {UP} has shape"):
        HFFolder("gs://b/hf")
    edit(folder, **{UP: np.ones((24, 16), np.float32)})
    weights = HFFolder("gs://b/hf")
    os.truncate(folder / "model.safetensors", os.path.getsize(folder / "model.safetensors") - 10)
    last = max(weights._open["model.safetensors"].parts.items(), key=lambda item: item[1].end)[0]
    with pytest.raises(UserError, match=f"gs://b/hf: tensor {last} cannot be read .* bytes of .*copy the file again"):
        weights.read(last)
    with pytest.raises(UserError, match=f"gs://b/hf/model.safetensors: cannot be read .truncated at .* tensor {last} ends"):
        HFFolder("gs://b/hf")


def test_a_run_is_exported_into_a_bucket(tmp_path, bucket):
    config = digits_cpu.get_config()
    config.model.text.num_layers, config.cold_start.warmup_steps = 1, 0
    (tmp_path / "run").mkdir()
    workspace = open_run(config, tmp_path / "run")
    with flagsaver.flagsaver(stage="base", target="gs://b/export", verify=True):
        convert.main(config, tmp_path / "run")
    assert {"config.json", "tokenizer.json", "preprocessor_config.json"} <= set(files(tmp_path / "buckets/b/export"))
    expected, found = to_flat(workspace.load("base")), to_flat(load_hf("gs://b/export"))
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value)
    with flagsaver.flagsaver(stage="base", target="gs://b/export"), pytest.raises(UserError, match="is already there"):
        convert.main(config, tmp_path / "run")


@pytest.mark.parametrize(
    "name, message",
    [
        ("gs://b/x", "gs://b/x: Please install gcsfs.*pip install gcsfs"),
        ("http://b/x", "http://b/x: no file system is known for it; name a local folder, or gs://"),
    ],
)
def test_what_is_missing_for_a_bucket_is_said_in_one_line(tmp_path, monkeypatch, name, message):
    monkeypatch.setitem(__import__("sys").modules, "gcsfs", None)
    make_hf(tmp_path / "hf")
    for source, target in ((tmp_path / "hf", name), (name, tmp_path / "new")):
        with pytest.raises(UserError, match=message):
            run(**{"from": "hf"}, to="orbax", source=str(source), target=str(target))
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_a_bucket_that_cannot_be_reached(monkeypatch, bucket):
    def refused(*_, **__):
        raise RuntimeError("401, no login\nand more")

    monkeypatch.setattr(bucket, "exists", refused)
    with pytest.raises(UserError, match=r"^gs://b/x: cannot be reached \(401, no login\); log in"):
        open_folder("gs://b/x")


def test_what_cannot_be_in_a_bucket_says_so(tmp_path, bucket):
    with pytest.raises(UserError, match="--push_to uploads a local folder, not --target=gs://b/x"):
        run(**{"from": "hf"}, to="hf", source=str(tmp_path), target="gs://b/x", push_to="me/x")
    config = digits_cpu.get_config()
    config.model.pretrained = "gs://b/x"
    with pytest.raises(UserError, match="model.pretrained=gs://b/x: a run reads it from a folder; copy it with"):
        open_run(config, tmp_path)
    arguments = ["train", f"--config={digits_cpu.__file__}", "--workdir=gs://b/r"]
    with flagsaver.flagsaver(), pytest.raises(UserError, match="--workdir=gs://b/r: a run needs a folder.*mount the bucket"):
        _parse(arguments, False, False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["buckets"]
