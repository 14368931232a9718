"""2,000 chats at once on the tiny model: none is lost, and nothing of them stays."""

import asyncio
import gc
import json
import os
import resource
import time
from urllib.parse import urlsplit

import pytest

from tests import digits
from tests.service import fake
from tests.service.test_chat import FORMAT

CHATS = 2000


async def _ask(url: str, seed: int) -> tuple[str, str, int]:
    """Returns text, finish reason and number of tokens of the answer to a chat on a connection of its own."""
    body = json.dumps(
        {"model": "fake", "messages": [{"role": "user", "content": "Add."}], "seed": seed, "max_tokens": 1 + seed % 3}
    ).encode()
    reader, writer = await asyncio.open_connection(urlsplit(url).hostname, urlsplit(url).port)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    writer.write(head.encode() + b"\r\nConnection: close\r\n\r\n" + body)
    answer = await reader.read()
    writer.close()
    first, _, rest = answer.partition(b"\r\n")
    assert first == b"HTTP/1.1 200 OK", answer
    value = json.loads(rest.partition(b"\r\n\r\n")[2])
    (choice,) = value["choices"]
    return choice["message"]["content"], choice["finish_reason"], value["usage"]["completion_tokens"]


async def _all(url: str, count: int) -> list[tuple[str, str, int]]:
    return await asyncio.gather(*(_ask(url, seed) for seed in range(count)))


@pytest.fixture
def descriptors():
    """Both ends of every connection are this process's."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 2 * CHATS + len(os.listdir("/proc/self/fd")) + 50
    if hard != resource.RLIM_INFINITY and hard < needed:
        pytest.skip(f"{CHATS} chats need {needed} file descriptors, the hard limit (`ulimit -Hn`) is {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def _objects() -> int:
    gc.collect()
    return len(gc.get_objects())


def test_two_thousand_chats_at_once_are_answered_and_leave_nothing_behind(monkeypatch, descriptors):
    engine = digits.engine()
    step, most = engine.step, 0

    def step_when_all_wait():
        """None is answered before all have come."""
        nonlocal most
        if held and most < CHATS:
            most = engine.stats()["waiting"]
            time.sleep(0.01)
            return []
        return step()

    monkeypatch.setattr(engine, "step", step_when_all_wait)
    with fake.serving(engine, chat_format=FORMAT) as url:
        held = False
        few = asyncio.run(_all(url, 200))
        before, held = _objects(), True
        answers = asyncio.run(_all(url, CHATS))
        kept = _objects() - before
    assert most == CHATS  # all were in the sampler together
    assert all(reason == "stop" or count == 1 + seed % 3 for seed, (_, reason, count) in enumerate(answers))
    assert few == answers[:200]
    assert kept < CHATS / 10  # not an object of every tenth
    assert engine.stats()["free_pages"] == 399 and not engine.busy
