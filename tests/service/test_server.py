"""The HTTP surface over an engine of random trees: order, limits, tokens, clients that leave, weights."""

import contextlib
import http.client
import json
import os
import signal
import subprocess
import threading
import time

import httpx
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from safetensors.numpy import save

from ares_jax.service import server
from ares_jax.service.chat_routes import ChatLimits
from ares_jax.service.protocol import encode_request
from ares_jax.service.server import Limits
from tests.service import fake
from tests.warm_python import warm_python

_SERVER = """
import sys
from pathlib import Path
sys.path.insert(0, ".")
from ares_jax.service.server import run_server
from tests.service.fake import FakeEngine
def make_chat_format():
    from tests.service.test_chat import FORMAT
    return FORMAT
run_server(lambda: FakeEngine(delay=float(sys.argv[3]), slots=1), host=sys.argv[1], port=int(sys.argv[4]), model_name="m",
           ready_file=Path(sys.argv[2]), drain_seconds=float(sys.argv[5]),
           make_chat_format=make_chat_format if sys.argv[6:] else None)
"""


def start(folder, *, host="127.0.0.1", port=0, delay=0.0, token="", drain=30.0, chats=False):
    ready = folder / "ready.json"
    ready.unlink(missing_ok=True)
    command = [warm_python(), "-c", _SERVER, host, str(ready), str(delay), str(port), str(drain)]
    command += ["chats"] * chats
    process = subprocess.Popen(command, env={**os.environ, "ARES_TOKEN": token})
    assert fake.until(lambda: ready.exists() or process.poll() is not None, 300)
    return process, json.loads(ready.read_text())["url"]


def body(*seeds, **options):
    return {"groups": [encode_request(fake.request(seed, **options)) for seed in seeds]}


def weights(value=1.0, shape=(3, 2)):
    return save({"w": np.full(shape, value, np.float32)})


def test_groups_are_streamed_as_they_finish():
    with fake.serving(fake.FakeEngine(delay=0.15, slots=1)) as url:
        times, order = [], []
        with httpx.stream("POST", f"{url}/v1/rollouts", json=body(*range(4))) as answer:
            assert answer.headers["content-type"] == "application/x-ndjson"
            for line in answer.iter_lines():
                times.append(time.monotonic())
                order.append(json.loads(line)["index"])
    assert sorted(order) == [0, 1, 2, 3] and order[-1] == 0  # the engine finishes the newest first
    assert times[-1] - times[0] > 0.3


def test_an_error_is_a_line_of_its_own():
    with fake.serving(fake.FakeEngine()) as url:
        mixed = {"groups": body(1)["groups"] + body(2, tokens=2_000_000)["groups"]}
        lines = [json.loads(line) for line in httpx.post(f"{url}/v1/rollouts", json=mixed).text.splitlines()]
    answers = {line.pop("index"): line for line in lines}
    assert answers[0]["group"]["problem_id"] == "p1"
    assert answers[1] == {"error": "problem p2: too long"}


def test_a_silent_engine_is_told_from_a_dead_one(monkeypatch):
    monkeypatch.setattr("ares_jax.service.server._HEARTBEAT", 0.05)
    with fake.serving(fake.FakeEngine(delay=0.4)) as url:
        lines = httpx.post(f"{url}/v1/rollouts", json=body(1)).text.split("\n")
    assert lines.count("") >= 4 and json.loads(lines[-2])["index"] == 0


def test_a_broken_engine_is_reported_everywhere():
    with fake.serving(fake.FakeEngine()) as url:
        assert "boom" in json.loads(httpx.post(f"{url}/v1/rollouts", json=body(666)).text)["error"]
        assert "boom" in json.loads(httpx.post(f"{url}/v1/rollouts", json=body(1)).text)["error"]
        answer = httpx.put(f"{url}/v1/weights?version=1", content=weights())
        assert answer.status_code == 503 and "boom" in answer.json()["detail"]
        answer = httpx.get(f"{url}/health")
        assert answer.status_code == 500 and "boom" in answer.json()["reason"]


