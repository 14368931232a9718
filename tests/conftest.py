"""Tests run on the CPU with 8 virtual devices, so that every sharded path is exercised without an accelerator.

docs/testing.md says what takes how long, and why.
"""

import ctypes
import gc
import os
import resource
import sys
from pathlib import Path

import pytest

from tests import schedule
from tests.xla import EVERYTHING, xla_flags

ROOT = Path(__file__).parents[1]
CACHE = ROOT / ".test_cache"  # of git's ignored folders: what one run leaves for the next
_CACHED = 2**30  # bytes of compiled programs that are kept
_RESIDENT = 2.5 * 2**30  # bytes of a test process beyond which it forgets its compiled programs

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = xla_flags(8)
# The real TPU compiler answers ahead-of-time compilation without a TPU; parallel test processes must not fight for its lock.
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# One cache of compiled programs for all test processes and runs. Its key is the program with its flags and compiler.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE / "programs"))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.05"


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: run by `make test-all` alone; docs/testing.md says why")


def pytest_collection_modifyitems(config, items):
    """Slow tests go, unless everything is asked for; the longest files come first, so that all processes end together."""
    if not EVERYTHING:
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]
    schedule.longest_first(items)


def pytest_sessionfinish(session, exitstatus):
    """In the process that started the others: keeps the times, and the newest of the compiled programs."""
    if hasattr(session.config, "workerinput"):
        return
    option, whole = session.config.option, session.config.args_source == session.config.ArgsSource.TESTPATHS
    if exitstatus == 0 and whole and not (option.keyword or option.collectonly or EVERYTHING):
        schedule.keep()
    programs = Path(os.environ["JAX_COMPILATION_CACHE_DIR"])
    files = sorted(programs.glob("*"), key=lambda path: path.stat().st_mtime, reverse=True)
    kept = 0
    for path in files:
        kept += path.stat().st_size
        if kept > _CACHED:
            path.unlink()


def pytest_runtest_logreport(report):
    schedule.note(report)


@pytest.fixture(autouse=True)
def _no_listener_is_left():
    """A command that a test runs in this process listens for SIGTERM until the process ends, and remembers what it heard."""
    yield
    preemption = sys.modules.get("ares_jax.lifecycle.preemption")
    if preemption and preemption._listener:
        preemption._listener.close()
        preemption._listener = None


@pytest.fixture(scope="module", autouse=True)
def _bounded_memory():
    """A process that has grown large forgets its compiled programs; the next file reads from disk those that it needs."""
    yield
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    if pages * resource.getpagesize() > _RESIDENT:
        import jax

        jax.clear_caches()
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
