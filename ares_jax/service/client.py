"""The client: spreads groups over the samplers, survives the loss of one, pushes weights to all."""

import contextlib
import json
import math
import os
import sys
import threading
import time
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import httpx
import jax
import numpy as np
from safetensors.numpy import save

from ares_jax.errors import BrokenOffError, UserError
from ares_jax.parallel.distributed import to_host
from ares_jax.sampling.requests import RolloutRequest
from ares_jax.sampling.rollout_tree import RolloutTree
from ares_jax.sampling.sampler import NamedArrays, OnTree, ignore, named
from ares_jax.service import transfer
from ares_jax.service.protocol import VERSION_HEADER, decode_group, encode_request
from ares_jax.service.shared_memory import file_in

_STREAMS = 2  # requests to a sampler at a time: the next is queued there while the last leaves of one are drawn
_CHUNK = 64  # groups a request carries, at most: small enough to spread, large enough to fill an engine
_PIECE = 2**20  # bytes handed to the socket at a time (httpcore copies the rest of a piece at every partial write)
_CHUNK_BYTES = 64 * 2**20  # of pixels a request carries, at most, unless a single group has more
_SILENCE = 60.0  # seconds; a sampler at work says so every few
_TAKEN = httpx.Timeout(10.0, read=600.0, write=_SILENCE)  # until weights are taken; then it looks whether they will be
_LOOK = 1.0  # seconds between two such looks
_SLOW = 3.0  # times as long as the slowest request that has been answered whole: then idle samplers are asked too


class RolloutClient:
    """Talks to one or several samplers with the same weights. `patience`: seconds without any before giving up.

    `token`: what the samplers ask for; the environment variable ARES_TOKEN by default, as for the samplers themselves.
    """

    def __init__(self, urls: Sequence[str], *, token: str = "", patience: float = 120.0):
        token = token or os.environ.get("ARES_TOKEN", "")
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._samplers = [_Sampler(url, headers) for url in urls]
        self.urls = tuple(urls)
        self._patience = patience
        self._pushed: _Weights | None = None  # for samplers that come back
        self._jobs: list[_Job] = []  # in progress
        self._broken_off = False

    def wait_until_ready(self) -> None:
        """Returns once every sampler answers. Raises `UserError` when the patience is over."""
        deadline = time.monotonic() + self._patience
        for sampler in self._samplers:
            while (trouble := sampler.trouble()) is not None:
                if time.monotonic() > deadline:
                    raise _unreachable(sampler, trouble)
                time.sleep(0.2)

    def push_weights(
        self, params: NamedArrays, version: int, *, in_flight: Literal["continue", "finish"] = "continue"
    ) -> None:
        """Gives every sampler new weights, all at a time; one that is away gets them when it is back.

        A sampler on this machine gets them through its memory, others fetch them through JAX's transfer server if they are
        willing and able to, or get them through HTTP. What a sampler has begun goes on with them, or, by `in_flight`,
        finishes with the old ones first. A lower version than this client pushed before is refused, but not one that is
        only lower than what the samplers had before: a run that resumes may be behind them.

        Raises:
          UserError: one refuses them, or none could be reached for `patience` seconds.
        """
        flat = {name: to_host(x) if isinstance(x, jax.Array) else x for name, x in named(params)}
        weights = _Weights(flat, version)
        deadline = time.monotonic() + self._patience

        def give(sampler: _Sampler) -> httpx.HTTPError | None:
            try:
                sampler.put_weights(weights, in_flight)
            except httpx.HTTPError as error:
                return error
            return None

        with ThreadPoolExecutor(len(self._samplers)) as pool:
            while None not in (errors := list(pool.map(give, self._samplers))):
                if time.monotonic() > deadline:
                    raise _unreachable(self._samplers[-1], errors[-1] or "") from None
                time.sleep(0.2)
        weights.keep_one_copy()
        self._pushed = weights

    def rollouts(self, requests: Sequence[RolloutRequest], on_group: OnTree = ignore) -> list[RolloutTree]:
        """Returns the groups in the order of `requests`; `on_group(index, group)` is told of each as it arrives.

        Each group is taken exactly once. What a lost sampler had not delivered goes to the others, or to itself when it
        is back; it is given the weights pushed last before it is asked for anything. What a slow one holds is asked, once
        more, of one that is idle; the first answer counts.

        Raises:
          UserError: a request is refused, or no sampler was reachable for `patience` seconds.
          BrokenOffError: `break_off` was called.
        """
        job = _Job(requests, on_group, _chunks(requests, _STREAMS * len(self._samplers)))
        self._jobs.append(job)
        if self._broken_off:
            job.fail(BrokenOffError())
        threads = [
            threading.Thread(target=self._work, args=(sampler, job), daemon=True)
            for sampler in self._samplers
            for _ in range(_STREAMS)
        ]
        for thread in threads:
            thread.start()
        try:
            with job.changed:
                job.changed.wait_for(lambda: job.over)
        except BaseException as error:  # Ctrl-C
            job.fail(error)
            raise
        finally:
            self._jobs.remove(job)
        if job.failure is not None:
            raise job.failure
        for thread in threads:
            thread.join(timeout=1.0)  # one may still read a group that came from elsewhere
        return [job.groups[index] for index in range(len(requests))]

    def break_off(self) -> None:
        """Ends `rollouts`, whatever the samplers do, and lets none begin any more. From any thread."""
        self._broken_off = True
        for job in list(self._jobs):
            job.fail(BrokenOffError())

    def _work(self, sampler: "_Sampler", job: "_Job") -> None:
        while (chunk := job.next_chunk(sampler)) is not None:
            try:
                sampler.restore(self._pushed)
                asked = [job.requests[index] for index in chunk]
                with contextlib.closing(sampler.ask(asked, self._pushed)) as answers:
                    for answer in answers:
                        if answer is not None:
                            job.take(chunk[answer[0]], answer[1])
                        if job.over:  # what is left came from elsewhere: hanging up stops the work on it
                            return
                job.answered(sampler, chunk)
            except _FullError:
                job.give_back(sampler, chunk)
                time.sleep(0.2)
            except httpx.HTTPError as error:
                job.give_back(sampler, chunk)
                sampler.stale = True
                if sampler.down_since is None:
                    sampler.down_since = time.monotonic()
                if self._all_down():
                    job.fail(_unreachable(sampler, error))
                time.sleep(0.2)
            except Exception as error:
                job.fail(error)

    def _all_down(self) -> bool:
        """Whether no sampler was reachable for `patience` seconds."""
        now = time.monotonic()
        since = [sampler.down_since for sampler in self._samplers]  # other threads change them meanwhile
        return all(start is not None and now - start > self._patience for start in since)


