"""`python -m ares_jax.report`: prints the table of a run and writes its page, also while it trains.

python -m ares_jax.report --workdir=runs/digits [--follow=30]
"""

import signal
import threading
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from ares_jax.commands import cli
from ares_jax.errors import UserError
from ares_jax.reporting import build_report, console_table
from ares_jax.reporting.load import last_change

TOPICS = {"The run": ("workdir",), "The page": ("follow",)}

_FOLLOW = flags.DEFINE_integer(
    "follow", 0, "seconds between two looks at a run in progress: the page is written anew whenever the run has, and an "
    "open one loads itself again; ends with Ctrl-C", lower_bound=0,
)  # fmt: skip


def main(config: ConfigDict | None, workdir: Path | None) -> None:
    if workdir is None:
        raise UserError("--workdir is missing; name the folder of a run, such as --workdir=runs/digits")
    if not (workdir / "config.json").is_file():
        raise UserError(f"--workdir={workdir}: no run in it (no config.json); name the folder that the other commands got")
    interrupted = threading.Event()
    if _FOLLOW.value:
        # Not an exception: one that falls into a library's callback is lost, and a page would be left half made.
        signal.signal(signal.SIGINT, lambda *_: interrupted.set())
    path = build_report(workdir, reload_every=_FOLLOW.value)
    print(console_table(workdir))
    print(f"report: {path}", flush=True)
    if _FOLLOW.value:
        follow(workdir, _FOLLOW.value, interrupted)
        build_report(workdir)  # one that stays as it is
        raise KeyboardInterrupt


def follow(workdir: Path, seconds: int, interrupted: threading.Event) -> None:
    """Writes the page whenever the run's files change, until interrupted."""
    seen = last_change(workdir)
    while not interrupted.wait(seconds):
        if (now := last_change(workdir)) != seen:
            build_report(workdir, reload_every=seconds)
            seen = now


def start() -> None:
    """Runs the command with the process's arguments."""
    cli.run(main, config_optional=True, processes="first")
