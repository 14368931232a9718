"""Where the time from the command to its first step, or to a service's first answer, went."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

_COMPILATION = "/jax/core/compile/backend_compile_duration"  # JAX's own event; from the cache it takes no time


class Startup:
    """A list of parts and their seconds; the first began when the process did."""

    def __init__(self) -> None:
        self._last = _process_start()
        self._parts: dict[str, float] | None = {}
        self._compiled = 0.0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def mark(self, part: str) -> None:
        """Says that `part` ends now."""
        if self._parts is not None:
            now = time.time()
            self._parts[part] = self._parts.get(part, 0.0) + now - self._last
            self._last = now

    @contextmanager
    def apart(self) -> Iterator[None]:
        """What happens inside is no start-up: neither its time nor what it compiles."""
        begin, compiled = time.time(), self._compiled
        yield
        self._last += time.time() - begin
        self._compiled = compiled

    def told(self, part: str = "first step") -> str | None:
        """Says that `part`, the last one, ends now. Returns the line to print; None ever after."""
        if self._parts is None:
            return None
        self.mark(part)
        parts, self._parts = self._parts, None
        texts = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in parts.items())
        return f"start-up: {texts}: {sum(parts.values()):.1f} s, of it compilation {self._compiled:.1f} s"

    def _listen(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event == _COMPILATION:
            self._compiled += duration_secs


def _process_start() -> float:
    """Returns when this process was started (Linux; elsewhere: now), seconds since 1970."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])  # proc(5): field 22
        uptime = float(Path("/proc/uptime").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return time.time()
    return time.time() - uptime + ticks / 100.0  # USER_HZ is 100


STARTUP = Startup()
