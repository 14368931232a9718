"""What surrounds every step of a training loop: watchdog, profiler, the wish to stop, goodput."""

import time
from collections.abc import Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ares_jax.lifecycle import preemption
from ares_jax.lifecycle.profiling import Profiler
from ares_jax.lifecycle.startup import STARTUP
from ares_jax.lifecycle.watchdog import feed, watchdog
from ares_jax.parallel.distributed import is_first


class StepGuard:
    """Surrounds the steps of one stage, over all attempts at it.

    Goodput is the share of the time since the stage was first begun, interruptions included, that went into steps which
    count. A step that was done again after a kill counts once, and the first step of each attempt, which compiles, never.
    """

    def __init__(self, folder: Path, *, watchdog: float, state: Mapping[str, float] | None = None):
        """`state`: what `state()` gave when the checkpoint was saved from which this attempt goes on."""
        state = state or {"since": time.time(), "useful": 0.0}
        self._since, self._useful = state["since"], state["useful"]
        self._warm = self._broken_off = False
        self._seconds, self._profiler = watchdog, Profiler(folder)
        self._stack = ExitStack()

    def __enter__(self) -> "StepGuard":
        self._stack.enter_context(preemption.held())
        self._stack.enter_context(watchdog(self._seconds))
        self._stack.callback(self._profiler.close)
        return self

    def __exit__(self, *exception) -> None:
        self._stack.close()

    @contextmanager
    def step(self, number: int):
        """Surrounds step `number`; one that raises does not count, nor does one of which `broken_off` was said."""
        begin, self._broken_off = time.time(), False
        with self._profiler.step(number):
            yield
        feed()
        if self._broken_off:
            return
        if self._warm:
            self._useful += time.time() - begin
        self._warm = True
        if (line := STARTUP.told()) and is_first():
            print(line, flush=True)

    def broken_off(self) -> None:
        """Says that the present step will be done again."""
        self._broken_off = True

    def must_stop(self) -> bool:
        """Returns whether to save and go; every process calls it after every step."""
        return preemption.agreed()

    def goodput(self) -> float:
        return self._useful / max(time.time() - self._since, 1e-9)

    def state(self) -> dict[str, float]:
        """Returns what the next attempt needs (JSON)."""
        return {"since": self._since, "useful": self._useful}
