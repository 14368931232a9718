"""Many questions to an OpenAI-compatible endpoint: concurrent, rate-limited, retried; a clear error when it is away."""

import asyncio
import os
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import httpx
from ml_collections import ConfigDict

from ares_jax.errors import UserError
from data_pipeline.errors import DataError
from data_pipeline.images import to_data_url
from data_pipeline.messages import message_parts
from data_pipeline.problems import Problem

_WAIT = frozenset({429, 503})  # it lives, but has no room: wait as for one that is away
_AGAIN = frozenset({408, 409, 425, 500, 502, 504})  # may be this request's own fault: a few times, then give it up
_FATAL = {401: "the key is missing or wrong", 403: "the key may not", 404: "no such path or model"}
_CUT = (httpx.ReadTimeout, httpx.WriteTimeout, httpx.ReadError, httpx.RemoteProtocolError)  # it took the request, at least
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 60.0  # seconds between two attempts: doubled each time, with jitter
_REFUSALS = 20  # in a row, and more than it ever answered: the fault is not the problems', of which some may be too long


@dataclass(frozen=True)
class Response:
    """One sampled text; `finish_reason` "length" says that it was cut."""

    text: str
    finish_reason: str = "stop"


@dataclass(frozen=True)
class Answer:
    """All samples of one problem, and the tokens that the endpoint says it drew and read (0: it does not say)."""

    responses: tuple[Response, ...]
    tokens: int
    prompt_tokens: int = 0


def messages(problem: Problem, instruction: str) -> list[dict]:
    """Returns the chat of a problem: its images and the question, the instruction below it. Raises `DataError` on videos."""
    if problem.videos:
        raise DataError(f"problem {problem.problem_id}: videos are not sent to an endpoint; give their frames as images")
    asked = replace(problem, question=f"{problem.question}\n{instruction}") if instruction else problem
    images = iter(problem.images)
    parts = [
        part if part["type"] == "text" else {"type": "image_url", "image_url": {"url": to_data_url(next(images))}}
        for part in message_parts(asked)
    ]
    return [{"role": "user", "content": parts if problem.images else asked.question}]


def ask_all(
    config: ConfigDict,
    keys: Iterable[int],
    chat: Callable[[int], list[dict]],
    seed: Callable[[int], int],
    grade: Callable[[int, Answer], Any],
    *,
    samples: int,
    max_tokens: int,
    on_answer: Callable[[Any], None],
    on_refusal: Callable[[int, str], None],
    api_key: str = "",
) -> None:
    """Asks `config` (an endpoint's section of the config) for `samples` responses to `chat(key)`, for every key.

    `api_key`: by default what the environment variable `config.key_variable` holds.

    `grade(key, answer)` runs in threads; `on_answer` gets what it returns, one at a time, in the order of arrival.
    `on_refusal(key, reason)` gets what the endpoint will not answer, or cannot be asked.

    Raises:
      UserError: the endpoint is away for `config.patience` seconds, the key or the model is wrong, or it refuses all.
    """
    client = _Client(config, samples, max_tokens, api_key)
    work = iter(keys)

    async def worker() -> None:
        for key in work:
            try:
                answer = await client.answer(await asyncio.to_thread(chat, key), seed(key))
            except (_RefusedError, DataError) as refusal:
                on_refusal(key, str(refusal))
            else:
                on_answer(await asyncio.to_thread(grade, key, answer))

    async def main() -> None:
        async with client.http:
            tasks = [asyncio.create_task(worker()) for _ in range(config.concurrency)]
            try:
                await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(main())


class _RefusedError(Exception):
    """The endpoint does not answer this one request."""


