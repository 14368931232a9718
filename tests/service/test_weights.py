"""Weights out of a body, a file or a checkpoint: whole, from allowed places only, and what is in flight meanwhile."""

import json
import os
from pathlib import Path

import httpx
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from etils import epath
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save

from ares_jax.checkpoints.manager import Checkpoints
from ares_jax.errors import UserError
from ares_jax.service import weight_files as weights
from ares_jax.service.client import RolloutClient
from ares_jax.service.shared_memory import file_in, shared_folder
from ares_jax.service.worker import Worker
from tests.sampling.test_scheduler import new_engine, request
from tests.service import fake
from tests.service.test_pieces import PAGES, REQUESTS

SPECS = fake.FakeEngine().weight_specs()


def stored(value=1.0, kind=np.float32):
    return {"w": np.full((3, 2), value, kind)}


def test_a_body_holds_floats_of_any_type():
    for kind in (np.float32, np.float16, np.float64, ml_dtypes.bfloat16):
        (name, value), *others = weights.from_bytes(save(stored(1.5, kind))).items()
        assert name == "w" and value.dtype == kind and (value == 1.5).all() and not others
    with pytest.raises(UserError, match="tensor w is I64; only F32"):
        weights.from_bytes(save(stored(1, np.int64)))


@given(st.binary(max_size=40) | st.builds(lambda cut: save(stored())[:cut], st.integers(0, 90)))
def test_other_bytes_are_refused_in_one_line(body):
    with pytest.raises(UserError, match="no safetensors file"):
        weights.from_bytes(body)


def test_nothing_outside_the_roots_is_looked_at(tmp_path, monkeypatch):
    inside, outside = tmp_path / "in", tmp_path / "out"
    for folder in (inside, outside):
        folder.mkdir()
        (folder / "a.safetensors").write_bytes(save(stored()))
    (inside / "link").symlink_to(outside)
    (tmp_path / "root").symlink_to(inside)
    for uri in ("a.safetensors", "sub/../a.safetensors"):
        assert weights.find(str(inside / uri), [inside]) == inside / "a.safetensors"
    assert weights.find(f"file://{inside}/a%2Esafetensors", [outside, tmp_path / "root"]) == inside / "a.safetensors"
    bad = [outside / "a.safetensors", outside / "absent", inside / ".." / "out", inside / "link" / "a.safetensors",
           "/", "", "..", f"file://{outside}/a.safetensors", f"file://{inside}/%2e%2e/out", f"{inside}2/x"]  # fmt: skip
    for uri in bad:
        with pytest.raises(PermissionError, match="sampler.weight_roots"):
            weights.find(str(uri), [inside])
    for uri in ("http://host/a", f"file://host{inside}", "gs://bucket/a", "file://[", "/a\0b", "\ud800"):
        with pytest.raises((UserError, PermissionError)):
            weights.find(uri, [inside])
    with pytest.raises(UserError, match="not there"):
        weights.find(str(inside / "absent"), [inside])
    with pytest.raises(PermissionError):
        weights.find(str(inside / "a.safetensors"), [])


def test_a_bucket_is_a_root_too_and_nothing_in_a_name_leads_out_of_it(tmp_path, monkeypatch):
    roots = [tmp_path, epath.Path("gs://bucket/runs/"), epath.Path("gs://other")]
    for uri in ("gs://bucket/runs/mine/7/params", "gs://other/a.b=c"):
        assert weights.find(uri, roots).as_posix() == uri
    for uri in ("gs://bucket/secret", "gs://bucket/runs", "gs://bucket/runs2/x", "gs://bucket/runs/../secret", "gs://x/a",
                "gs://bucket/runs//x", "gs://bucket/runs/%2e%2e/secret", "gs://bucket/runs/./x", "gs://bucket/runs/.x",
                "gs://bucket/runs/a?b", "gs://bucket/runs/a#b", "GS://bucket/runs/a\\..", "gs://"):  # fmt: skip
        with pytest.raises(PermissionError, match="sampler.weight_roots"):
            weights.find(uri, roots)
    for uri in ("s3://bucket/runs/x", "http://bucket/runs/x"):
        with pytest.raises(UserError, match="a weight root's"):
            weights.find(uri, roots)
    read = []
    monkeypatch.setattr(weights, "read", lambda path, specs: read.append(path.as_posix()) or stored(5))
    engine = fake.FakeEngine()
    with fake.serving(engine, weight_roots=roots) as url:
        answer = httpx.post(f"{url}/v1/weights", json={"uri": "gs://bucket/runs/mine/7", "version": 4})
    assert answer.json() == {"policy_version": 4} and (engine.weights["w"] == 5).all()
    assert read == ["gs://bucket/runs/mine/7"]


