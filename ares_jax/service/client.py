"""The client: spreads groups over the samplers, survives the loss of one, pushes weights to all."""

import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence

import httpx
import numpy as np
from safetensors.numpy import save

from ares_jax.errors import UserError
from ares_jax.sampling.trajectory import RolloutGroup, RolloutRequest
from ares_jax.service.protocol import decode_group, encode_request

_CHUNK = 64  # groups a request carries: small enough to spread, large enough to fill an engine


class RolloutClient:
    """Talks to one or several samplers with the same weights. `patience`: seconds without any before giving up."""

    def __init__(self, urls: Sequence[str], *, token: str = "", patience: float = 120.0):
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._clients = [
            httpx.Client(base_url=url, headers=headers, timeout=httpx.Timeout(10.0, read=None, write=None)) for url in urls
        ]
        self._patience = patience

    def wait_until_ready(self) -> None:
        """Returns once every sampler answers. Raises `UserError` when the patience is over."""
        deadline = time.monotonic() + self._patience
        for client in self._clients:
            while True:
                try:
                    client.get("/health", timeout=5.0).raise_for_status()
                    break
                except httpx.HTTPError as error:
                    if time.monotonic() > deadline:
                        raise _unreachable(client, error) from None
                    time.sleep(0.2)

    def push_weights(self, flat: Mapping[str, np.ndarray], version: int) -> None:
        """Gives every sampler new weights. Raises `UserError` if one refuses them or cannot be reached."""
        body = save({name: np.ascontiguousarray(value) for name, value in flat.items()})
        for client in self._clients:
            try:
                answer = client.put("/v1/weights", params={"version": version}, content=body)
            except httpx.HTTPError as error:
                raise _unreachable(client, error) from None
            if answer.status_code != 200:
                raise UserError(f"sampler {client.base_url} refused the weights: {_reason(answer)}")

    def rollouts(
        self,
        requests: Sequence[RolloutRequest],
        on_group: Callable[[int, RolloutGroup], None] = lambda index, group: None,
    ) -> list[RolloutGroup]:
        """Returns the groups in the order of `requests`; `on_group(index, group)` is told of each as it arrives.

        Each group is taken exactly once. What a lost sampler had not delivered goes to the others, or to itself when it
        is back.

        Raises:
          UserError: a request is refused, or no sampler was reachable for `patience` seconds.
        """
        groups: list[RolloutGroup | None] = [None] * len(requests)
        todo = list(range(0, len(requests), _CHUNK))
        chunks = [list(range(start, min(start + _CHUNK, len(requests)))) for start in todo]
        lock = threading.Lock()
        failures: list[Exception] = []
        last_seen = [time.monotonic()]

        def take(index: int, group: RolloutGroup) -> None:
            with lock:
                last_seen[0] = time.monotonic()
                if groups[index] is None:
                    groups[index] = group
                    on_group(index, group)

        def work(client: httpx.Client) -> None:
            while not failures:
                with lock:
                    if not chunks:
                        return
                    chunk = chunks.pop()
                try:
                    self._ask(client, requests, chunk, take)
                except httpx.HTTPError as error:
                    with lock:
                        missing = [index for index in chunk if groups[index] is None]
                        if missing:
                            chunks.append(missing)
                        if time.monotonic() - last_seen[0] > self._patience:
                            failures.append(_unreachable(client, error))
                    time.sleep(0.2)
                except Exception as error:
                    failures.append(error)

        threads = [threading.Thread(target=work, args=(client,), daemon=True) for client in self._clients]
        while not failures and any(group is None for group in groups):  # a chunk may come back after its worker ended
            threads = [threading.Thread(target=work, args=(client,), daemon=True) for client in self._clients]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        if failures:
            raise failures[0]
        return [group for group in groups if group is not None]

    def _ask(self, client: httpx.Client, requests, chunk: list[int], take) -> None:
        body = {"groups": [encode_request(requests[index]) for index in chunk]}
        with client.stream("POST", "/v1/rollouts", json=body) as answer:
            if answer.status_code == 503:
                raise httpx.ReadError("the sampler's queue is full")
            if answer.status_code != 200:
                answer.read()
                raise UserError(f"sampler {client.base_url} refused the rollouts: {_reason(answer)}")
            count = 0
            for line in answer.iter_lines():
                value = json.loads(line)
                if "error" in value:
                    raise UserError(f"sampler {client.base_url}: {value['error']}")
                take(chunk[value["index"]], decode_group(value["group"]))
                count += 1
        if count < len(chunk):
            raise httpx.ReadError(f"the answer ended after {count} of {len(chunk)} groups")


def _unreachable(client: httpx.Client, error: Exception) -> UserError:
    return UserError(
        f"sampler {client.base_url} cannot be reached ({error or type(error).__name__}); start one with "
        "`python -m ares_jax.serve`, or leave sampler.url empty and the command starts its own"
    )


def _reason(answer: httpx.Response) -> str:
    try:
        return str(answer.json().get("detail") or answer.json().get("error"))[:300]
    except ValueError:
        return f"HTTP {answer.status_code}"
