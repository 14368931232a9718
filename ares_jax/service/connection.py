"""The connection to one sampler: asks for rollouts, hands over weights, says what went wrong."""

import sys
import threading
import time
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from safetensors.numpy import save

from ares_jax.errors import UserError
from ares_jax.sampling.requests import RolloutRequest
from ares_jax.sampling.rollout_tree import RolloutTree
from ares_jax.service import transfer
from ares_jax.service.frame import MEDIA_TYPE, FrameError, FrameStream
from ares_jax.service.protocol import VERSION_HEADER, frame_requests, unframe_tree
from ares_jax.service.shared_memory import file_in

_PIECE = 2**20  # bytes handed to the socket at a time (httpcore copies the rest of a piece at every partial write)
_SILENCE = 60.0  # seconds; a sampler at work says so every few
_TAKEN = httpx.Timeout(10.0, read=600.0, write=_SILENCE)  # until weights are taken; then it looks whether they will be
_LARGEST_ANSWER = 2**32  # bytes of a tree
_LOOK = 1.0  # seconds between two such looks


class PushedWeights:
    """Weights and their version; as a safetensors file once one sampler or more take them so."""

    def __init__(self, flat: Mapping[str, np.ndarray], version: int):
        self.flat: Mapping[str, np.ndarray] | None = flat  # None: there is a file
        self.version = version
        self._body: bytes | None = None
        self._lock = threading.Lock()

    def body(self) -> bytes:
        with self._lock:
            if self._body is None:
                assert self.flat is not None
                self._body = save({name: np.ascontiguousarray(value) for name, value in self.flat.items()})
            return self._body

    def keep_one_copy(self) -> None:
        """Drops the arrays if there is a file of them: what is kept for samplers that come back is as large as the model."""
        with self._lock:
            if self._body is not None:
                self.flat = None


class FullError(Exception):
    """The sampler's queue has no room now."""


