"""The HTTP server: rollouts and chats out, weights in. Loopback only, unless a token is set."""

import asyncio
import contextlib
import functools
import hmac
import json
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import uvicorn
from etils import epath
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import ValidationError

from ares_jax.errors import UserError
from ares_jax.metrics import write_json
from ares_jax.sampling.requests import RolloutRequest
from ares_jax.sampling.rollout_tree import RolloutTree
from ares_jax.service import frame, transfer
from ares_jax.service.chat import ChatFormat, RefusedError, error_body
from ares_jax.service.chat_routes import ChatLimits, PromptMaker, chat_router, refused
from ares_jax.service.draining import Drain
from ares_jax.service.frame import MEDIA_TYPE
from ares_jax.service.load import Load
from ares_jax.service.prometheus import make_registry
from ares_jax.service.protocol import (
    VERSION_HEADER,
    ChatGroupModel,
    GroupModel,
    RolloutsModel,
    TokenGroupModel,
    decode_request,
    encode_group,
    frame_tree,
    unframe_requests,
)
from ares_jax.service.shared_memory import shared_folder
from ares_jax.service.weight_routes import weight_router
from ares_jax.service.worker import EngineLike, Worker

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_DRAIN = 30.0  # seconds that running requests have to end after SIGTERM
_CUT = 1  # second that those have which then still run, once they are told to stop
_HEARTBEAT = 10.0  # seconds without a group after which an empty line says that the sampler lives


@dataclass(frozen=True)
class Limits:
    """Beyond these a request is refused: 413 for the body, 503 for the queue; `chat.waiting_bytes` bounds rollouts, too."""

    body_bytes: int = 64 * 2**30  # weights come as one body
    rollouts_bytes: int = 2**30  # of a body of rollouts
    queued_groups: int = 65_536
    chat: ChatLimits = ChatLimits()


