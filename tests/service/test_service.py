"""A real server in its own process with a real engine; the client through everything that can go wrong."""

import json
import os
import socket
import subprocess
import time

import httpx
import numpy as np
import pytest
from safetensors.numpy import save

from ares_jax.errors import UserError
from ares_jax.params import to_flat
from ares_jax.sampling.requests import rollout_request
from ares_jax.service.client import RolloutClient
from ares_jax.service.protocol import decode_group, encode_group, encode_request
from tests import digits
from tests.warm_python import kill, warm_python

_SERVER = """
import sys
from pathlib import Path
sys.path.insert(0, ".")
from tests import conftest, digits
from ares_jax.service.server import run_server
from ares_jax.errors import UserError
try:
    run_server(digits.engine, host=sys.argv[1], port=int(sys.argv[2]), model_name="tiny", ready_file=Path(sys.argv[3]))
except UserError as error:
    sys.exit(f"error: {error}")
"""


def start(folder, *, host="127.0.0.1", port=0, token=""):
    ready = folder / "ready.json"
    ready.unlink(missing_ok=True)
    command = [warm_python(), "-c", _SERVER, host, str(port), str(ready)]
    process = subprocess.Popen(command, env={**os.environ, "ARES_TOKEN": token}, stderr=subprocess.PIPE, text=True)
    while not ready.exists() and process.poll() is None:
        time.sleep(0.05)
    return process, json.loads(ready.read_text())["url"] if ready.exists() else ""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    process, url = start(tmp_path_factory.mktemp("service"))
    yield url
    process.terminate()
    assert process.wait(timeout=20) == 0  # SIGTERM drains


def requests(count, tokens=12):
    return [
        rollout_request(
            p, seed=i, group_size=4, root_leaves=2, max_branches_per_sequence=2, tau_high=5.4, max_new_tokens=tokens
        )
        for i, p in enumerate(digits.prompts(count))
    ]


def same(group, other, within=0.0):
    """Whether two trees are the same, numbers up to `within`: what a row rounds to depends on its place among the rows."""
    return all(
        np.allclose(x, getattr(b, name), rtol=0, atol=within)
        if (x := np.asarray(getattr(a, name))).dtype == np.float32
        else np.array_equal(x, np.asarray(getattr(b, name)))
        for a, b in zip(group.leaves, other.leaves, strict=True)
        for name in vars(a)
    )


def test_rollouts_over_http_equal_those_of_the_engine(server):
    wanted = digits.engine().generate(requests(3))
    seen = []
    got = RolloutClient([server]).rollouts(requests(3), on_group=lambda index, group: seen.append(index))
    assert sorted(seen) == [0, 1, 2]
    assert all(same(a, b, within=1e-5) for a, b in zip(got, wanted, strict=True))
    assert same(decode_group(json.loads(json.dumps(encode_group(wanted[0])))), wanted[0])


def test_weights_are_taken_whole_or_not_at_all(server):
    client, flat = RolloutClient([server]), {name: np.asarray(x) for name, x in to_flat(digits.model()).items()}
    assert httpx.put(f"{server}/v1/weights?version=5", content=save(flat)[:1000]).status_code == 422
    with pytest.raises(UserError, match="parameter text.embedding is missing"):
        client.push_weights({name: x for name, x in flat.items() if name != "text.embedding"}, 5)
    assert httpx.get(f"{server}/health").json()["policy_version"] == 0
    client.push_weights(flat, 9)
    assert httpx.get(f"{server}/health").json()["policy_version"] == 9
    assert client.rollouts(requests(1))[0].leaves[0].policy_version[0] == 9


def test_bad_bodies_are_refused_with_a_reason(server):
    good = encode_request(requests(1)[0])
    cases = [
        {**good, "token_ids": {**good["token_ids"], "shape": [3]}}, {**good, "temperature": -1},
        {**good, "grid_thw": {"dtype": "int32", "shape": [0, 3], "data": ""}}, {},
    ]  # fmt: skip
    for case in cases:
        assert httpx.post(f"{server}/v1/rollouts", json={"groups": [case]}).status_code == 422
    with pytest.raises(UserError, match="raise sampler.max_response_tokens"):
        RolloutClient([server]).rollouts(requests(1, tokens=10_000))
    assert "ares_sampler_groups" in httpx.get(f"{server}/metrics").text
    assert httpx.get(f"{server}/v1/models").json()["data"][0]["id"] == "tiny"


def test_a_taken_port_and_an_open_address_are_refused(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        process, _ = start(tmp_path, port=taken.getsockname()[1])
        assert process.wait() != 0
        assert "--config.sampler.port=0" in process.stderr.read()
    process, _ = start(tmp_path, host="0.0.0.0")
    assert process.wait() != 0
    assert "ARES_TOKEN" in process.stderr.read()


def test_a_token_is_asked_for(tmp_path):
    process, url = start(tmp_path, token="secret")
    try:
        assert httpx.get(f"{url}/v1/models").status_code == 401
        assert httpx.get(f"{url}/v1/models", headers={"Authorization": "Bearer secret"}).status_code == 200
    finally:
        kill(process)


def test_every_group_arrives_once_though_the_sampler_is_killed(tmp_path):
    process, url = start(tmp_path)
    killed, seen = [], []

    def on_group(index, group):
        seen.append(index)
        if not killed:
            kill(process)
            killed.append(start(tmp_path, port=int(url.rsplit(":", 1)[1]))[0])

    wanted = requests(64)
    try:
        groups = RolloutClient([url]).rollouts(wanted, on_group=on_group)
    finally:
        for again in killed:
            kill(again)
    assert killed and sorted(seen) == list(range(64))
    assert [g.problem_id for g in groups] == [r.problem_id for r in wanted]


def test_an_unreachable_sampler_is_named():
    with pytest.raises(UserError, match="cannot be reached.*ares_jax.serve"):
        RolloutClient(["http://127.0.0.1:9"], patience=0.5).wait_until_ready()