class Connection:
    """The connection to one sampler."""

    def __init__(self, url: str, headers: Mapping[str, str]):
        self.url = url
        self.stale = False  # it was lost: it may be a new process with other weights
        self.down_since: float | None = None
        self._given = False  # whether this client has given it weights
        self._fetches = True  # until it does not: each offer that it leaves would keep its arrays
        self._lock = threading.Lock()
        timeout = httpx.Timeout(10.0, read=_SILENCE, write=_SILENCE)
        self._client = httpx.Client(base_url=url, headers=headers, timeout=timeout)

    def trouble(self) -> str | None:
        """Returns why it is not ready, None if it is."""
        try:
            answer = self._client.get("/health", timeout=5.0)
        except httpx.HTTPError as error:
            return str(error) or type(error).__name__
        return None if answer.status_code == 200 else _reason(answer)

    def put_weights(self, weights: PushedWeights, in_flight: str = "continue") -> None:
        self.stale = True  # until it has them
        options: dict[str, Any] = {"version": weights.version, "in_flight": in_flight, "force": not self._given}
        with self._client.stream("GET", "/v1/weights") as ways:
            ours = ways.extensions["network_stream"].get_extra_info("client_addr")[0]  # while the connection is open
            ways.read()
        known = ways.json() if ways.status_code == 200 else {}
        # Nobody else has a folder of that name: if it is there, so is the sampler.
        folder = Path(known["shared_folder"]) if known.get("shared_folder") else None
        here = folder is not None and folder.is_dir()
        answer, flat = None, weights.flat
        if self._fetches and known.get("transfers") and not here and flat is not None:
            answer = self._offer(flat, ours, options)
        if answer is None:
            answer = self._hand_over(weights.body(), folder, options)
        if answer.status_code != 200:
            raise UserError(f"sampler {self.url} refused the weights: {_reason(answer)}")
        self.stale, self.down_since, self._given = False, None, True

    def _hand_over(self, body: bytes, folder: Path | None, options: Mapping[str, Any]) -> httpx.Response:
        with file_in(folder, body) as uri:
            if uri is not None:
                return self._send("POST", options, json={"uri": uri, **options})
            return self._send("PUT", options, params=options, **_content(body))

    def _send(self, method: str, options: Mapping[str, Any], **content: Any) -> httpx.Response:
        """Returns the answer to a push; if it takes long, because what has begun finishes first, what became of it."""
        try:
            return self._client.request(method, "/v1/weights", timeout=_TAKEN, **content)
        except httpx.ReadTimeout:
            while (now := self._client.get("/v1/weights")).status_code == 200:
                if options["version"] not in now.json()["coming"]:
                    if now.json()["policy_version"] == options["version"]:
                        return now
                    break
                time.sleep(_LOOK)
            raise

    def _offer(self, flat: Mapping[str, np.ndarray], address: str, options: Mapping[str, Any]) -> httpx.Response | None:
        """Has the sampler fetch them from `address`, as it knows this host. None: they cannot be offered there, or it could
        not fetch them, as through a proxy or a firewall; it says so, once, and is not asked again."""
        self._fetches = False
        try:
            answer = self._send("POST", options, json={**transfer.offer(flat, address), **options})
            if answer.status_code == transfer.FAILED:
                raise transfer.TransferError(_reason(answer))
        except transfer.TransferError as error:
            print(
                f"warning: sampler {self.url} cannot fetch weights from {address} ({error}); they go over HTTP from now on. "
                "Let it connect to every port of that address and keep cpu in JAX_PLATFORMS, or start it with "
                "--config.sampler.transfers=False", file=sys.stderr, flush=True,
            )  # fmt: skip
            return None
        self._fetches = answer.status_code == 200
        return answer

    def restore(self, pushed: PushedWeights | None) -> None:
        """Gives a sampler that was lost the weights that the others have."""
        with self._lock:
            if self.stale and pushed is not None:
                self.put_weights(pushed)
                pushed.keep_one_copy()

    def ask(
        self, requests: Sequence[RolloutRequest], pushed: PushedWeights | None
    ) -> Generator[tuple[int, RolloutTree] | None, None, None]:
        """Yields (index, group) as they finish, None as a sign of life.

        Raises `httpx.HTTPError` if the sampler is lost before the last, or has not the weights that were pushed;
        `FullError` if it has no room.
        """
        body = frame_requests(requests)
        with self._client.stream("POST", "/v1/rollouts", **_content(body, MEDIA_TYPE)) as answer:
            if answer.status_code in (429, 503) and "retry-after" in answer.headers:
                self.down_since = None
                raise FullError
            if answer.status_code in (502, 503, 504):  # a proxy, whose sampler is away
                raise httpx.ReadError(f"HTTP {answer.status_code}")
            self.down_since = None
            if answer.status_code != 200:
                answer.read()
                raise UserError(f"sampler {self.url} refused the rollouts: {_reason(answer)}")
            if pushed is not None and int(answer.headers.get(VERSION_HEADER, pushed.version)) < pushed.version:
                raise httpx.ReadError("it was started anew since the last request: its weights are other ones")
            count, stream = 0, FrameStream(_LARGEST_ANSWER)
            try:
                for piece in answer.iter_bytes():
                    for fields, arrays in stream.feed(piece):
                        if not fields:
                            yield None
                            continue
                        if "error" in fields:
                            raise UserError(f"sampler {self.url}: {fields['error']}")
                        yield unframe_tree(fields, arrays)
                        count += 1
            except FrameError as error:
                raise UserError(f"sampler {self.url}: {error}") from None
        if count < len(requests):
            raise httpx.ReadError(f"the answer ended after {count} of {len(requests)} groups")


def _content(body: bytes, kind: str = "application/octet-stream") -> dict[str, Any]:
    """Returns httpx's arguments to send a body in pieces of known total length."""
    pieces = (body[start : start + _PIECE] for start in range(0, len(body), _PIECE))
    return {"content": pieces, "headers": {"Content-Type": kind, "Content-Length": str(len(body))}}


def _reason(answer: httpx.Response) -> str:
    try:
        value = answer.json()
        error = value.get("detail") or value.get("error") or value["reason"]
        return str(error["message"] if isinstance(error, dict) else error)[:300]
    except (ValueError, KeyError, AttributeError):
        return f"HTTP {answer.status_code}"
