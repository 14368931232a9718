"""Starts a sampler as a process of its own, that never outlives the command that started it."""

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ares_jax.errors import UserError

_PR_SET_PDEATHSIG = 1  # prctl(2)
_MORE = 10.0  # seconds that a sampler has to end, besides those that its requests have


class SamplerProcess:
    """A running sampler; leaving the `with` block stops it."""

    def __init__(self, process: subprocess.Popen, url: str, drain_seconds: float):
        self._process, self._drain = process, drain_seconds
        self.url = url
        self.pid = process.pid

    def stop(self, *, drain: bool = True) -> None:
        """Asks it to end, and ends it if it does not; without `drain` nobody waits for its answers any more."""
        self._process.terminate()
        try:
            self._process.wait(timeout=_MORE + (self._drain if drain else 0))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> "SamplerProcess":
        return self

    def __exit__(self, error: type[BaseException] | None, *_) -> None:
        self.stop(drain=error is None)


def start_sampler(arguments: Sequence[str], *, folder: Path, timeout: float, drain_seconds: float = 0.0) -> SamplerProcess:
    """Runs `python -m ares_jax.serve` and returns once it answers; its output goes to `folder/sampler.log`.

    `drain_seconds`: those that its config gives it to end.

    Raises:
      UserError: it ended, or did not answer in `timeout` seconds; the last lines of its log are in the message.
    """
    ready, log = folder / "sampler.ready.json", folder / "sampler.log"
    ready.unlink(missing_ok=True)
    command = [sys.executable, "-m", "ares_jax.serve", *arguments, f"--ready_file={ready}", f"--parent={os.getpid()}"]
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + timeout
    while not ready.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            state = f"ended with {process.poll()}" if process.poll() is not None else f"gave no answer in {timeout:.0f} s"
            process.kill()
            process.wait()
            last = " | ".join(log.read_text().strip().splitlines()[-3:])
            raise UserError(f"the sampler {state}; {log} ends with: {last or 'nothing'}")
        time.sleep(0.05)
    return SamplerProcess(process, json.loads(ready.read_text())["url"], drain_seconds)


def die_with(parent: int) -> None:
    """Makes this process get SIGTERM when its parent ends, also if that is killed by SIGKILL (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it ended before we could ask
            sys.exit(1)
