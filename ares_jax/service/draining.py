"""How a service ends: what has begun may finish, whoever comes is told to go elsewhere."""

import asyncio
import json

from starlette.types import ASGIApp, Receive, Scope, Send

_LOOK = 0.02  # seconds between two looks whether the last request has been answered


class Drain:
    """Wraps an application. Before `begin` every request passes and is counted until its answer's last byte; then newcomers
    are answered 503."""

    def __init__(self, app: ASGIApp):
        self._app, self._open, self.begun = app, 0, False

    def begin(self) -> None:
        """May be called from a signal handler."""
        self.begun = True

    async def finished(self, seconds: float) -> None:
        """Returns once it has begun, and all requests were answered or `seconds` are over."""
        while not self.begun:
            await asyncio.sleep(_LOOK)
        end = asyncio.get_running_loop().time() + seconds
        while self._open and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(_LOOK)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif self.begun:
            body = json.dumps({"error": "the sampler is stopping; ask another one"}).encode()
            headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
            await _discard(receive)
            await send({"type": "http.response.start", "status": 503, "headers": headers})
            await send({"type": "http.response.body", "body": body})
        else:
            self._open += 1
            try:
                await self._app(scope, receive, send)
            finally:
                self._open -= 1


async def _discard(receive: Receive) -> None:
    """Reads a request's body to its end: a connection closed with bytes unread is reset, and the answer may be lost."""
    while (message := await receive())["type"] == "http.request" and message.get("more_body"):
        pass