def test_bad_bodies_are_422_short_and_harmless():
    with fake.serving(fake.FakeEngine()) as url:
        good = encode_request(fake.request(1, patches=400))
        missing = {name: value for name, value in good.items() if name != "seed"}
        for group in (missing, {**good, "temperature": float("nan")}, {**good, "rope_delta": 2**40}, []):
            content = json.dumps({"groups": [group]})  # with NaN, as Python writes it
            answer = httpx.post(f"{url}/v1/rollouts", content=content, headers={"Content-Type": "application/json"})
            assert answer.status_code == 422
            assert len(answer.content) < 1000  # not the arrays again
        for text in (b"{\xff", b"[" * 100_000, b"", b'{"groups": ' + b"9" * 10_000 + b"}"):
            answer = httpx.post(f"{url}/v1/rollouts", content=text, headers={"Content-Type": "application/json"})
            assert answer.status_code in (400, 422)
        assert httpx.post(f"{url}/v1/rollouts", json={"groups": [good]}).status_code == 200


def test_weights_are_swapped_whole_or_not_at_all():
    engine = fake.FakeEngine()
    with fake.serving(engine) as url:
        bad = [b"", b"x" * 100, weights()[:-1], weights(shape=(2, 3)), save({"v": np.zeros((3, 2), np.float32)})]
        for content in bad:
            assert httpx.put(f"{url}/v1/weights?version=1", content=content).status_code == 422
        for version in ("", "x", "-1", str(2**31)):
            assert httpx.put(f"{url}/v1/weights?version={version}", content=weights()).status_code == 422
        assert engine.policy_version == 0 and not engine.weights["w"].any()
        assert httpx.put(f"{url}/v1/weights?version=3", content=weights(2.5)).json() == {"policy_version": 3}
        assert engine.policy_version == 3 and (engine.weights["w"] == 2.5).all()


def test_a_large_body_is_413_whether_or_not_it_announces_its_length():
    with fake.serving(fake.FakeEngine(), limits=Limits(body_bytes=1000)) as url:
        for content in (b"x" * 2000, iter([b"x" * 600] * 3)):
            assert httpx.put(f"{url}/v1/weights?version=1", content=content).status_code == 413
        for content in (b" " * 2000, iter([b" " * 600] * 3)):
            headers = {"Content-Type": "application/json"}
            assert httpx.post(f"{url}/v1/rollouts", content=content, headers=headers).status_code == 413
        assert httpx.put(f"{url}/v1/weights?version=1", content=weights()).status_code == 200


def test_a_full_queue_is_503_and_empties():
    with fake.serving(fake.FakeEngine(delay=0.5), limits=Limits(queued_groups=4)) as url:
        with httpx.stream("POST", f"{url}/v1/rollouts", json=body(1, 2, 3)) as answer:
            full = httpx.post(f"{url}/v1/rollouts", json=body(4, 5))
            assert full.status_code == 503 and int(full.headers["retry-after"]) > 0
            answer.read()
        assert httpx.post(f"{url}/v1/rollouts", json=body(4, 5)).status_code == 200


def test_what_waits_is_bounded_together_before_anything_is_made_of_it(monkeypatch):
    decoded, decode = [], server.decode_request
    monkeypatch.setattr(server, "decode_request", lambda model: decoded.append(threading.current_thread()) or decode(model))
    engine, patch = fake.FakeEngine(delay=0.01, slots=0), 4 * 1176  # bytes; nothing finishes yet
    limits = Limits(queued_groups=4, chat=ChatLimits(waiting_bytes=60 * patch))
    with fake.serving(engine, limits=limits) as url:
        assert httpx.post(f"{url}/v1/rollouts", json=body(*range(5))).status_code == 503  # no place: nothing is decoded
        assert not decoded
        large = httpx.post(f"{url}/v1/rollouts", json=body(1, patches=40))  # as it was sent, and then its patches
        assert large.status_code == 413 and "ask in portions" in large.json()["error"]["message"]
        assert not decoded.pop().name.endswith("(run)")  # the thread of the event loop
        with httpx.stream("POST", f"{url}/v1/rollouts", json=body(2, patches=24)):
            full = httpx.post(f"{url}/v1/rollouts", json=body(3, patches=24))
            assert full.status_code == 429 and int(full.headers["retry-after"]) > 0
            assert "bytes already" in full.json()["error"]["message"]
            engine.slots = 1
        again = body(3, patches=24)
        assert fake.until(lambda: httpx.post(f"{url}/v1/rollouts", json=again).status_code == 200)  # all was given back


@pytest.mark.parametrize("wait", [0.0, 0.2])
def test_a_client_that_leaves_frees_the_engine_and_the_queue(wait):
    engine = fake.FakeEngine(delay=0.1, slots=1)
    with fake.serving(engine, limits=Limits(queued_groups=20)) as url:
        for _ in range(3):
            connection = http.client.HTTPConnection(url.removeprefix("http://"))
            connection.request("POST", "/v1/rollouts", json.dumps(body(*range(20))), {"Content-Type": "application/json"})
            time.sleep(wait)
            connection.close()
            assert fake.until(lambda: engine.submitted and not engine.work)
            engine.submitted.clear()
            time.sleep(0.1)
        assert len(engine.cancelled) > 30
        assert httpx.post(f"{url}/v1/rollouts", json=body(1)).status_code == 200