class _Weights:
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


@dataclass(eq=False)
class _Asked:
    """A chunk that a sampler works on."""

    sampler: "_Sampler"
    chunk: list[int]
    since: float
    again: bool  # it was asked of another before, or is by now


class _Job:
    """One call of `rollouts`: what its threads share."""

    def __init__(self, requests: Sequence[RolloutRequest], on_group, chunks: list[list[int]]):
        self.requests, self._on_group, self._chunks = requests, on_group, chunks
        self.groups: dict[int, RolloutTree] = {}
        self.failure: BaseException | None = None
        self.changed = threading.Condition()
        self._asked: list[_Asked] = []
        self._longest = math.inf  # seconds a request took that was answered whole

    @property
    def over(self) -> bool:
        return self.failure is not None or len(self.groups) == len(self.requests)

    def next_chunk(self, sampler: "_Sampler") -> list[int] | None:
        """Waits for work, which may come back from a sampler that was lost, or is slow. None: there is no more."""
        with self.changed:
            while not self.over:
                if self._chunks:
                    chunk, again = self._chunks.pop(), False
                elif slow := next((asked for asked in self._asked if self._is_slow(asked, sampler)), None):
                    slow.again = again = True
                    chunk = [index for index in slow.chunk if index not in self.groups]
                else:
                    self.changed.wait(timeout=0.2)
                    continue
                self._asked.append(_Asked(sampler, chunk, time.monotonic(), again))
                return chunk
            return None

    def _is_slow(self, asked: _Asked, idle: "_Sampler") -> bool:
        return not asked.again and asked.sampler is not idle and time.monotonic() - asked.since > _SLOW * self._longest

    def answered(self, sampler: "_Sampler", chunk: list[int]) -> None:
        """Notes that a sampler has delivered all of a chunk."""
        with self.changed:
            seconds = time.monotonic() - self._done(sampler, chunk).since
            self._longest = seconds if math.isinf(self._longest) else max(self._longest, seconds)

    def give_back(self, sampler: "_Sampler", chunk: list[int]) -> None:
        """Offers what is still missing of a chunk to the other threads, unless another sampler is asked for it too."""
        with self.changed:
            self._done(sampler, chunk)
            elsewhere = {index for asked in self._asked for index in asked.chunk}
            if missing := [index for index in chunk if index not in self.groups and index not in elsewhere]:
                self._chunks.append(missing)
                self.changed.notify_all()

    def _done(self, sampler: "_Sampler", chunk: list[int]) -> _Asked:
        place = next(i for i, asked in enumerate(self._asked) if asked.sampler is sampler and asked.chunk is chunk)
        return self._asked.pop(place)

    def take(self, index: int, group: RolloutTree) -> None:
        with self.changed:
            if index not in self.groups and not self.over:
                self._on_group(index, group)
                self.groups[index] = group
                if self.over:
                    self.changed.notify_all()

    def fail(self, error: BaseException) -> None:
        with self.changed:
            self.failure = self.failure or error
            self.changed.notify_all()


