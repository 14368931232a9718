"""The thread that owns the engine: errors, cancellation, and the order of commands."""

import jax.numpy as jnp
import numpy as np
import pytest
from fastapi.testclient import TestClient

from ares_jax.errors import UserError
from ares_jax.service.server import make_app
from ares_jax.service.worker import ConflictError, Worker
from tests.service import fake


@pytest.fixture
def engine():
    return fake.FakeEngine(delay=0.02, slots=1)


@pytest.fixture
def worker(engine):
    worker = Worker(engine)
    yield worker
    worker.stop()


def test_a_request_that_does_not_fit_fails_alone(worker):
    good, bad = worker.rollout(fake.request(1)), worker.rollout(fake.request(2, tokens=2_000_000))
    with pytest.raises(UserError, match="p2: too long"):
        bad.result(5)
    assert good.result(5).problem_id == "p1"
    assert worker.failure is None


def test_a_broken_engine_fails_all_and_the_worker_says_why(worker):
    futures = [worker.rollout(fake.request(seed)) for seed in (1, 2, 666)]
    for future in futures[1:]:
        with pytest.raises(RuntimeError, match="boom.*restart the sampler"):
            future.result(5)
    for later in (worker.rollout(fake.request(3)), worker.load_weights({}, 1)):
        with pytest.raises(RuntimeError, match="boom"):
            later.result(5)
    assert "boom" in worker.failure


def test_weights_that_others_overtake_are_not_told_to_be_in_use(worker, engine):
    flat = {"w": np.ones((3, 2), np.float32)}
    engine.weights_wait = True  # for what was begun
    first, second = (worker.load_weights(flat, version, finish=True) for version in (3, 4))
    with pytest.raises(ConflictError, match="version 3 waited until version 4 came"):
        first.result(5)
    with pytest.raises(ConflictError, match="version 2, but 4 is here"):
        worker.load_weights(flat, 2).result(5)
    assert not second.done()
    engine.weights_wait = False
    worker.rollout(fake.request(1)).result(5)
    assert second.result(5) == 4
    assert worker.load_weights(flat, 4).result(5) == 4  # once more
    assert worker.load_weights(flat, 2, force=True).result(5) == engine.policy_version == 2


def test_too_little_memory_is_said_with_what_to_change_and_a_profile(engine, tmp_path):
    engine.step = lambda: jnp.zeros(2**46).block_until_ready()
    worker = Worker(engine, tmp_path)
    with pytest.raises(RuntimeError, match=r"the engine failed: out of device memory .* fewer sampler.pages"):
        worker.rollout(fake.request(1)).result(60)
    worker.stop()
    with TestClient(make_app(worker, model_name="m")) as client:
        answer = client.get("/health")
    assert answer.status_code == 500 and f"{tmp_path}/memory.sampler.prof shows what was there" in answer.json()["reason"]
    assert (tmp_path / "memory.sampler.prof").stat().st_size > 0


def test_a_cancelled_group_leaves_the_engine(worker, engine):
    engine.slots = 0  # nothing finishes before it is cancelled
    futures = [worker.rollout(fake.request(seed)) for seed in range(20)]
    worker.cancel(futures[3])
    assert fake.until(lambda: engine.cancelled == [3])
    engine.slots = 1
    assert all(future.result(5) for i, future in enumerate(futures) if i != 3)
    worker.cancel(futures[0])  # finished long ago: nothing happens
    assert worker.rollout(fake.request(1)).result(5)
    assert engine.cancelled == [3] and not futures[3].done()


def test_an_engine_that_fails_to_cancel_is_reported(worker, engine):
    engine.slots = 0
    futures = [worker.rollout(fake.request(seed)) for seed in range(20)]
    engine.cancel = lambda number: 1 / 0
    worker.cancel(futures[0])
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        futures[1].result(5)


def test_a_reader_that_gives_up_does_not_hurt_the_thread(worker):
    future = worker.rollout(fake.request(1))
    future.cancel()  # what asyncio does to the future of a cancelled task
    assert worker.rollout(fake.request(2)).result(5)


def test_stopping_fails_what_is_in_flight(engine):
    engine.slots = 0  # it never finishes any
    worker = Worker(engine)
    futures = [worker.rollout(fake.request(seed)) for seed in range(3)]
    worker.stop()
    with pytest.raises(RuntimeError, match="stopping"):
        futures[0].result(5)
