"""Weights by JAX's transfer server over loopback: they come whole, from the caller alone, or the old ones stay."""

import httpx
import numpy as np
import pytest

from ares_jax.service import transfer, weight_routes
from ares_jax.service.client import RolloutClient
from tests.service import fake

FLAT = {"w": np.arange(6, dtype=np.float32).reshape(3, 2)}


@pytest.fixture
def served():
    engine = fake.FakeEngine()
    with fake.serving(engine, transfers=True) as url:
        yield engine, url


def test_a_sampler_elsewhere_fetches_them(served, monkeypatch):
    engine, url = served
    monkeypatch.setattr(weight_routes.weights, "from_bytes", None)  # not through HTTP
    client = RolloutClient([url])
    for version in (4, 5):
        client.push_weights({"w": FLAT["w"] * version}, version, in_flight="finish")
        np.testing.assert_array_equal(engine.weights["w"], FLAT["w"] * version)
        assert engine.policy_version == version and engine.finish


def test_what_cannot_be_fetched_changes_nothing(served, monkeypatch):
    engine, url = served
    monkeypatch.setattr(weight_routes, "_FETCHED_IN", 0.5)
    with transfer.offered(FLAT, url) as offer:

        def post(headers=None, **changes):
            return httpx.post(f"{url}/v1/weights", json={**offer, "version": 3, **changes}, headers=headers)

        gone = post(port=1)
        assert gone.status_code == 502 and "did not come" in gone.json()["detail"]
        unknown = post(number=offer["number"] ^ 1)
        assert unknown.status_code == 502 and "did not come in 0 s" in unknown.json()["detail"]
        other = post(tensors={"w": {"dtype": "float32", "shape": [2, 3]}})
        assert other.status_code == 422 and "parameter w has shape (2, 3)" in other.json()["detail"]
        assert post(tensors={}).status_code == post(host="192.0.2.1").status_code == 422  # no address can be named
        assert engine.policy_version == 0 and not engine.weights["w"].any()
        # Nor may a header name one: a documentation address (RFC 5737) that nobody has.
        assert post(headers={"X-Forwarded-For": "192.0.2.1"}).json() == {"policy_version": 3}
        np.testing.assert_array_equal(engine.weights["w"], FLAT["w"])


def test_a_sampler_that_cannot_fetch_gets_them_over_http(served, monkeypatch):
    engine, url = served
    fetch, tried = transfer.fetch, []
    monkeypatch.setattr(
        transfer, "fetch", lambda *rest, **options: tried.append(1) or fetch(*rest, **{**options, "port": 1})
    )
    client = RolloutClient([url])
    for version in (1, 2):
        client.push_weights(FLAT, version)
        assert engine.policy_version == version and len(tried) == 1


def test_they_are_fetched_only_where_that_was_asked_for():
    engine = fake.FakeEngine()
    with fake.serving(engine) as url, transfer.offered(FLAT, url) as offer:
        assert not httpx.get(f"{url}/v1/weights").json()["transfers"]
        answer = httpx.post(f"{url}/v1/weights", json={**offer, "version": 3})
        assert answer.status_code == 403 and "sampler.transfers" in answer.json()["detail"]
        assert engine.policy_version == 0
