"""SIGTERM as a request to save and go, to this process or to any other of the run.

Whoever is told tells the others through JAX's coordination service. A thread does it, which Python's C handler wakes: the
main one may be inside a collective, waiting for a process that draws for minutes and has to hear of it. That all stop at
the same place is agreed afterwards, between main threads (`agreed`).
"""

import contextlib
import select
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

import jax

from ares_jax.errors import Preempted
from ares_jax.parallel.distributed import gather, is_alone, is_first
from ares_jax.parallel.private_jax import coordination_client

T = TypeVar("T")

ON_DISK = "all that was done is on disk"
_KEY = "ares_jax/told_to_go"
_LOOK = 1.0  # seconds between two looks at what the others were told


class _Listener:
    """Hears of SIGTERM from the moment it is made."""

    def __init__(self) -> None:
        self.told = False
        self.raises = is_alone()  # SIGTERM raises `Preempted` in the main thread, once; otherwise somebody will ask
        self.hooks: list[Callable[[], None]] = []
        self._client: Any = None if is_alone() else coordination_client()
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._main = threading.get_ident()
        self._before = signal.signal(signal.SIGTERM, self._handle)  # instead of JAX's own, if processes have joined
        self._wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch, name="preemption", daemon=True).start()

    def close(self) -> None:
        signal.set_wakeup_fd(self._wakeup)
        signal.signal(signal.SIGTERM, self._before)
        self._writer.close()  # which ends the thread

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.told = True
        if self.raises:
            self.raises = False  # what it ends may have to be put away
            raise Preempted(ON_DISK)

    def _watch(self) -> None:
        while True:
            curious = self._client is not None and not self.told
            here, _, _ = select.select([self._reader], [], [], _LOOK if curious else None)
            # JAX ends this process if the service is lost: nothing to do about it here.
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                if here:
                    if not (numbers := self._reader.recv(4096)):
                        return
                    if signal.SIGTERM not in numbers:
                        continue
                    self.told = True
                    if self._client is not None:
                        self._client.key_value_set(f"{_KEY}/{jax.process_index()}", "", allow_overwrite=True)
                elif self._client.key_value_dir_get(_KEY):
                    self.told = True
                    if self.raises:
                        signal.pthread_kill(self._main, signal.SIGTERM)
            if self.told:
                for hook in list(self.hooks):
                    hook()


_listener: _Listener | None = None


def listen() -> None:
    """From now on SIGTERM does not end this process at once. A process alone raises `Preempted`, wherever it is."""
    global _listener
    _listener = _listener or _Listener()


def told() -> bool:
    """Returns whether, as far as this process knows, one of the run was told to go."""
    return _listener is not None and _listener.told


def agreed() -> bool:
    """Returns whether one of all processes was told to go: the same in each; they call it together."""
    return any(gather(told()))


@contextmanager
def held() -> Iterator[None]:
    """In this block SIGTERM interrupts nothing: who is in it asks, and saves. Makes the process listen if it does not."""
    global _listener
    if _listener is not None:
        with _raising(_listener, False):
            yield
        return
    listen()
    assert _listener is not None
    _listener.raises = False
    try:
        yield
    finally:
        _listener.close()
        _listener = None


@contextmanager
def breaking_off(hook: Callable[[], None]) -> Iterator[None]:
    """In this block a SIGTERM, to whatever process, calls `hook` from another thread: it ends what the block waits for."""
    if _listener is None:
        yield
        return
    _listener.hooks.append(hook)
    try:
        if _listener.told:
            hook()
        yield
    finally:
        _listener.hooks.remove(hook)


def from_first(make: Callable[[], T]) -> T:
    """Returns what `make` gives on process 0, to every process: for work that is done once, such as asking an endpoint.

    Raises `Preempted`, in all of them, if one was told to go meanwhile.
    """
    value: T | None = None
    stopped = False
    if is_first():
        try:
            with _interrupted():
                value = make()
        except Preempted:
            stopped = True
    value, stopped = gather((value, stopped))[0]
    if stopped:
        raise Preempted(ON_DISK)
    return value  # type: ignore[return-value]


@contextmanager
def _interrupted() -> Iterator[None]:
    """In this block SIGTERM, to whatever process, raises `Preempted` here."""
    if _listener is None:
        yield
        return
    with _raising(_listener, True):
        if _listener.told:
            _listener.raises = False
            raise Preempted(ON_DISK)
        yield


@contextmanager
def _raising(listener: _Listener, value: bool) -> Iterator[None]:
    before, listener.raises = listener.raises, value
    try:
        yield
    finally:
        listener.raises = before and not listener.told
