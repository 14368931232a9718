"""XLA's flags for the tests: compile quickly, as most of a test's time is compilation.

`make test-all` compiles as users do: it sets ARES_TESTS=all.
"""

import os

import pytest

EVERYTHING = os.environ.get("ARES_TESTS") == "all"
# No LLVM optimisation, and fusions by the emitters that write LLVM's language directly: an AEPO update compiles in an eighth
# of the time. HLO passes, and so fusion, layouts, collectives and buffers, stay as users have them.
_QUICK = "--xla_cpu_use_fusion_emitters=false --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


# For a program that computes for long: its compilation by LLVM's optimiser pays.
OPTIMISED = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}


def slow(*values: object):
    """Returns the case of a parametrised test that `make test-all` alone runs."""
    return pytest.param(*values, marks=pytest.mark.slow)


def xla_flags(devices: int = 1) -> str:
    """Returns XLA_FLAGS for a process with this many virtual CPU devices."""
    return f"--xla_force_host_platform_device_count={devices} {'' if EVERYTHING else _QUICK}"


def environment(devices: int = 1, **variables: str) -> dict[str, str]:
    """Returns the environment of a command: this process' own, with `devices` virtual CPU devices and more variables."""
    return {**os.environ, "XLA_FLAGS": xla_flags(devices), **variables}
