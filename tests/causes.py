"""A pytest plugin: where the seconds of each test file went. `make test PYTEST="-p tests.causes"` prints a table of them.

Each moment of a test's set-up, call and tear-down counts once, for the first of `CAUSES` that was under way, in any thread.
"""

import subprocess
import sys
import time
from collections import Counter, defaultdict

import pytest

from tests.schedule import file_of

CAUSES = {
    "ahead of time": "compilation for a TPU or GPU that is not there",
    "compilation": "of programs for the CPU, or reading them from the cache",
    "lowering": "jaxprs to StableHLO",
    "tracing": "Python functions to jaxprs",
    "PyTorch": "the oracle",
    "processes": "waiting for a command or server started by the test: its start, compilation and work",
    "sleeping": "waiting for a file or a state",
    "the rest": "the test's own work",
}
_spans: list[tuple[str, float, float]] = []
_prepared: set[str] = set()
_seconds: defaultdict[str, Counter[str]] = defaultdict(Counter)


def _timed(function, cause):
    def timed(*args, **kwargs):
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            _spans.append((cause, start, time.perf_counter()))

    return timed


subprocess.Popen.wait = _timed(subprocess.Popen.wait, "processes")  # type: ignore[method-assign]
subprocess.Popen.communicate = _timed(subprocess.Popen.communicate, "processes")  # type: ignore[method-assign]
time.sleep = _timed(time.sleep, "sleeping")


def _prepare() -> None:
    """Listens to JAX and PyTorch once a test has imported them."""
    if "jax.monitoring" in sys.modules and "jax" not in _prepared:
        _prepared.add("jax")
        import jax
        from jax._src import compiler

        def listen(event, duration, **_):
            for name, cause in (("jaxpr_trace_duration", "tracing"), ("jaxpr_to_mlir_module_duration", "lowering")):
                if name in event:
                    _spans.append((cause, time.perf_counter() - duration, time.perf_counter()))

        def compile_or_get_cached(backend, computation, devices, *args, **kwargs):
            here = devices.flat[0].platform == "cpu"
            return _timed(compiled, "compilation" if here else "ahead of time")(
                backend, computation, devices, *args, **kwargs
            )

        jax.monitoring.register_event_duration_secs_listener(listen)
        compiled, compiler.compile_or_get_cached = compiler.compile_or_get_cached, compile_or_get_cached
    if "torch.nn" in sys.modules and "torch" not in _prepared:
        _prepared.add("torch")
        import torch

        torch.nn.Module.__call__ = _timed(torch.nn.Module.__call__, "PyTorch")
        torch.Tensor.backward = _timed(torch.Tensor.backward, "PyTorch")


def split(spans: list[tuple[str, float, float]], begin: float, end: float) -> dict[str, float]:
    """Returns the seconds from `begin` to `end` by cause."""
    marks = sorted({begin, end, *(min(max(mark, begin), end) for _, *both in spans for mark in both)})
    order, seconds = list(CAUSES), dict.fromkeys(CAUSES, 0.0)
    # Between two marks the set of open spans stays: sweep over them.
    changes = sorted([(a, 1, c) for c, a, b in spans if b > a] + [(b, -1, c) for c, a, b in spans if b > a])
    opened: Counter[str] = Counter()
    place = 0
    for start, stop in zip(marks, marks[1:], strict=False):
        while place < len(changes) and changes[place][0] <= start:
            opened[changes[place][2]] += changes[place][1]
            place += 1
        seconds[next((cause for cause in order if opened[cause] > 0), "the rest")] += stop - start
    return seconds


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item):
    _prepare()
    _spans.clear()
    item.stash[_BEGIN] = time.perf_counter()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item):
    _prepare()
    try:
        return (yield)
    finally:
        item.user_properties.append(("causes", split(_spans, item.stash[_BEGIN], time.perf_counter())))


_BEGIN = pytest.StashKey[float]()


def pytest_runtest_logreport(report):
    if report.when == "teardown":
        _seconds[file_of(report.nodeid)] += Counter(dict(report.user_properties).get("causes", {}))


def pytest_terminal_summary(terminalreporter):
    """The files that took 10 s or more, the others in one row, and all."""
    rows = sorted(_seconds.items(), key=lambda row: -row[1].total())
    small = sum((counts for _, counts in rows if counts.total() < 10), Counter())
    total = sum((counts for _, counts in rows), Counter())
    terminalreporter.write_line("| file | seconds | " + " | ".join(CAUSES) + " |")
    terminalreporter.write_line("|---" * (len(CAUSES) + 2) + "|")
    large = [row for row in rows if row[1].total() >= 10]
    for name, counts in [*large, (f"{len(rows) - len(large)} others", small), ("all", total)]:
        cells = [f"{counts[cause]:.0f}" if counts[cause] >= 0.5 else "" for cause in CAUSES]
        terminalreporter.write_line(f"| {name} | {counts.total():.0f} | " + " | ".join(cells) + " |")