def make_app(
    worker: Worker, *, model_name: str, token: str = "", limits: Limits = Limits(), chat_format: ChatFormat | None = None,
    image_hosts: Sequence[str] = (), weight_roots: Sequence[Path | epath.Path] = (), shared: Path | None = None,
    transfers: bool = False,
) -> FastAPI:  # fmt: skip
    """Returns the application. With a `token`, every path but /health asks for it as a bearer token.

    Without a `chat_format` there is no chat endpoint; `image_hosts` are those from which it may fetch images.
    Weights are read from files below `weight_roots` and `shared`, a folder in memory, only; with `transfers` they may be
    fetched from whoever asks for it.
    """
    started = int(time.time())
    app = FastAPI(title="ares-jax sampler", docs_url=None, redoc_url=None, max_body_size=limits.body_bytes)
    load = Load(limits.chat.waiting_bytes)
    registry, answers = make_registry(worker.stats)

    def refusal(request: Request) -> Response | None:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        known = scheme.lower() == "bearer" and hmac.compare_digest(given.encode(), token.encode())
        if token and request.url.path != "/health" and not known:
            return JSONResponse({"error": "missing or wrong token"}, 401, {"WWW-Authenticate": "Bearer"})
        size = request.headers.get("content-length", "")
        if size.isdecimal() and int(size) > limits.body_bytes:
            return JSONResponse({"error": f"the body is larger than {limits.body_bytes} bytes"}, 413)
        return None

    @app.middleware("http")
    async def guard(request: Request, call_next):
        answer = refusal(request) or await call_next(request)
        route = request.scope.get("route")  # not the path itself, of which a client could make up any number
        answers.labels(getattr(route, "path", "other"), answer.status_code).inc()
        return answer

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError):  # without the arrays it was given
        places = [f"{'.'.join(map(str, item['loc']))}: {item['msg'][:200]}" for item in error.errors()[:5]]
        text = "; ".join(places).encode(errors="backslashreplace").decode()  # half a surrogate pair is no UTF-8
        chat = request.url.path.startswith("/v1/chat/")
        return JSONResponse(error_body(422, text) if chat else {"detail": text}, 422)

    @app.exception_handler(RefusedError)
    async def refuse(request: Request, error: RefusedError):
        return refused(error)

    make_prompt = None
    if chat_format is not None:
        make_prompt = PromptMaker(chat_format, image_hosts, limits.chat)
        app.include_router(
            chat_router(worker, chat_format, make_prompt, model_name=model_name, load=load, limits=limits.chat)
        )
    app.include_router(weight_router(worker, roots=weight_roots, shared_folder=shared, transfers=transfers))

    @app.get("/health")
    async def health():
        if worker.failure:
            return JSONResponse({"status": "failed", "reason": worker.failure}, 500)
        return {"status": "ok", "policy_version": worker.policy_version}

    card = {"id": model_name, "object": "model", "created": started, "owned_by": "ares-jax"}

    @app.get("/v1/models")
    async def models():
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{name}")
    async def model(name: str):
        if name != model_name:
            raise RefusedError(404, f"no model {name[:80]!r} here, only {model_name!r}", field="model")
        return card

    @app.get("/metrics")
    async def metrics():
        return PlainTextResponse(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    def json_requests(data: bytes) -> RolloutsModel:
        try:
            return RolloutsModel.model_validate_json(data)
        except ValidationError as error:
            raise RequestValidationError([{**item, "loc": ("body", *item["loc"])} for item in error.errors()]) from None

    async def to_request(group: GroupModel | TokenGroupModel | ChatGroupModel) -> RolloutRequest:
        if isinstance(group, GroupModel):
            return await asyncio.to_thread(decode_request, group)
        if isinstance(group, TokenGroupModel):
            return group.request()
        if make_prompt is None:
            raise ValueError("this sampler takes encoded prompts only, no messages")
        return group.request(await make_prompt(group.messages))

    @app.post(
        "/v1/rollouts", max_body_size=min(limits.rollouts_bytes, limits.body_bytes), openapi_extra=_ROLLOUTS_BODY,
        responses={200: {"description": "A tree as each finishes", "content": {"application/x-ndjson": {}, MEDIA_TYPE: {}}}},
    )  # fmt: skip
    async def rollouts(request: Request):
        data, framed = await request.body(), request.headers.get("content-type", "").startswith(MEDIA_TYPE)
        with contextlib.ExitStack() as leaving:
            groups: Sequence[RolloutRequest | GroupModel | TokenGroupModel | ChatGroupModel]
            try:
                groups = await asyncio.to_thread(unframe_requests, data) if framed else json_requests(data).groups
            except ValueError as error:
                raise HTTPException(422, str(error)) from None
            # A place each, before anything more is made of them.
            places = load.places("groups", len(groups), limit=limits.queued_groups, status=503)
            held = leaving.enter_context(places)
            held.take(sent := sum(0 if isinstance(group, RolloutRequest) else group.sent_bytes for group in groups))
            requests, made = [], 0
            for group in groups:
                try:
                    requests.append(group if isinstance(group, RolloutRequest) else await to_request(group))
                except ValueError as error:
                    raise HTTPException(422, str(error)) from None
                made += requests[-1].patches.nbytes
                if sent + made > load.max_bytes:
                    raise RefusedError(413, f"images and patches of more than {load.max_bytes} bytes; ask in portions")
                held.take(sent + made)
            held.take(made)
            futures = [worker.rollout(request) for request in requests]
            answers = _answers(worker, futures, leaving.pop_all(), _FRAMES if framed else _LINES)
            await anext(answers)  # begun, it is sure to be closed, and with it the places given back
        headers = {VERSION_HEADER: str(worker.policy_version)}
        return StreamingResponse(answers, media_type=MEDIA_TYPE if framed else "application/x-ndjson", headers=headers)

    app.openapi = functools.partial(_document, app, app.openapi)  # type: ignore[method-assign]
    return app


_ROLLOUTS_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": {"$ref": "#/components/schemas/RolloutsModel"}},
            MEDIA_TYPE: {"schema": {"type": "string", "format": "binary"}},
        },
    }
}


def _document(app: FastAPI, make: Callable[[], dict]) -> dict:
    """Returns the OpenAPI document, with the schemas of a body that FastAPI does not read itself."""
    if app.openapi_schema is None:
        schemas = make()["components"]["schemas"]
        own = RolloutsModel.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas |= own.pop("$defs") | {"RolloutsModel": own}
    assert app.openapi_schema is not None
    return app.openapi_schema


class _Form(NamedTuple):
    """How an answer is written: a tree or an error with the number of its request, and a sign of life."""

    tree: Callable[[int, RolloutTree], bytes]
    error: Callable[[int, str], bytes]
    alive: bytes


def _line(index: int, **value) -> bytes:
    return json.dumps({"index": index, **value}).encode() + b"\n"


