"""What every command shares: flags, the resolved config, logging, the compilation cache and errors of one line."""

import errno
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import jax
from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from ares_jax import __version__, show_torch
from ares_jax.commands.flag_help import flag_help
from ares_jax.errors import Preempted, UserError
from ares_jax.lifecycle import preemption
from ares_jax.lifecycle.memory import explained, is_out_of_memory
from ares_jax.lifecycle.profiling import trace_steps
from ares_jax.lifecycle.startup import STARTUP
from ares_jax.metrics import write_atomic
from ares_jax.parallel import distributed
from ares_jax.parallel.distributed import is_first
from data_pipeline.errors import DataError

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "configuration file, such as configs/digits_cpu.py; --config.section.field=value overrides a field"
)
_WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run: checkpoints, metrics, report")
_COORDINATOR = flags.DEFINE_string("coordinator_address", None, "host:port of process 0; found by itself on TPU and SLURM")
_COUNT = flags.DEFINE_integer("num_processes", None, "processes of the run, all given the same command", 1)
_INDEX = flags.DEFINE_integer("process_id", None, "number of this process, from 0", 0)
_HEARTBEAT = flags.DEFINE_integer("heartbeat_timeout", 100, "seconds of silence after which a process is lost: all end", 2)
_PROFILE = flags.DEFINE_string("profile_steps", "", "steps to trace, FIRST:LAST without LAST; into WORKDIR/.../profile")

STOPPED = "stopped"  # file in the workdir, for launchers: the command ended with 0, but before its end
Processes = Literal["together", "each", "first"]
_STORAGE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)


def run(
    main: Callable[..., None], *, config_optional: bool = False, workdir_optional: bool = False,
    processes: Processes | Callable[[], Processes] = "together",
) -> None:  # fmt: skip
    """Parses the command line and calls `main(config, workdir)`. Exits with 2 and one clear line on bad input.

    Args:
      config_optional: what is not given is None; without `--config`, the workdir is not made.
      workdir_optional: without `--workdir`, it is None.
      processes: of a cluster "together" make one run; "each" is for itself; or the "first" does it, and the others end. A
        function says it once flags are parsed.
    """
    show_torch()
    if {"--help", "-h"} & set(sys.argv[1:]):
        print(flag_help(sys.modules[main.__module__]))
        return
    if "--version" in sys.argv[1:]:
        print(f"ares-jax {__version__}")
        return
    logging.set_verbosity(logging.WARNING)
    STARTUP.mark("imports")
    workdir = None
    try:
        config, workdir = _parse(sys.argv, config_optional, workdir_optional)
        trace_steps(_PROFILE.value)
        how = processes if isinstance(processes, str) else processes()
        if how == "first" and (task := distributed.task(_COUNT.value, _INDEX.value))[0]:
            said = f"task {task[0]} of {task[1]}: one process does this, task 0; --num_processes=1 makes this one do it, too"
            print(said, file=sys.stderr)
            return
        if how == "together":
            distributed.initialize(_COORDINATOR.value, _COUNT.value, _INDEX.value, heartbeat_timeout=_HEARTBEAT.value)
            STARTUP.mark("processes")
        _until_told(lambda: main(config, workdir), config, workdir, together=how == "together")
    except (UserError, DataError) as error:
        _end(2, f"error: {error}")
    except OSError as error:
        if error.errno not in _STORAGE:
            raise
        _end(2, f"error: {error.filename or workdir}: {error.strerror}; make room or allow writing there. The last "
             "checkpoint is whole: the same command resumes")  # fmt: skip
    except jax.errors.JaxRuntimeError as error:
        if workdir is None or not is_out_of_memory(error):
            raise
        _end(2, f"error: {explained(error, workdir)}")
    except KeyboardInterrupt:
        print("stopped; the same command resumes", file=sys.stderr)
        sys.exit(130)


def _until_told(main: Callable[[], None], config: ConfigDict | None, workdir: Path | None, *, together: bool) -> None:
    """Calls `main`; ends the process with 0 if a SIGTERM stops it."""
    try:
        if together:
            preemption.listen()
            if workdir is not None and is_first():
                (workdir / STOPPED).unlink(missing_ok=True)
        if config is not None and workdir is not None:
            prepare_jax(workdir)
        main()
    except Preempted as stop:
        if together and workdir is not None:
            write_atomic(workdir / STOPPED, f"{stop}\n")
        _end(0, f"stopped: {stop}; the same command resumes")


def _end(code: int, message: str) -> None:
    """Ends the process, without waiting for a thread that still draws or saves, or for peers when this one has failed.

    When several processes stop together, in peace, they do wait for each other: the first one to go would be missed.
    """
    print(message, file=sys.stderr, flush=True)
    busy = any(thread is not threading.current_thread() and not thread.daemon for thread in threading.enumerate())
    if distributed.is_alone() == (code != 0) and not (code and busy):
        sys.exit(code)
    for child in multiprocessing.active_children():  # readers of data: what Python would do on its way out
        child.terminate()
    logging.flush()
    sys.stdout.flush()
    os._exit(code)


def _parse(argv: list[str], config_optional: bool, workdir_optional: bool) -> tuple[ConfigDict | None, Path | None]:
    config_file = next((a.split("=", 1)[1] for a in argv if a.startswith("--config=")), None)
    if config_file and not Path(config_file.split(":", 1)[0]).is_file():
        raise UserError(f"--config={config_file}: no such file; the shipped ones are in configs/")
    try:
        rest = flags.FLAGS(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        reason = str(error).strip("\"'").splitlines()[0]
        fields = reason.find(" Other fields present")
        reason = reason if fields < 0 else reason[:fields]
        raise UserError(f"command line: {reason[:300]} (ares_jax/config.py documents every field)") from None
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}; every setting is a --flag=value")
    if "://" in (_WORKDIR.value or ""):
        raise UserError(
            f"--workdir={_WORKDIR.value}: a run needs a folder, to append to and rename in; mount the bucket with gcsfuse "
            "and name the folder (docs/pods.md)"
        )
    if config_optional and _CONFIG.value is None:
        return None, Path(_WORKDIR.value) if _WORKDIR.value else None
    if _CONFIG.value is None:
        raise UserError("--config is missing; for the demo use --config=configs/digits_cpu.py")
    if not _WORKDIR.value:
        if workdir_optional:
            return _CONFIG.value, None
        raise UserError("--workdir is missing; name the folder of the run, such as --workdir=runs/digits")
    workdir = Path(_WORKDIR.value)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--workdir={workdir}: {error.strerror}; name a folder that can be made") from None
    return _CONFIG.value, workdir


def prepare_jax(workdir: Path) -> None:
    """Turns the compilation cache on: a second command, or a resumed one, starts in seconds."""
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(workdir.absolute() / "compilation_cache"))
    jax.config.update("jax_compilation_cache_dir", cache)
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