class _FullError(Exception):
    """The sampler's queue has no room now."""


class _Sampler:
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

    def put_weights(self, weights: _Weights, in_flight: str = "continue") -> None:
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

    def restore(self, pushed: _Weights | None) -> None:
        """Gives a sampler that was lost the weights that the others have."""
        with self._lock:
            if self.stale and pushed is not None:
                self.put_weights(pushed)
                pushed.keep_one_copy()

    def ask(
        self, requests: Sequence[RolloutRequest], pushed: _Weights | None
    ) -> Generator[tuple[int, RolloutTree] | None, None, None]:
        """Yields (index, group) as they finish, None as a sign of life.

        Raises `httpx.HTTPError` if the sampler is lost before the last, or has not the weights that were pushed;
        `_FullError` if it has no room.
        """
        body = json.dumps({"groups": [encode_request(request) for request in requests]}).encode()
        with self._client.stream("POST", "/v1/rollouts", **_content(body, "application/json")) as answer:
            if answer.status_code in (429, 503) and "retry-after" in answer.headers:
                self.down_since = None
                raise _FullError
            if answer.status_code in (502, 503, 504):  # a proxy, whose sampler is away
                raise httpx.ReadError(f"HTTP {answer.status_code}")
            self.down_since = None
            if answer.status_code != 200:
                answer.read()
                raise UserError(f"sampler {self.url} refused the rollouts: {_reason(answer)}")
            if pushed is not None and int(answer.headers.get(VERSION_HEADER, pushed.version)) < pushed.version:
                raise httpx.ReadError("it was started anew since the last request: its weights are other ones")
            count = 0
            for line in answer.iter_lines():
                if not line:
                    yield None
                    continue
                value = json.loads(line)
                if "error" in value:
                    raise UserError(f"sampler {self.url}: {value['error']}")
                yield value["index"], decode_group(value["group"])
                count += 1
        if count < len(requests):
            raise httpx.ReadError(f"the answer ended after {count} of {len(requests)} groups")


def _content(body: bytes, kind: str = "application/octet-stream") -> dict[str, Any]:
    """Returns httpx's arguments to send a body in pieces of known total length."""
    pieces = (body[start : start + _PIECE] for start in range(0, len(body), _PIECE))
    return {"content": pieces, "headers": {"Content-Type": kind, "Content-Length": str(len(body))}}


def _chunks(requests: Sequence[RolloutRequest], streams: int) -> list[list[int]]:
    """Returns the indices of `requests`, in portions to be taken from the end."""
    most = min(_CHUNK, -(-len(requests) // streams))
    chunks: list[list[int]] = []
    size = 0
    for index, request in enumerate(requests):
        size += request.patches.nbytes
        if not chunks or len(chunks[-1]) == most or size > _CHUNK_BYTES:
            chunks.append([])
            size = request.patches.nbytes
        chunks[-1].append(index)
    return chunks[::-1]


def _unreachable(sampler: _Sampler, error: Exception | str) -> UserError:
    reason = str(error) or type(error).__name__
    return UserError(
        f"sampler {sampler.url} cannot be reached ({reason}); start one with "
        "`python -m ares_jax.serve`, or leave sampler.url empty and the command starts its own"
    )


def _reason(answer: httpx.Response) -> str:
    try:
        value = answer.json()
        error = value.get("detail") or value.get("error") or value["reason"]
        return str(error["message"] if isinstance(error, dict) else error)[:300]
    except (ValueError, KeyError, AttributeError):
        return f"HTTP {answer.status_code}"