def test_every_path_but_health_asks_for_the_token():
    with fake.serving(fake.FakeEngine(), token="secret") as url:
        assert httpx.get(f"{url}/health").status_code == 200
        for header in ({}, {"Authorization": "Bearer secre"}, {"Authorization": b"Bearer \xe9"}):
            assert httpx.get(f"{url}/metrics", headers=header).status_code == 401
            assert httpx.post(f"{url}/v1/rollouts", json=body(1), headers=header).status_code == 401
            assert httpx.put(f"{url}/v1/weights?version=1", content=weights(), headers=header).status_code == 401
        for scheme in ("Bearer", "bearer"):
            assert httpx.get(f"{url}/metrics", headers={"Authorization": f"{scheme} secret"}).status_code == 200


def test_metrics_are_what_prometheus_reads():
    with fake.serving(fake.FakeEngine()) as url:
        httpx.post(f"{url}/v1/rollouts", json=body(1, 2))
        httpx.get(f"{url}/made/up")
        families = {family.name: family for family in text_string_to_metric_families(httpx.get(f"{url}/metrics").text)}
    assert families["ares_sampler_groups"].type == "counter" and families["ares_sampler_live"].type == "gauge"
    assert families["ares_sampler_groups"].samples[0].value == 2
    told = {tuple(s.labels.values()): s.value for s in families["ares_sampler_answers"].samples if s.name.endswith("total")}
    assert told == {("/v1/rollouts", "200"): 1, ("other", "404"): 1}
    with fake.serving(fake.FakeEngine(), token="secret") as url:
        httpx.get(f"{url}/metrics")
        text = httpx.get(f"{url}/metrics", headers={"Authorization": "Bearer secret"}).text
    assert 'ares_sampler_answers_total{path="other",status="401"} 1.0' in text


def test_sigterm_while_the_weights_are_read_ends_it_in_peace(tmp_path):
    code = _SERVER.replace("FakeEngine(delay=float(sys.argv[3]), slots=1)", "print('loads', flush=True) or time.sleep(60)")
    command = [warm_python(), "-c", f"import time\n{code}", "127.0.0.1", str(tmp_path / "ready.json"), "0", "0", "30"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "loads\n"
        process.send_signal(signal.SIGTERM)
    assert process.returncode == 0 and not (tmp_path / "ready.json").exists()


def test_sigterm_lets_what_runs_finish_and_refuses_newcomers(tmp_path):
    process, url = start(tmp_path, delay=0.5, drain=60, chats=True)
    answers = []
    ask = threading.Thread(target=lambda: answers.append(httpx.post(f"{url}/v1/rollouts", json=body(*range(6)), timeout=60)))
    chat = {"model": "m", "messages": [{"role": "user", "content": "Add."}], "stream": True, "max_tokens": 5}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=chat, timeout=60) as stream:
        lines = stream.iter_lines()
        assert "assistant" in next(lines)  # it has begun
        ask.start()
        time.sleep(0.4)
        process.send_signal(signal.SIGTERM)
        assert fake.until(lambda: httpx.get(f"{url}/health").status_code == 503)
        refused = httpx.post(f"{url}/v1/chat/completions", json=chat)
        assert refused.status_code == 503 and refused.json() == {"error": "the sampler is stopping; ask another one"}
        for content in (b"{}", bytes(2**23)):  # one larger than a socket's buffers, which must be read to its end
            assert httpx.post(f"{url}/v1/rollouts", content=content).status_code == 503
        assert [line for line in lines if line][-1] == "data: [DONE]"
    ask.join()
    assert len(answers[0].text.splitlines()) == 6
    assert process.wait(60) == 0


def test_what_runs_longer_than_the_drain_is_cut_off(tmp_path):
    process, url = start(tmp_path, delay=0.1, drain=0.5)
    with httpx.stream("POST", f"{url}/v1/rollouts", json=body(*range(500))) as answer:
        lines = answer.iter_lines()
        assert json.loads(next(lines))
        process.send_signal(signal.SIGTERM)
        count = 1
        with contextlib.suppress(httpx.HTTPError):  # it breaks off
            for _ in lines:
                count += 1
    assert 3 <= count < 400
    assert process.wait(60) == 0
