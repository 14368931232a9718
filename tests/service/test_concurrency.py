"""2,000 chats at once on the tiny model, again and again: none is lost, and the server's memory stays."""

import asyncio
import json
import os
import resource
import subprocess
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.service import fake
from tests.warm_python import warm_python
from tests.xla import EVERYTHING

CHATS, ROUNDS = 2000, 5 if EVERYTHING else 3
_SERVER = f"""
import sys, time
from pathlib import Path
sys.path.insert(0, ".")
from tests import conftest, digits
from tests.service.test_chat import FORMAT
from ares_jax.service.server import run_server
engine = digits.engine()
step, hold = engine.step, True

def step_when_all_wait():
    "None is answered before all have come."
    global hold
    if hold and engine.stats()["waiting"] < {CHATS}:
        time.sleep(0.01)
        return []
    hold = False
    finished = step()
    hold = not engine.busy
    return finished

engine.step = step_when_all_wait
run_server(lambda: engine, host="127.0.0.1", port=0, model_name="fake", ready_file=Path(sys.argv[1]),
           make_chat_format=lambda: FORMAT)
"""


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


async def _all(url: str) -> list[tuple[str, str, int]]:
    return await asyncio.gather(*(_ask(url, seed) for seed in range(CHATS)))


@pytest.fixture
def descriptors():
    """An end of every connection is this process's, the other the server's, which inherits the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = CHATS + len(os.listdir("/proc/self/fd")) + 100
    if soft < needed:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (needed, max(needed, hard)))
        except (ValueError, OSError):
            pytest.skip(f"{CHATS} chats need {needed} file descriptors, the hard limit (`ulimit -Hn`) is {hard}")
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


def _resident(pid: int) -> int:
    """Returns the bytes of a process's memory that are in RAM."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()


def test_two_thousand_chats_at_once_are_answered_and_memory_stays(tmp_path, descriptors):
    ready = tmp_path / "ready.json"
    process = subprocess.Popen([warm_python(), "-c", _SERVER, str(ready)])
    try:
        assert fake.until(lambda: ready.exists() or process.poll() is not None, 300)
        url, answers, memory = json.loads(ready.read_text())["url"], [], []
        for _ in range(ROUNDS):
            answers.append(asyncio.run(_all(url)))
            memory.append(_resident(process.pid))
    finally:
        process.terminate()
    assert process.wait(60) == 0
    assert all(reason == "stop" or count == 1 + seed % 3 for seed, (_, reason, count) in enumerate(answers[0]))
    assert all(other == answers[0] for other in answers)
    assert memory[-1] <= 1.05 * memory[1], memory
