"""2,000 chats at once, twelve times over: are all answered, and does the sampler's memory stay where it was?

    python -m benchmarks.concurrency --config=configs/digits_cpu.py --workdir=runs/concurrency

Every chat has a connection of its own, a question with an image, and asks for at most 32 tokens. Memory is the resident set
of the sampler's process after each round.
"""

import asyncio
import json
import time
from pathlib import Path

import httpx
from ml_collections import ConfigDict

from ares_jax.commands import cli
from ares_jax.run.run import open_run
from data_pipeline.images import to_data_url

_CHATS, _ROUNDS = 2000, 12


def main(config: ConfigDict, workdir: Path) -> None:
    run = open_run(config, workdir)
    problems = run.problems("test")
    bodies = [_body(problems[i % len(problems)], i, workdir.absolute().name) for i in range(_CHATS)]
    with run.sampler() as client:
        pid = json.loads((workdir / "sampler.ready.json").read_text())["pid"]
        print("| round | answered | tokens | seconds | resident MB |\n|---|---|---|---|---|")
        for number in range(1, _ROUNDS + 1):
            begin = time.perf_counter()
            answers = asyncio.run(_ask(client.urls[0], bodies))
            seconds = time.perf_counter() - begin
            right = [a for a in answers if isinstance(a, dict) and a["choices"][0]["finish_reason"]]
            tokens = sum(a["usage"]["completion_tokens"] for a in right)
            print(f"| {number} | {len(right)} of {_CHATS} | {tokens} | {seconds:.1f} | {_resident(pid):.0f} |", flush=True)
            for reason in {str(a)[:200] for a in answers if not isinstance(a, dict)}:
                print(reason)


def _body(problem, seed: int, model: str) -> dict:
    content = [
        {"type": "image_url", "image_url": {"url": to_data_url(problem.images[0])}},
        {"type": "text", "text": problem.question},
    ]
    return {"model": model, "messages": [{"role": "user", "content": content}], "seed": seed, "max_tokens": 32}


async def _ask(url: str, bodies: list[dict]) -> list[dict | BaseException]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=600) as client:

        async def one(body: dict) -> dict:
            return (await client.post("/v1/chat/completions", json=body)).raise_for_status().json()

        return await asyncio.gather(*map(one, bodies), return_exceptions=True)


def _resident(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1e3


if __name__ == "__main__":
    cli.run(main)
