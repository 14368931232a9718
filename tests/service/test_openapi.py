"""Requests that schemathesis makes up from the OpenAPI document, sound ones and broken ones: none is an error of ours."""

import functools
import tempfile
from pathlib import Path

import numpy as np
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from safetensors.numpy import save

from ares_jax.params import to_flat
from ares_jax.service import weight_routes
from ares_jax.service.server import make_app
from ares_jax.service.worker import Worker
from tests import digits
from tests.service import fake
from tests.service.test_chat import FORMAT

OPERATIONS = [
    ("GET", "/health"), ("GET", "/metrics"), ("GET", "/v1/models"), ("GET", "/v1/models/{name}"), ("GET", "/v1/weights"),
    ("PUT", "/v1/weights"), ("POST", "/v1/weights"), ("POST", "/v1/rollouts"), ("POST", "/v1/chat/completions"),
]  # fmt: skip
TOKEN = {"Authorization": "Bearer secret"}


@functools.cache
def service(real: bool):
    """An engine of random trees, or a real one of the tiny model with all that a sampler can be started with."""
    folder = tempfile.TemporaryDirectory()
    root = Path(folder.name)
    flat = {name: np.asarray(value) for name, value in to_flat(digits.model()).items()}
    (root / "w.safetensors").write_bytes(save(flat))
    worker = Worker(digits.engine() if real else fake.FakeEngine())
    options = dict(token="secret", transfers=True) if real else {}
    app = make_app(worker, model_name="fake", chat_format=FORMAT, weight_roots=[root], **options)
    return worker, schemathesis.openapi.from_asgi("/openapi.json", app, headers=TOKEN), folder


def test_no_operation_is_forgotten():
    paths = service(False)[1].raw_schema["paths"]
    assert {(method.upper(), path) for path, methods in paths.items() for method in methods} == set(OPERATIONS)


SOUND, BROKEN = schemathesis.GenerationMode
CASES = [(SOUND, *o) for o in OPERATIONS] + [(BROKEN, *o) for o in OPERATIONS if o[0] != "GET"]


@pytest.mark.parametrize(
    ("real", "mode", "method", "path"), [(False, *case) for case in CASES] + [(True, *c) for c in CASES if c[1] != "GET"]
)
def test_no_request_is_our_error(real, mode, method, path, monkeypatch):
    monkeypatch.setattr(weight_routes, "_FETCHED_IN", 0.2)
    worker, schema, _ = service(real)

    @given(schema[path][method].as_strategy(generation_mode=mode))
    @settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
    def ask(case):
        answer = case.call(headers=TOKEN, timeout=120)  # what is compiled first takes longer than its ten seconds
        assert answer.status_code < 500, answer.text
        if answer.status_code >= 400:
            assert len(answer.content) < 5000 and answer.json()
        if answer.status_code == 401:
            assert "authorization" in str(case.headers).lower()  # it made up another one

    ask()
    assert worker.failure is None


def test_without_the_token_nothing_is_done_and_with_it_weights_are():
    worker, schema, folder = service(True)
    case = schema["/v1/weights"]["POST"].Case(
        body={"uri": f"{folder.name}/w.safetensors", "version": 2**31 - 1}, media_type="application/json"
    )
    assert case.call().status_code == 401
    assert case.call(headers=TOKEN).json() == {"policy_version": 2**31 - 1} and worker.policy_version == 2**31 - 1