def test_files_and_checkpoints_are_read_and_must_fit(tmp_path):
    (tmp_path / "w.safetensors").write_bytes(save(stored(2)))
    manager = Checkpoints(tmp_path / "aepo")
    manager.save(5, {"w": jnp.full((3, 2), 3.0)}, {"m": jnp.zeros(1)}, {})
    manager.save(6, {"w": jnp.full((2, 3), 3.0)}, {"m": jnp.zeros(1)}, {})
    manager.wait()
    manager.close()
    for path, value in (("w.safetensors", 2), ("aepo/5", 3), ("aepo/5/params", 3)):
        assert (np.asarray(weights.read(tmp_path / path, SPECS)["w"]) == value).all()
    with pytest.raises(UserError, match="6: parameter w has shape .2, 3., the model's is .3, 2."):
        weights.read(tmp_path / "aepo" / "6", SPECS)
    (tmp_path / "short.safetensors").write_bytes(save(stored())[:-1])
    (tmp_path / "empty").mkdir()
    for data in (tmp_path / "aepo/5/params").rglob("d/*"):
        data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    (tmp_path / "bf16.safetensors").write_bytes(save(stored(2, ml_dtypes.bfloat16)))
    assert weights.read(tmp_path / "bf16.safetensors", SPECS)["w"].dtype == ml_dtypes.bfloat16
    (tmp_path / "whole.safetensors").write_bytes(save(stored(2, np.int64)))
    with pytest.raises(UserError, match="whole.safetensors: tensor w is I64; only F32"):
        weights.read(tmp_path / "whole.safetensors", SPECS)
    for path in ("short.safetensors", "empty", "aepo/5"):
        with pytest.raises(UserError, match=f"{path}: .*no readable|{path}: no"):
            weights.read(tmp_path / path, SPECS)


def test_the_endpoint_loads_by_path_within_its_roots(tmp_path):
    engine = fake.FakeEngine()
    (tmp_path / "w.safetensors").write_bytes(save(stored(2)))
    with fake.serving(engine, weight_roots=[tmp_path]) as url:

        def post(uri, **options):
            return httpx.post(f"{url}/v1/weights", json={"uri": str(uri), "version": 4, **options})

        assert post(tmp_path / "w.safetensors").json() == {"policy_version": 4}
        assert engine.policy_version == 4 and (engine.weights["w"] == 2).all() and not engine.finish
        assert post(tmp_path / "w.safetensors", in_flight="finish").status_code == 200 and engine.finish
        assert post(tmp_path / "w.safetensors", in_flight="drop").status_code == 422
        older = post(tmp_path / "w.safetensors", version=3)
        assert older.status_code == 409 and "version 3, but 4 is here" in older.json()["detail"]
        assert post(tmp_path / "w.safetensors", version=3, force=True).json() == {"policy_version": 3}
        body = (tmp_path / "w.safetensors").read_bytes()
        assert httpx.put(f"{url}/v1/weights?version=2", content=body).status_code == 409
        assert httpx.put(f"{url}/v1/weights?version=2&force=true", content=body).json() == {"policy_version": 2}
        hidden, absent = post("/etc/passwd"), post("/etc/absent")
        assert hidden.status_code == absent.status_code == 403
        assert hidden.json()["detail"].replace("passwd", "") == absent.json()["detail"].replace("absent", "")
        for uri in (tmp_path / "absent", "http://x/y", "/\ud800"):
            answer = httpx.post(f"{url}/v1/weights", content=json.dumps({"uri": str(uri), "version": 4}).encode())
            assert answer.status_code in (403, 422)


