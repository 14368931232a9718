"""The client over samplers that are away, die, come back, or are slow."""

import http.server
import socket
import threading
import time
import weakref

import httpx
import numpy as np
import pytest

from ares_jax.errors import UserError
from ares_jax.service.client import RolloutClient
from ares_jax.service.server import Limits
from tests.service import fake
from tests.service.test_server import start
from tests.warm_python import kill

DEAD = "http://127.0.0.1:9"


def requests(count):
    return [fake.request(seed, leaves=2, tokens=5) for seed in range(count)]


def ids(groups):
    return [int(group.problem_id[1:]) for group in groups]


def dying(seconds):
    """Returns the address of what accepts connections, says nothing, and disappears."""
    listener = socket.create_server(("127.0.0.1", 0))

    def run():
        end, accepted = time.monotonic() + seconds, []
        while time.monotonic() < end:
            listener.settimeout(max(0.01, end - time.monotonic()))
            try:
                accepted.append(listener.accept()[0])
            except TimeoutError:
                break
        for connection in [*accepted, listener]:
            connection.close()

    threading.Thread(target=run, daemon=True).start()
    return f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_groups_come_in_order_and_each_is_told_once():
    with fake.serving(fake.FakeEngine()) as a, fake.serving(fake.FakeEngine()) as b:
        seen = []
        groups = RolloutClient([a, b]).rollouts(requests(300), on_group=lambda i, group: seen.append((i, group.problem_id)))
        assert RolloutClient([a]).rollouts([]) == []
    assert ids(groups) == list(range(300))
    assert sorted(seen) == [(i, f"p{i}") for i in range(300)]
    want = fake.group(requests(300)[123])
    assert all(np.array_equal(x.token_ids, y.token_ids) for x, y in zip(groups[123].leaves, want.leaves, strict=True))


def test_few_groups_are_spread_too():
    engines = [fake.FakeEngine(delay=0.05, slots=1), fake.FakeEngine(delay=0.05, slots=1)]
    with fake.serving(engines[0]) as a, fake.serving(engines[1]) as b:
        RolloutClient([a, b]).rollouts(requests(16))
    assert [len(engine.submitted) for engine in engines] == [8, 8]


def test_the_next_request_waits_at_the_sampler_before_the_last_is_done():
    engine = fake.FakeEngine(delay=0.02, slots=8)
    with fake.serving(engine) as url:
        queued = []
        RolloutClient([url]).rollouts(requests(256), on_group=lambda i, group: queued.append(len(engine.work)))
    assert min(queued[:180]) > 0  # the engine never runs dry between two requests


@pytest.mark.parametrize("first", [True, False])
def test_what_a_lost_sampler_held_goes_to_one_that_is_idle_already(first):
    with fake.serving(fake.FakeEngine()) as alive:
        lost = dying(0.7)
        groups = RolloutClient([lost, alive] if first else [alive, lost], patience=30).rollouts(requests(100))
    assert ids(groups) == list(range(100))


def test_a_dead_sampler_does_not_end_the_work_of_a_slow_one():
    with fake.serving(fake.FakeEngine(delay=1.5)) as url:
        assert ids(RolloutClient([url, DEAD], patience=0.3).rollouts(requests(6))) == list(range(6))


def test_what_a_slow_sampler_holds_is_asked_of_an_idle_one_once(monkeypatch):
    monkeypatch.setattr("ares_jax.service.server._HEARTBEAT", 0.1)
    stuck, good, seen = fake.FakeEngine(slots=0, delay=0.02), fake.FakeEngine(), []  # stuck: alive, but never done
    with fake.serving(stuck) as a, fake.serving(good) as b:
        groups = RolloutClient([a, b]).rollouts(requests(40), on_group=lambda i, group: seen.append(i))
        assert stuck.submitted and sorted(good.submitted) == sorted(seen) == ids(groups) == list(range(40))
        assert fake.until(lambda: not stuck.work)  # it is told to stop


def test_a_sampler_that_falls_silent_is_given_up(monkeypatch):
    monkeypatch.setattr("ares_jax.service.connection._SILENCE", 0.5)
    monkeypatch.setattr("ares_jax.service.server._HEARTBEAT", 0.1)
    with fake.serving(fake.FakeEngine(delay=1.2)) as url:  # slower than the silence, but it shows that it lives
        assert ids(RolloutClient([url, dying(60)]).rollouts(requests(8))) == list(range(8))


