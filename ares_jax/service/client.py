"""The client: spreads groups over the samplers, survives the loss of one, pushes weights to all."""

import contextlib
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import httpx
import jax

from ares_jax.errors import BrokenOffError, UserError
from ares_jax.parallel.distributed import to_host
from ares_jax.sampling.requests import RolloutRequest
from ares_jax.sampling.rollout_tree import RolloutTree
from ares_jax.sampling.sampler import NamedArrays, OnTree, ignore, named
from ares_jax.service.connection import Connection, FullError, PushedWeights
from ares_jax.service.rollout_job import RolloutJob, portions

_STREAMS = 2  # requests to a sampler at a time: the next is queued there while the last leaves of one are drawn


class RolloutClient:
    """Talks to one or several samplers with the same weights. `patience`: seconds without any before giving up.

    `token`: what the samplers ask for; the environment variable ARES_TOKEN by default, as for the samplers themselves.
    """

    def __init__(self, urls: Sequence[str], *, token: str = "", patience: float = 120.0):
        token = token or os.environ.get("ARES_TOKEN", "")
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._samplers = [Connection(url, headers) for url in urls]
        self.urls = tuple(urls)
        self._patience = patience
        self._pushed: PushedWeights | None = None  # for samplers that come back
        self._jobs: list[RolloutJob] = []  # in progress
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
        weights = PushedWeights(flat, version)
        deadline = time.monotonic() + self._patience

        def give(sampler: Connection) -> httpx.HTTPError | None:
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
        job = RolloutJob(requests, on_group, portions(requests, _STREAMS * len(self._samplers)))
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

    def _work(self, sampler: "Connection", job: "RolloutJob") -> None:
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
            except FullError:
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


def _unreachable(sampler: Connection, error: Exception | str) -> UserError:
    reason = str(error) or type(error).__name__
    return UserError(
        f"sampler {sampler.url} cannot be reached ({reason}); start one with "
        "`python -m ares_jax.serve`, or leave sampler.url empty and the command starts its own"
    )
