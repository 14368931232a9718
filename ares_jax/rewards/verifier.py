"""math-verify from any thread, with a time limit that holds: in processes of its own, ended by the kernel if they hang.

math-verify's own limit is a signal handler: it works in the main thread alone, and not inside a long integer power.
"""

import atexit
import functools
import json
import os
import queue
import subprocess
import sys
from pathlib import Path

from ares_jax.errors import UserError

CPU_SECONDS = 2.0  # of one pair; then the answer counts as wrong
LONGEST = 1000  # characters of an answer that is looked at
_MEMORY = 4 * 2**30  # bytes of address space
_WORKERS = min(4, os.cpu_count() or 1)


class _Worker:
    """A process that compares one pair at a time; started when first asked, and again after its end."""

    def __init__(self):
        self._process: subprocess.Popen | None = None

    def ask(self, given: str, wanted: str, tolerance: float = 0.0) -> bool:
        """Returns its verdict; False if the pair ended it (too long, too much memory, a crash)."""
        if self._process is None or self._process.poll() is not None:
            self._start()
        assert self._process is not None and self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps([given, wanted, tolerance]) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except OSError:  # it died between two pairs
            answer = ""
        if not answer.endswith("\n"):
            self.stop()
            return False
        return json.loads(answer)

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _start(self) -> None:
        script = str(Path(__file__).with_name("math_worker.py"))
        self._process = subprocess.Popen(
            [sys.executable, "-P", script, str(CPU_SECONDS), str(_MEMORY)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, encoding="utf-8",
            start_new_session=True,  # the terminal's Ctrl-C is not for it
        )  # fmt: skip
        assert self._process.stdout is not None
        if self._process.stdout.readline() != "ready\n":
            self.stop()
            raise UserError("math-verify does not start; run `python -c 'import math_verify'` to see why")


@functools.cache
def _workers() -> queue.LifoQueue:
    """Returns the idle ones, the warmest on top."""
    workers: queue.LifoQueue = queue.LifoQueue()
    for _ in range(_WORKERS):
        worker = _Worker()
        atexit.register(worker.stop)
        workers.put(worker)
    return workers


@functools.lru_cache(maxsize=100_000)  # the leaves of a group often give the same answer
def same_mathematics(given: str, wanted: str, tolerance: float = 0.0) -> bool:
    """Says whether two LaTeX answers are equal by math-verify's rules, or numbers at most `tolerance` apart.

    Safe in threads. Answers longer than `LONGEST` characters, and pairs that take more than `CPU_SECONDS`, are unequal.

    Raises:
      UserError: math-verify cannot be started.
    """
    if max(len(given), len(wanted)) > LONGEST:
        return False
    idle = _workers()
    worker = idle.get()
    try:
        return worker.ask(given, wanted, tolerance)
    except BaseException:  # Ctrl-C while it answers: what it says later belongs to no question
        worker.stop()
        raise
    finally:
        idle.put(worker)
