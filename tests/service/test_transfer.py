"""Weights by JAX's transfer server over loopback: they come whole, from the caller alone, or the old ones stay."""

import threading
import time

import httpx
import jax.experimental.transfer
import numpy as np
import pytest

from ares_jax.errors import UserError
from ares_jax.service import transfer, weight_routes
from ares_jax.service.client import RolloutClient
from ares_jax.service.server import run_server
from tests.service import fake

FLAT = {"w": np.arange(6, dtype=np.float32).reshape(3, 2)}


@pytest.fixture
def served():
    engine = fake.FakeEngine()
    with fake.serving(engine, transfers=True) as url:
        yield engine, url


def test_a_sampler_elsewhere_fetches_them(served, monkeypatch):
    engine, url = served
    monkeypatch.setattr(weight_routes.weight_files, "from_bytes", None)  # not through HTTP
    client = RolloutClient([url])
    for version in (4, 5):
        client.push_weights({"w": FLAT["w"] * version}, version, in_flight="finish")
        np.testing.assert_array_equal(engine.weights["w"], FLAT["w"] * version)
        assert engine.policy_version == version and engine.finish


def test_what_cannot_be_fetched_changes_nothing(served, monkeypatch):
    engine, url = served
    monkeypatch.setattr(weight_routes, "_FETCHED_IN", 0.5)
    offer = transfer.offer(FLAT, "127.0.0.1")

    def post(headers=None, **changes):
        return httpx.post(f"{url}/v1/weights", json={**offer, "version": 3, **changes}, headers=headers)

    gone = post(port=1)
    assert gone.status_code == 424 and "did not come" in gone.json()["detail"]
    unknown = post(number=offer["number"] ^ 1)
    assert unknown.status_code == 424 and "did not come in 0 s" in unknown.json()["detail"]
    other = post(tensors={"w": {"dtype": "float32", "shape": [2, 3]}})
    assert other.status_code == 422 and "parameter w has shape (2, 3)" in other.json()["detail"]
    assert post(tensors={}).status_code == post(host="192.0.2.1").status_code == 422  # no address can be named
    assert engine.policy_version == 0 and not engine.weights["w"].any()
    # Nor may a header name one: a documentation address (RFC 5737) that nobody has.
    assert post(headers={"X-Forwarded-For": "192.0.2.1"}).json() == {"policy_version": 3}
    np.testing.assert_array_equal(engine.weights["w"], FLAT["w"])


def test_a_learner_of_several_addresses_offers_them_at_the_one_that_the_sampler_sees(served, monkeypatch):
    engine, url = served
    monkeypatch.setattr(weight_routes.weight_files, "from_bytes", None)  # not through HTTP
    client = RolloutClient([url])
    second = httpx.HTTPTransport(local_address="127.0.0.2")  # by its route to the sampler it would be 127.0.0.1
    monkeypatch.setattr(client._samplers[0], "_client", httpx.Client(base_url=url, transport=second))
    client.push_weights(FLAT, 1)
    assert engine.policy_version == 1


@pytest.mark.parametrize("error", [RuntimeError("bind: Cannot assign requested address"), OSError("no network")])
def test_a_learner_that_cannot_offer_them_says_so_once_and_sends_them(served, monkeypatch, capfd, error):
    engine, url = served

    def fail(*_):
        raise error

    monkeypatch.setattr(jax.experimental.transfer, "start_transfer_server", fail)
    transfer._started.cache_clear()
    client = RolloutClient([url])
    for version in (1, 2):
        client.push_weights(FLAT, version)
        assert engine.policy_version == version
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"warning: sampler {url} cannot fetch weights from 127.0.0.1 ({error})")
    assert "sampler.transfers" in line and "JAX_PLATFORMS" in line


def test_servers_listen_on_one_address_and_nowhere_else():
    assert transfer._server("127.0.0.2").address().startswith("127.0.0.2:")
    with pytest.raises(transfer.TransferError, match="fe80::1%lo is link-local"):
        transfer.offer(FLAT, "fe80::1%lo")
    with pytest.raises(transfer.TransferError, match="bind"):
        transfer.offer(FLAT, "192.0.2.1")  # a documentation address that nobody has


def test_two_pushes_at_once_start_one_server(monkeypatch):
    def start(*_):
        started.append(1)
        time.sleep(0.2)  # both threads are on their way

    started, found = [], []
    monkeypatch.setattr(jax.experimental.transfer, "start_transfer_server", start)
    threads = [threading.Thread(target=lambda: found.append(transfer._server("192.0.2.2"))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2 and len(started) == 1


def test_a_sampler_that_could_never_fetch_them_does_not_start(monkeypatch):
    def missing():
        raise RuntimeError("Unknown backend cpu")  # as with JAX_PLATFORMS=tpu

    monkeypatch.setattr(transfer, "_host_devices", missing)
    with pytest.raises(UserError, match=r"sampler.transfers=True.*Unknown backend cpu.*JAX_PLATFORMS=tpu,cpu"):
        run_server(lambda: pytest.fail("it started"), host="127.0.0.1", port=0, model_name="m", transfers=True)


def test_a_sampler_that_cannot_fetch_gets_them_over_http(served, monkeypatch, capfd):
    engine, url = served
    fetch, tried = transfer.fetch, []
    monkeypatch.setattr(
        transfer, "fetch", lambda *rest, **options: tried.append(1) or fetch(*rest, **{**options, "port": 1})
    )
    client = RolloutClient([url])
    for version in (1, 2):
        client.push_weights(FLAT, version)
        assert engine.policy_version == version and len(tried) == 1
    assert capfd.readouterr().err.count("cannot fetch weights from 127.0.0.1 (the learner's arrays did not come") == 1


def test_they_are_fetched_only_where_that_was_asked_for():
    engine = fake.FakeEngine()
    offer = transfer.offer(FLAT, "127.0.0.1")
    with fake.serving(engine) as url:
        assert not httpx.get(f"{url}/v1/weights").json()["transfers"]
        answer = httpx.post(f"{url}/v1/weights", json={**offer, "version": 3})
        assert answer.status_code == 403 and "sampler.transfers" in answer.json()["detail"]
        assert engine.policy_version == 0