class _Client:
    def __init__(self, config: ConfigDict, samples: int, max_tokens: int, api_key: str = ""):
        key = api_key or os.environ.get(config.key_variable, "")
        self.http = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(config.timeout, connect=10.0),
            limits=httpx.Limits(max_connections=config.concurrency),
        )
        self._config, self._samples = config, samples
        self._url = f"{config.url.rstrip('/').removesuffix('/v1')}/v1/chat/completions"
        self._body = {
            "model": config.model, "temperature": config.temperature, "top_p": config.top_p, "max_tokens": max_tokens,
        }  # fmt: skip
        self._most = samples  # choices a request asks for; 1 once that has helped
        self._gap = 60.0 / config.requests_per_minute if config.requests_per_minute else 0.0
        self._next = 0.0  # when the next request may start
        self._down_since: float | None = None
        self._refusals = self._answers = 0

    async def answer(self, chat: list[dict], seed: int) -> Answer:
        """Returns all samples of one chat, in as many requests as the endpoint needs for them."""
        responses: list[Response] = []
        tokens, read, most = 0, 0, self._most
        while len(responses) < self._samples:
            most = min(most, self._samples - len(responses))
            body = {**self._body, "messages": chat, "n": most, "seed": (seed + len(responses)) % 2**31}
            try:
                value = await self._post(body)
            except _RefusedError:
                if most == 1:
                    raise
                most = 1  # many servers take no n: is it that, or the problem?
                continue
            if most < min(self._most, self._samples - len(responses)):
                self._most = most
            tokens += _count(value, "completion_tokens")
            read += _count(value, "prompt_tokens")
            responses += [_response(choice) for choice in value["choices"]]
        self._refusals, self._answers = 0, self._answers + 1
        return Answer(tuple(responses[: self._samples]), tokens, read)

    async def _post(self, body: dict) -> dict:
        attempts, wait = 0, _FIRST_WAIT
        while True:
            await self._pace()
            after = 0.0
            try:
                reply = await self.http.post(self._url, json=body)
                reason = _reason(reply)
                if reply.status_code == 200 and (value := _json(reply)) and _has_choices(value):
                    self._down_since = None
                    return value
                if reply.status_code in _FATAL:
                    hint = _FATAL[reply.status_code]
                    raise UserError(
                        f"{self._url}, model {self._config.model!r}: {reason}; {hint}: mend the endpoint's url or model, "
                        f"or the key (environment variable {self._config.key_variable})"
                    )
                away = reply.status_code in _WAIT
                own = reply.status_code in _AGAIN or reply.status_code == 200
                after = _seconds(reply.headers.get("retry-after"))
            except httpx.TransportError as error:
                reason = str(error) or type(error).__name__
                own = isinstance(error, _CUT)
                away = not own
            if away:
                self._check_patience(reason)
            else:
                attempts += 1
                if not own or attempts > self._config.retries:
                    self._refused(body, reason)
            await asyncio.sleep(max(after, wait * random.uniform(0.5, 1.0)))
            wait = min(2 * wait, _LONGEST_WAIT)

    async def _pace(self) -> None:
        now = time.monotonic()
        start = max(now, self._next)
        self._next = start + self._gap
        await asyncio.sleep(start - now)

    def _check_patience(self, reason: str) -> None:
        now = time.monotonic()
        self._down_since = self._down_since or now
        if now - self._down_since > self._config.patience:
            raise UserError(
                f"{self._url} is away for more than {self._config.patience:g} s ({reason}); start it or mend "
                "the endpoint's url, then run the same command: it goes on where it was"
            )

    def _refused(self, body: dict, reason: str) -> None:
        if body["n"] == 1:
            self._refusals += 1
        if self._refusals > max(_REFUSALS, self._answers):
            raise UserError(f"{self._url} refused {self._refusals} problems in a row; the last: {reason}")
        raise _RefusedError(reason)


def _response(choice: dict) -> Response:
    message = choice.get("message") or {}
    text = str(message.get("content") or "")
    if thought := message.get("reasoning_content") or message.get("reasoning"):  # servers that part the thinking off
        text = f"<think>{thought}</think>{text}"
    return Response(text, str(choice.get("finish_reason") or "stop"))


def _has_choices(value: dict) -> bool:
    choices = value.get("choices")
    whole = isinstance(choices, list) and all(isinstance(c, dict) and isinstance(c.get("message"), dict) for c in choices)
    return bool(choices) and whole


def _count(value: dict, name: str) -> int:
    usage = value.get("usage")
    count = usage.get(name) if isinstance(usage, dict) else 0
    return count if isinstance(count, int) else 0


def _json(reply: httpx.Response) -> dict | None:
    try:
        value = reply.json()
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _reason(reply: httpx.Response) -> str:
    value = (_json(reply) or {}) if reply.status_code != 200 else {"error": "an answer without choices"}
    error = value.get("error") or value.get("detail") or value.get("message") or ""
    error = error.get("message", "") if isinstance(error, dict) else error
    return f"HTTP {reply.status_code} {str(error)[:300]}".strip()


def _seconds(header: str | None) -> float:
    try:
        return min(max(float(header or 0), 0.0), _LONGEST_WAIT)
    except ValueError:  # a date
        return 0.0
