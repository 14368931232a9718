"""SIGTERM in this very process: what it is while it raises, while it is held, and what it breaks off."""

import os
import signal
import threading
import time

import pytest

from ares_jax.errors import BrokenOffError, Preempted
from ares_jax.lifecycle import preemption
from ares_jax.lifecycle.preemption import agreed, breaking_off, from_first, held, told
from ares_jax.sampling.gathering import GatheringSampler
from ares_jax.sampling.local import LocalSampler
from ares_jax.service.client import RolloutClient
from tests.service import fake


def go():
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture
def listening():
    preemption.listen()
    yield
    preemption._listener.close()
    preemption._listener = None


def test_it_raises_once_and_never_in_what_is_held(listening):
    with held():
        go()
        assert told() and agreed()
    go()  # it was told already: a save after the block is not interrupted
    with pytest.raises(Preempted), preemption._interrupted():
        pytest.fail("it began")
    go()


def test_alone_it_raises_wherever_the_main_thread_is(listening):
    with pytest.raises(Preempted, match="all that was done is on disk"):
        go()
        time.sleep(60)
    go()  # what it ended is put away in peace


def test_work_of_the_first_process_is_interrupted_and_its_value_passed_on(listening):
    assert from_first(lambda: 3) == 3
    with pytest.raises(Preempted):
        from_first(lambda: (go(), time.sleep(60)))


def test_without_a_command_a_block_listens_for_itself():
    before = signal.getsignal(signal.SIGTERM)
    with held():
        go()
        assert told()
    assert not told() and signal.getsignal(signal.SIGTERM) is before


def test_a_main_thread_that_waits_hears_of_it(listening):
    ended = threading.Event()
    with held(), breaking_off(ended.set):
        threading.Timer(0.1, go).start()
        assert ended.wait(60)
    again = threading.Event()
    with breaking_off(again.set):  # it was told before
        assert again.is_set()


@pytest.mark.parametrize("colocated", [True, False])
def test_all_rollouts_are_broken_off_and_what_came_is_told(listening, colocated):
    engine, came = fake.FakeEngine(slots=1, delay=0.01), []
    requests = [fake.request(seed, leaves=2, tokens=5) for seed in range(600)]

    def arrived(index, group):
        came.append(index)
        if len(came) == 5:
            go()

    def ask(client):
        with pytest.raises(Preempted):
            GatheringSampler(client).rollouts(requests, on_group=arrived)
        with pytest.raises(BrokenOffError):  # nothing begins any more
            client.rollouts(requests[:2])

    if colocated:
        ask(LocalSampler(engine))
    else:
        with fake.serving(engine) as url:
            ask(RolloutClient([url]))
    assert 5 <= len(came) < 600