def test_a_sampler_killed_and_restarted_gets_its_weights_back(tmp_path):
    process, url = start(tmp_path, delay=0.02)
    client, seen = RolloutClient([url]), []
    client.push_weights({"w": np.ones((3, 2), np.float32)}, 7)
    again = []

    def on_group(index, group):
        seen.append(index)
        if len(seen) == 10:
            kill(process)
            again.append(start(tmp_path, delay=0.01, port=int(url.rsplit(":", 1)[1]))[0])

    try:
        groups = client.rollouts(requests(64), on_group=on_group)
        assert httpx.get(f"{url}/health").json()["policy_version"] == 7
    finally:
        process.kill()
        for new in again:
            new.kill()
    assert again and sorted(seen) == list(range(64)) and ids(groups) == list(range(64))
    assert {int(v) for group in groups for leaf in group.leaves for v in leaf.policy_version} == {7}


def test_one_of_two_samplers_dies_and_works_again_when_it_is_back(tmp_path):
    """In one job: what it held goes to the other, and what is left to both."""
    folders = [tmp_path / name for name in ("a", "b")]
    for folder in folders:
        folder.mkdir()
    processes, urls = zip(*(start(folder, delay=0.02) for folder in folders), strict=True)
    client, seen, again = RolloutClient(urls), [], []
    client.push_weights({"w": np.ones((3, 2), np.float32)}, 7)

    def drawn(url):
        return int(float(httpx.get(f"{url}/metrics").text.split("\nares_sampler_groups_total ")[1].split()[0]))

    def on_group(index, group):
        seen.append(index)
        if len(seen) == 100:
            kill(processes[0])
        if len(seen) == 250:  # the other one has worked alone for some time
            again.append(start(folders[0], delay=0.02, port=int(urls[0].rsplit(":", 1)[1]))[0])

    try:
        groups = client.rollouts(requests(650), on_group=on_group)
        anew, other = map(drawn, urls)
        assert httpx.get(f"{urls[0]}/health").json()["policy_version"] == 7
    finally:
        for process in (*processes, *again):
            process.kill()
    assert sorted(seen) == list(range(650)) and ids(groups) == list(range(650))
    assert anew > 0 and other >= 150  # it drew again, too
    assert {int(v) for group in groups for leaf in group.leaves for v in leaf.policy_version} == {7}


def test_weights_reach_all_and_a_sampler_that_is_away_gets_them_later():
    engines = [fake.FakeEngine(), fake.FakeEngine()]
    with fake.serving(engines[0]) as a, fake.serving(engines[1]) as b:
        RolloutClient([a, b]).push_weights({"w": np.full((3, 2), 3, np.float32)}, 4)
        assert all(engine.policy_version == 4 and (engine.weights["w"] == 3).all() for engine in engines)
        RolloutClient([DEAD, a]).push_weights({"w": np.ones((3, 2), np.float32)}, 5)
        assert engines[0].policy_version == 5
        with pytest.raises(UserError, match=f"{a} refused the weights.*parameter w"):
            RolloutClient([a]).push_weights({"w": np.ones((1,), np.float32)}, 6)
    with pytest.raises(UserError, match=f"{DEAD} cannot be reached.*ares_jax.serve"):
        RolloutClient([DEAD], patience=0.3).push_weights({"w": np.ones((3, 2), np.float32)}, 5)


def test_a_run_that_resumes_may_be_behind_and_one_that_was_overtaken_is_told():
    flat, engine = {"w": np.ones((3, 2), np.float32)}, fake.FakeEngine()
    with fake.serving(engine) as url:
        old, new = RolloutClient([url]), RolloutClient([url])
        old.push_weights(flat, 9)
        new.push_weights(flat, 5)  # from an older checkpoint
        new.push_weights(flat, 11)
        with pytest.raises(UserError, match=f"{url} refused the weights: weights of version 10, but 11 is here"):
            old.push_weights(flat, 10)
        assert engine.policy_version == 11


