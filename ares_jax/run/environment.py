"""With what config, where and how a command ran: kept with the run, shown by its report."""

import json
import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import jax
from ml_collections import ConfigDict

from ares_jax import __version__
from ares_jax.config import to_plain
from ares_jax.metrics import write_atomic, write_json

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")


def record_environment(workdir: Path) -> None:
    """Writes `environment/<command>.json` into the run's folder, whole or not at all."""
    program = Path(sys.argv[0])
    name = program.parent.name if program.stem == "__main__" else program.stem
    write_json(workdir / "environment" / f"{name}.json", _environment())


def save_config(config: ConfigDict, workdir: Path) -> None:
    """Writes the resolved tree to `workdir/config.json`, whole or not at all."""
    write_atomic(workdir / "config.json", json.dumps(to_plain(config), indent=1))


def _environment() -> dict[str, str]:
    devices = jax.devices()
    packages = {name: metadata.version(name) for name in _PACKAGES}
    return {
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"), "arguments": " ".join(sys.argv[1:]),
        "ares-jax": f"{__version__} ({_commit()})", "python": platform.python_version(), **packages,
        "devices": f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform}), {jax.process_count()} process(es)",
        "host": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores",
    }  # fmt: skip


def _commit() -> str:
    """Returns the clone's commit, with `-dirty` if files differ from it."""
    line = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        result = subprocess.run(line, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return "no git"
    return result.stdout.strip() or "no git"
