"""`--profile_steps=10:13`: an XProf trace of steps 10, 11 and 12, to open with TensorBoard's profile plugin or xprof."""

from contextlib import contextmanager
from pathlib import Path

import jax

from ares_jax.errors import UserError

_steps = (0, 0)  # to trace, in every loop of this process


def trace_steps(value: str) -> None:
    """Has the steps FIRST:LAST of the loops that begin from now on traced; LAST is not included. Empty: none.

    Raises:
      UserError: `value` names no steps.
    """
    global _steps
    _steps = _parsed(value) if value else (0, 0)


class Profiler:
    """Traces the steps that `trace_steps` named into `folder/profile`, each process its own devices."""

    def __init__(self, folder: Path):
        self._folder, self._open = folder / "profile", False
        self._first, self._last = _steps

    @contextmanager
    def step(self, number: int):
        """Surrounds step `number`."""
        if self._first <= number < self._last and not self._open:
            jax.profiler.start_trace(str(self._folder))
            self._open = True
        with jax.profiler.StepTraceAnnotation("step", step_num=number):
            yield
        if self._open and number + 1 >= self._last:
            self.close()

    def close(self) -> None:
        if self._open:
            jax.profiler.stop_trace()
            self._open = False


def _parsed(value: str) -> tuple[int, int]:
    first, _, last = value.partition(":")
    if not (first.isdigit() and last.isdigit() and int(first) < int(last)):
        raise UserError(f"--profile_steps={value}: give FIRST:LAST with FIRST < LAST, such as 10:13")
    return int(first), int(last)
