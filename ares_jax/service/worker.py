"""The thread that owns the engine. Everything else talks to it through a queue of commands."""

import queue
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import jax

from ares_jax.errors import UserError
from ares_jax.lifecycle.memory import explained, is_out_of_memory
from ares_jax.sampling.requests import Piece, RolloutRequest
from ares_jax.sampling.rollout_tree import RolloutTree, Trajectory


class ConflictError(UserError):
    """Weights that are older than those in use or on their way, or that newer ones have overtaken."""


OnDrawn = Callable[[list[Piece]], None]


class EngineLike(Protocol):
    """What the worker needs of `ares_jax.sampling.Engine`."""

    @property
    def policy_version(self) -> int: ...
    @property
    def busy(self) -> bool: ...
    @property
    def weights_wait(self) -> bool: ...
    def weight_specs(self) -> Mapping[str, jax.ShapeDtypeStruct]: ...
    def room(self, prompt_tokens: int, leaves: int) -> int: ...
    def check(self, request: RolloutRequest) -> None: ...
    def submit(self, request: RolloutRequest) -> int: ...
    def drawn(self, number: int, seen: Mapping[int, int]) -> list[Piece]: ...
    def cancel(self, number: int) -> None: ...
    def step(self) -> list[tuple[int, RolloutTree]]: ...
    def load_weights(self, flat: Mapping[str, Any], version: int, *, finish: bool = False) -> None: ...
    def stats(self) -> dict[str, int]: ...


@dataclass
class _Watch:
    """A request whose tokens are told as they are drawn."""

    on_drawn: OnDrawn
    seen: dict[int, int] = field(default_factory=dict)  # tokens told, by leaf
    over: set[int] = field(default_factory=set)  # leaves whose end was told

    def tell(self, pieces: list[Piece]) -> None:
        """Passes on what is new; the end of a leaf is, even without a token."""
        if pieces := [p for p in pieces if p.leaf not in self.over and (len(p.token_ids) or p.finish_reason)]:
            self.seen.update({p.leaf: self.seen.get(p.leaf, 0) + len(p.token_ids) for p in pieces})
            self.over.update(p.leaf for p in pieces if p.finish_reason)
            self.on_drawn(pieces)


class Worker:
    """Runs the engine while there is work. Its methods may be called from any thread.

    `folder`: where a profile of the memory is written if there is too little.
    """

    def __init__(self, engine: EngineLike, folder: Path = Path()):
        self._engine, self._folder = engine, folder
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._waiting: dict[int, Future] = {}
        self._numbers: dict[Future, int] = {}
        self._watches: dict[int, _Watch] = {}
        self._loading: list[tuple[Future, int]] = []  # weights that wait for what was begun
        self.failure: str | None = None  # why the engine can no longer be trusted
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def policy_version(self) -> int:
        return self._engine.policy_version

    def stats(self) -> dict[str, int]:
        return self._engine.stats()

    def room(self, prompt_tokens: int, leaves: int) -> int:
        """Returns the most tokens that each of `leaves` may draw after such a prompt."""
        return self._engine.room(prompt_tokens, leaves)

    def check(self, request: RolloutRequest) -> None:
        """Raises `UserError` if a request can never fit."""
        self._engine.check(request)

    def rollout(self, request: RolloutRequest, on_drawn: OnDrawn | None = None) -> Future:
        """Returns a future of the group. It fails with the engine's error if the request does not fit.

        `on_drawn` is told of all tokens, in order, as they are drawn, before the future is done; it runs in the engine's
        thread, so it must be short.
        """
        future = _future()

        def submit():
            number = self._engine.submit(request)
            self._waiting[number] = future
            self._numbers[future] = number
            if on_drawn is not None:
                self._watches[number] = _Watch(on_drawn)

        self._commands.put(lambda: self._guard(future, submit))
        return future

    def cancel(self, future: Future) -> None:
        """Stops work on a group whose client has gone."""

        def forget():
            number = self._numbers.pop(future, None)
            if number is not None:
                self._waiting.pop(number, None)
                self._watches.pop(number, None)
                self._engine.cancel(number)

        self._commands.put(forget)

    def weight_specs(self) -> Mapping[str, jax.ShapeDtypeStruct]:
        """Returns shape, type and placement of every parameter."""
        return self._engine.weight_specs()

    def load_weights(self, flat: Mapping[str, Any], version: int, *, finish: bool = False, force: bool = False) -> Future:
        """Returns a future that is done once the engine draws with the new weights; it fails if they do not fit.

        What was begun goes on with them, or, with `finish`, ends with the old ones before anything else begins. The future
        fails with `ConflictError` for a lower version than the newest here, unless with `force`; and if others come while
        these wait.
        """
        future = _future()

        def load():
            newest = max([self._engine.policy_version, *(old for _, old in self._loading)])
            if version < newest and not force:
                raise ConflictError(f"weights of version {version}, but {newest} is here; push a newer one, or with force")
            self._engine.load_weights(flat, version, finish=finish)
            for waiting, old in self._loading:
                waiting.set_exception(ConflictError(f"weights of version {old} waited until version {version} came instead"))
            self._loading = [(future, version)]

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
                self._tell_loaded()
            except Exception as error:  # the engine's state is unknown now: say so to everyone, stay reachable
                reason = explained(error, self._folder, "sampler") if is_out_of_memory(error) else repr(error)
                self.failure = f"the engine failed: {reason}; restart the sampler"
                self._fail(self.failure)

    def _step(self) -> None:
        finished = self._engine.step()
        for number, watch in self._watches.items():
            watch.tell(self._engine.drawn(number, watch.seen))
        for number, group in finished:
            if ended := self._watches.pop(number, None):
                ended.tell([_rest(index, leaf, ended.seen.get(index, 0)) for index, leaf in enumerate(group.leaves)])
            future = self._waiting.pop(number)
            self._numbers.pop(future, None)
            future.set_result(group)

    def _tell_loaded(self) -> None:
        if self._loading and not self._engine.weights_wait:
            for future, version in self._loading:
                future.set_result(version)
            self._loading.clear()

    def _fail(self, reason: str) -> None:
        for future in [*self._waiting.values(), *(future for future, _ in self._loading)]:
            future.set_exception(RuntimeError(reason))
        self._loading.clear()
        self._waiting.clear()
        self._numbers.clear()
        self._watches.clear()


def _rest(index: int, leaf: Trajectory, seen: int) -> Piece:
    new = slice(seen, None)
    drawn = leaf.token_ids[new], leaf.log_probs[new], leaf.entropies[new], leaf.window_means[new]
    return Piece(index, *drawn, leaf.finish_reason)


def _future() -> Future:
    """Returns a future that its reader cannot cancel: the engine's thread would fail to set its result."""
    future: Future = Future()
    future.set_running_or_notify_cancel()
    return future