def test_weights_that_wait_long_are_waited_for(monkeypatch):
    monkeypatch.setattr("ares_jax.service.connection._TAKEN", httpx.Timeout(10, read=0.2))
    monkeypatch.setattr("ares_jax.service.connection._LOOK", 0.05)
    engine = fake.FakeEngine(delay=0.01, slots=0)
    engine.weights_wait = True  # for a group that does not end yet
    with fake.serving(engine) as url:
        draw = threading.Thread(target=RolloutClient([url]).rollouts, args=(requests(1),))
        draw.start()
        threading.Timer(1.0, lambda: setattr(engine, "weights_wait", False)).start()
        begun = time.monotonic()
        RolloutClient([url], patience=0).push_weights({"w": np.ones((3, 2), np.float32)}, 4, in_flight="finish")
        assert time.monotonic() - begun > 0.8 and engine.policy_version == 4
        assert httpx.get(f"{url}/v1/weights").json()["coming"] == []
        engine.slots = 1
        draw.join()


def test_the_callers_error_and_a_refused_request_end_it():
    def on_group(index, group):
        raise KeyError("mine")

    with fake.serving(fake.FakeEngine()) as url:
        with pytest.raises(KeyError, match="mine"):
            RolloutClient([url]).rollouts(requests(5), on_group=on_group)
        with pytest.raises(UserError, match="p1: too long"):
            RolloutClient([url]).rollouts([fake.request(1, tokens=2_000_000)])
        with pytest.raises(UserError, match="boom"):
            RolloutClient([url]).rollouts([fake.request(666)])
        with pytest.raises(UserError, match="boom"):
            RolloutClient([url], patience=0.3).wait_until_ready()
    with pytest.raises(UserError, match="cannot be reached"):
        RolloutClient([DEAD], patience=0.3).rollouts(requests(2))


def test_a_full_queue_is_waited_for_and_does_not_cost_the_weights_again():
    engine, loads = fake.FakeEngine(delay=0.3), []
    load = engine.load_weights
    engine.load_weights = lambda flat, version, **options: (loads.append(version), load(flat, version, **options))
    with fake.serving(engine, limits=Limits(queued_groups=40)) as url:
        client = RolloutClient([url], patience=0.1)
        client.push_weights({"w": np.ones((3, 2), np.float32)}, 7)
        assert ids(client.rollouts(requests(64))) == list(range(64))
    assert loads == [7]


def test_a_sampler_restarted_while_nobody_asked_gets_its_weights_back():
    with fake.serving(fake.FakeEngine()) as url:
        client = RolloutClient([url])
        client.push_weights({"w": np.ones((3, 2), np.float32)}, 7)
        client.rollouts(requests(2))
    anew = fake.FakeEngine()
    with fake.serving(anew, port=int(url.rsplit(":", 1)[1])):
        groups = client.rollouts(requests(8))
    assert ids(groups) == list(range(8)) and anew.policy_version == 7
    assert {int(v) for group in groups for leaf in group.leaves for v in leaf.policy_version} == {7}


def test_one_copy_of_what_was_pushed_is_kept_for_samplers_that_come_back():
    flat = {"w": np.ones((3, 2), np.float32)}
    with fake.serving(fake.FakeEngine()) as url:
        client = RolloutClient([url])
        client.push_weights(dict(flat), 7)
        array = weakref.ref(flat.pop("w"))
        assert array() is None  # the file that was sent is kept
    anew = fake.FakeEngine()
    with fake.serving(anew, port=int(url.rsplit(":", 1)[1])):
        assert ids(client.rollouts(requests(2))) == [0, 1]
    assert anew.policy_version == 7 and (anew.weights["w"] == 1).all()


def test_a_proxy_without_its_sampler_is_a_sampler_that_is_away():
    class Proxy(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_error(502)

        def log_message(self, *_):
            pass

    proxy = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{proxy.server_address[1]}"
    with fake.serving(fake.FakeEngine()) as alive:
        assert ids(RolloutClient([url, alive]).rollouts(requests(8))) == list(range(8))
    with pytest.raises(UserError, match="cannot be reached .HTTP 502"):
        RolloutClient([url], patience=0.3).rollouts(requests(2))
    proxy.shutdown()


def test_the_token_comes_from_the_environment_as_the_samplers_does(monkeypatch):
    with fake.serving(fake.FakeEngine(), token="secret") as url:
        with pytest.raises(UserError, match="missing or wrong token"):
            RolloutClient([url]).rollouts(requests(1))
        assert RolloutClient([url], token="secret").rollouts(requests(1))
        monkeypatch.setenv("ARES_TOKEN", "secret")
        assert RolloutClient([url]).rollouts(requests(1))
