"""The chat endpoint: `/v1/chat/completions`, whole or streamed, for any OpenAI client."""

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from ares_jax.errors import UserError
from ares_jax.sampling.requests import Piece, RolloutRequest
from ares_jax.service import chat as wire
from ares_jax.service.chat import ChatFormat, ChatModel, Delta, RefusedError
from ares_jax.service.chat_images import decode_all, encoded_images
from ares_jax.service.load import Load
from ares_jax.service.worker import Worker
from data_pipeline.prompts import Prompt

_ENCODERS = 4  # prompts made at a time: each holds its images' pixels several times over


@dataclass(frozen=True)
class ChatLimits:
    """Beyond these a chat is refused: 413 for body and pixels, 422 for the number of images, 429 for what waits."""

    body_bytes: int = 64 * 2**20
    images: int = 256
    image_pixels: int = 2**26  # of all images of a chat, before they are scaled
    waiting: int = 4096  # chats taken in and not yet answered
    waiting_bytes: int = 8 * 2**30  # of images and pixel patches that they and the rollouts hold


class PromptMaker:
    """Messages with images to prompts, a few at a time. `image_hosts`: from which images are fetched over HTTP."""

    def __init__(self, chat_format: ChatFormat, image_hosts: Sequence[str], limits: ChatLimits):
        self._format, self._hosts, self._limits = chat_format, image_hosts, limits
        self._few = asyncio.Semaphore(_ENCODERS)

    async def __call__(self, messages: Sequence[wire.Message]) -> Prompt:
        """Raises `RefusedError`."""
        urls, limits = wire.image_urls(messages), self._limits
        if len(urls) > limits.images:
            raise RefusedError(422, f"{len(urls)} images, the limit is {limits.images}; send fewer", field="messages")
        async with self._few:
            encoded = await encoded_images(urls, hosts=self._hosts, max_bytes=limits.body_bytes)
            return await asyncio.to_thread(
                lambda: self._format.prompt(messages, decode_all(encoded, max_pixels=limits.image_pixels))
            )


def chat_router(
    worker: Worker,
    chat_format: ChatFormat,
    make_prompt: PromptMaker,
    *,
    model_name: str,
    load: Load,
    limits: ChatLimits = ChatLimits(),
) -> APIRouter:
    """Returns the endpoint. `load`: what waits already, of rollouts too."""
    router = APIRouter(max_body_size=limits.body_bytes)

    @router.post("/v1/chat/completions")
    async def chat_completions(chat: ChatModel, request: Request):
        if worker.failure:
            raise RefusedError(503, worker.failure)
        if chat.model != model_name:
            raise RefusedError(404, f"no model {chat.model[:80]!r} here, only {model_name!r}", field="model")
        chat.check()
        with contextlib.ExitStack() as leaving:
            hold = leaving.enter_context(load.places("chats", 1, limit=limits.waiting, status=429))
            hold.take(sent := sum(map(len, wire.image_urls(chat.messages))))
            prompt = await make_prompt(chat.messages)
            hold.take(sent + prompt.patches.nbytes)
            count = len(prompt.token_ids)
            rollout = wire.rollout(chat, prompt, worker.room(count, chat.choices))
            try:
                worker.check(rollout)
            except UserError as error:
                raise RefusedError(422, str(error).removeprefix("problem chat: ")) from None
            head = {
                "id": f"chatcmpl-{uuid.uuid4().hex}",
                "created": int(time.time()),
                "model": model_name,
                "system_fingerprint": f"policy-{worker.policy_version}",
            }
            responses = [chat_format.response(chat, index) for index in range(chat.choices)]
            deltas = _deltas(worker, rollout, responses)
            if chat.stream:
                counted = chat.stream_options is not None and bool(chat.stream_options.include_usage)
                events = _events(deltas, head, responses, count, counted, leaving.pop_all())
                first = await anext(events)  # begun, it is sure to be closed, and with it its place given back
                return StreamingResponse(_after(first, events), media_type="text/event-stream")
            parts = await _while_there(request, _collect(deltas, responses))
            if parts is None:
                return Response(status_code=499)  # for the log: nobody reads it
            return JSONResponse(wire.completion(head, parts, count))

    return router


def refused(error: RefusedError) -> JSONResponse:
    """Returns the answer that says why a chat is refused."""
    headers = {"Retry-After": "1"} if error.status in (429, 503) else None
    return JSONResponse(wire.error_body(error.status, str(error), error.field), error.status, headers)


async def _deltas(
    worker: Worker, rollout: RolloutRequest, responses: Sequence[wire.Response]
) -> AsyncIterator[tuple[wire.Response, Delta]]:
    """Draws all responses and yields what each grows by. Leaving it stops the engine's work on them.

    Raises `RefusedError` with 503 if the engine fails.
    """
    loop, queue = asyncio.get_running_loop(), asyncio.Queue[list[Piece] | None]()

    def tell(pieces: list[Piece] | None) -> None:  # in the engine's thread
        with contextlib.suppress(RuntimeError):  # the server has ended
            loop.call_soon_threadsafe(queue.put_nowait, pieces)

    future = worker.rollout(rollout, tell)
    future.add_done_callback(lambda _: tell(None))
    try:
        while not all(response.finish_reason for response in responses):
            if (pieces := await queue.get()) is None:
                raise RefusedError(503, str(future.exception()))
            for piece in pieces:
                response = responses[piece.leaf]
                if response.finish_reason:
                    continue
                yield response, response.take(piece)
    finally:
        worker.cancel(future)


async def _collect(deltas, responses: Sequence[wire.Response]) -> list[tuple[wire.Response, Delta]]:
    grown = {response.index: Delta("", []) for response in responses}
    texts: dict[int, list[str]] = {response.index: [] for response in responses}
    async with contextlib.aclosing(deltas):
        async for response, delta in deltas:
            texts[response.index].append(delta.text)
            grown[response.index].log_probs.extend(delta.log_probs)
    return [(r, Delta("".join(texts[r.index]), grown[r.index].log_probs)) for r in responses]


async def _events(
    deltas, head: dict[str, Any], responses: Sequence[wire.Response], prompt_tokens: int, counted: bool,
    place: contextlib.ExitStack,
) -> AsyncIterator[str]:  # fmt: skip
    """Yields the server-sent events of a streamed answer, and gives its place back at the end."""
    nothing = {"usage": None} if counted else {}
    with place:
        for response in responses:
            yield _event({**wire.chunk(head, response, None), **nothing})
        try:
            async with contextlib.aclosing(deltas):
                async for response, delta in deltas:
                    if delta.text or delta.log_probs:
                        yield _event({**wire.chunk(head, response, delta), **nothing})
                    if reason := response.finish_reason:
                        yield _event({**wire.chunk(head, response, None, finish_reason=reason), **nothing})
        except RefusedError as error:  # the status is sent: OpenAI's clients look here too
            yield _event(wire.error_body(error.status, str(error)))
            return
        if counted:
            total = wire.usage(responses, prompt_tokens)
            yield _event({**head, "object": "chat.completion.chunk", "choices": [], "usage": total})
        yield "data: [DONE]\n\n"


async def _after(first: str, events: AsyncIterator[str]) -> AsyncIterator[str]:
    yield first
    async for event in events:
        yield event


async def _while_there(request: Request, work):
    """Returns the result of `work`, or None, and stops it, when the client has gone."""

    async def disconnected() -> None:  # `request.is_disconnected` says no behind a middleware
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(disconnected())
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        task.cancel()
        gone.cancel()


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"