_LINES = _Form(lambda i, tree: _line(i, group=encode_group(tree)), lambda i, error: _line(i, error=error), b"\n")
_FRAMES = _Form(frame_tree, lambda i, error: frame.encode({"index": i, "error": error}, {}), frame.encode({}, {}))


async def _answers(
    worker: Worker, futures: Sequence[Future], places: contextlib.ExitStack, form: _Form
) -> AsyncIterator[bytes]:
    """Yields nothing once, then each tree as it finishes. Leaving it gives places back and stops the rest."""
    waiting = {asyncio.wrap_future(future): index for index, future in enumerate(futures)}
    with places:
        try:
            yield b""
            while waiting:
                done, _ = await asyncio.wait(waiting, timeout=_HEARTBEAT, return_when=asyncio.FIRST_COMPLETED)
                if not done:
                    yield form.alive
                for item in done:
                    index, error = waiting.pop(item), item.exception()
                    yield form.error(index, str(error)) if error else form.tree(index, item.result())
        finally:  # also when the client has gone
            for index in waiting.values():
                worker.cancel(futures[index])


class _Server(uvicorn.Server):
    """Drains at a signal. uvicorn's own way closes the door at once, and raises the signal again when it is done: the
    process would not end with 0."""

    def __init__(self, settings: uvicorn.Config, drain: Drain):
        super().__init__(settings)
        self._drain = drain

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._drain.begun and sig == signal.SIGINT:  # Ctrl-C once more
            self.should_exit = self.force_exit = True
        self._drain.begin()


def run_server(
    make_engine: Callable[[], EngineLike], *, host: str, port: int, model_name: str, ready_file: Path | None = None,
    make_chat_format: Callable[[], ChatFormat] | None = None, image_hosts: Sequence[str] = (),
    weight_roots: Sequence[Path | epath.Path] = (), transfers: bool = False, drain_seconds: float = _DRAIN,
    on_ready: Callable[[], None] = lambda: None, folder: Path = Path(),
) -> None:  # fmt: skip
    """Serves until SIGTERM, then lets running requests finish for `drain_seconds`. `port` 0 takes a free one.

    `make_chat_format`, `image_hosts`, `weight_roots`, `transfers`: as of `make_app`; `folder`: as of `Worker`.

    `ready_file` receives {"url", "pid"} once the server answers, and `on_ready` is called. The token is the environment
    variable ARES_TOKEN.

    Raises:
      UserError: the port is taken, the address is not loopback and there is no token, or `transfers` cannot be had.
    """
    token = os.environ.get("ARES_TOKEN", "")
    if host not in _LOOPBACK and not token:
        raise UserError(f"sampler.host={host} can be reached from outside: set the environment variable ARES_TOKEN")
    if transfers:
        transfer.require()
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise UserError(
            f"sampler.port={port} on {host}: {error.strerror}; stop what listens there, or use --config.sampler.port=0"
        ) from None
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))  # while it loads there is nothing to drain
    worker = Worker(make_engine(), folder)
    url = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
    chat_format = make_chat_format() if make_chat_format else None
    with shared_folder() as shared:
        app = make_app(
            worker, model_name=model_name, token=token, chat_format=chat_format, image_hosts=image_hosts,
            weight_roots=weight_roots, shared=shared, transfers=transfers,
        )  # fmt: skip
        drain = Drain(app)
        # No proxy's headers: weights are fetched from where a request comes from, not from where it says that it does.
        settings = uvicorn.Config(drain, log_level="warning", timeout_graceful_shutdown=_CUT, proxy_headers=False)
        server = _Server(settings, drain)

        async def serve():
            running = asyncio.create_task(server.serve(sockets=[listener]))
            while not server.started and not running.done():
                await asyncio.sleep(0.01)
            if ready_file is not None and server.started:
                write_json(ready_file, {"url": url, "pid": os.getpid()})
            print(f"sampler ready at {url}", flush=True)
            on_ready()
            await asyncio.wait(
                {running, asyncio.create_task(drain.finished(drain_seconds))}, return_when=asyncio.FIRST_COMPLETED
            )
            server.should_exit = True
            await running

        signal.signal(signal.SIGTERM, server.handle_exit)  # one that comes before uvicorn listens for it must not be lost
        # The terminal's Ctrl-C reaches the whole process group; the command that started this sampler stops it.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        asyncio.run(serve())
    worker.stop()
