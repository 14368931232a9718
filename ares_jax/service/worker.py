"""The thread that owns the engine. Everything else talks to it through a queue of commands."""

import queue
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Protocol

import numpy as np

from ares_jax.sampling.trajectory import RolloutGroup, RolloutRequest


class EngineLike(Protocol):
    """What the worker needs of `ares_jax.sampling.Engine`."""

    policy_version: int

    @property
    def busy(self) -> bool: ...
    def submit(self, request: RolloutRequest) -> int: ...
    def cancel(self, number: int) -> None: ...
    def step(self) -> list[tuple[int, RolloutGroup]]: ...
    def load_weights(self, flat: Mapping[str, np.ndarray], version: int) -> None: ...
    def stats(self) -> dict[str, int]: ...


class Worker:
    """Runs the engine while there is work. Its methods may be called from any thread."""

    def __init__(self, engine: EngineLike):
        self._engine = engine
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._waiting: dict[int, Future] = {}
        self._numbers: dict[Future, int] = {}
        self.failure: str | None = None  # why the engine can no longer be trusted
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def policy_version(self) -> int:
        return self._engine.policy_version

    def stats(self) -> dict[str, int]:
        return self._engine.stats()

    def rollout(self, request: RolloutRequest) -> Future:
        """Returns a future of the group. It fails with the engine's error if the request does not fit."""
        future = _future()

        def submit():
            number = self._engine.submit(request)
            self._waiting[number] = future
            self._numbers[future] = number

        self._commands.put(lambda: self._guard(future, submit))
        return future

    def cancel(self, future: Future) -> None:
        """Stops work on a group whose client has gone."""

        def forget():
            number = self._numbers.pop(future, None)
            if number is not None:
                self._waiting.pop(number, None)
                self._engine.cancel(number)

        self._commands.put(forget)

    def load_weights(self, flat: Mapping[str, np.ndarray], version: int) -> Future:
        """Returns a future that is done once the engine draws with the new weights; it fails if they do not fit."""
        future = _future()

        def load():
            self._engine.load_weights(flat, version)
            future.set_result(version)

        self._commands.put(lambda: self._guard(future, load))
        return future

    def stop(self) -> None:
        """Ends the thread; groups in flight fail."""
        self._commands.put(None)
        self._thread.join(timeout=30)

    def _guard(self, future: Future, action: Callable[[], None]) -> None:
        try:
            if self.failure:
                raise RuntimeError(self.failure)
            action()
        except Exception as error:  # the caller of the future gets it; the thread goes on
            future.set_exception(error)

    def _run(self) -> None:
        while True:
            idle = self.failure is not None or not self._engine.busy
            command: Callable[[], None] | None
            try:
                command = self._commands.get(block=idle)
            except queue.Empty:
                command = self._step
            if command is None:
                self._fail("the sampler is stopping")
                return
            try:
                command()
            except Exception as error:  # the engine's state is unknown now: say so to everyone, stay reachable
                self.failure = f"the engine failed: {error!r}; restart the sampler"
                self._fail(self.failure)

    def _step(self) -> None:
        for number, group in self._engine.step():
            future = self._waiting.pop(number)
            self._numbers.pop(future, None)
            future.set_result(group)

    def _fail(self, reason: str) -> None:
        for future in self._waiting.values():
            future.set_exception(RuntimeError(reason))
        self._waiting.clear()
        self._numbers.clear()


def _future() -> Future:
    """Returns a future that its reader cannot cancel: the engine's thread would fail to set its result."""
    future: Future = Future()
    future.set_running_or_notify_cancel()
    return future