def test_a_sampler_on_this_machine_gets_them_through_its_memory(tmp_path, monkeypatch):
    engine, sent = fake.FakeEngine(), []
    monkeypatch.setattr(weights, "from_bytes", lambda body: sent.append(len(body)) or stored(9))
    with fake.serving(engine, shared=tmp_path) as url:
        client = RolloutClient([url])
        client.push_weights(stored(2), 3)
        assert (engine.weights["w"] == 2).all() and engine.policy_version == 3
        assert not sent and not os.listdir(tmp_path)
        with pytest.raises(UserError, match="parameter w"):
            client.push_weights({"w": np.ones(3, np.float32)}, 4)
        tmp_path.rmdir()  # as on another machine: then through HTTP
        client.push_weights(stored(2), 5, in_flight="finish")
        assert sent and engine.policy_version == 5 and engine.finish


def test_the_folder_in_memory_goes_with_its_sampler_and_those_of_killed_ones_too(tmp_path):
    left = tmp_path / "ares-sampler-killed"
    left.mkdir()
    (left / "w.safetensors").write_bytes(b"x")
    (tmp_path / "other").mkdir()
    with shared_folder(tmp_path) as first, shared_folder(tmp_path) as second:
        assert not left.exists() and first.is_dir() and second.is_dir()
        assert first.stat().st_mode & 0o77 == 0
        with file_in(first, b"abc") as path:
            assert Path(path).parent == first and Path(path).read_bytes() == b"abc"
        assert not os.listdir(first)
    assert os.listdir(tmp_path) == ["other"]
    with shared_folder(tmp_path / "absent") as none, file_in(none, b"") as path:
        assert none is None and path is None


def versions(groups):
    return [{int(v) for leaf in group.leaves for v in leaf.policy_version} for group in groups]


@pytest.mark.parametrize("pages", [PAGES, 400])  # few: some are preempted meanwhile
@pytest.mark.parametrize("finish", [False, True])
def test_what_was_begun_continues_or_finishes(finish, pages):
    engine = new_engine(pages=pages)
    flat = {name: np.zeros(spec.shape, np.float32) for name, spec in engine.weight_specs().items()}
    numbers = [engine.submit(r) for r in REQUESTS]
    done = {}
    for _ in range(3):
        done.update(engine.step())
    begun = set(engine._begun)
    assert 0 < len(begun) < 12 - len(done)
    engine.load_weights(flat, 1, finish=finish)
    assert engine.weights_wait == finish and engine.policy_version == (not finish)
    while engine.busy:
        done.update(engine.step())
    assert engine.policy_version == 1 and not engine.weights_wait
    found = dict(zip(numbers, versions([done[number] for number in numbers]), strict=True))
    assert (engine.stats()["preempted"] > 0) == (pages == PAGES)
    for number in begun:
        assert found[number] == {0} if finish else 1 in found[number]
    assert all(found[number] == {1} for number in numbers[max(begun) + 1 :])


def test_weights_that_wait_come_when_the_last_is_cancelled():
    engine = new_engine()
    flat = {name: np.zeros(spec.shape, np.float32) for name, spec in engine.weight_specs().items()}
    engine.load_weights(flat, 1, finish=True)
    assert engine.policy_version == 1  # nothing was begun
    number = engine.submit(request())
    engine.step()
    engine.load_weights(flat, 2, finish=True)
    engine.cancel(number)
    assert engine.policy_version == 2


def test_the_worker_says_when_they_are_in_use():
    engine = new_engine()
    flat = {name: np.zeros(spec.shape, np.float32) for name, spec in engine.weight_specs().items()}
    worker = Worker(engine)
    groups = [worker.rollout(request(seed=seed, max_new_tokens=16)) for seed in range(6)]
    loaded = worker.load_weights(flat, 3, finish=True)
    assert loaded.result(20) == 3 and worker.policy_version == 3
    assert {frozenset(v) for v in versions(group.result(20) for group in groups)} <= {frozenset({0}), frozenset({3})}
    worker.stop()
