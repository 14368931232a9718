"""A Python that has the libraries imported already: each command is a fork of it, seconds sooner than a new interpreter.

`python -m tests.warm_python SOCKET PARENT` waits for commands and ends with its parent. `stand_in` writes a program that
is started in place of `python`; `warm_python()` is the path of one. What a command is given is its own: arguments, folder,
environment, files, signals, exit code. But JAX and transformers read their environment variables when they are imported,
which was before: a command with others of those needs `sys.executable`.
"""

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import NoReturn

from ares_jax import show_torch
from ares_jax.service.process import die_with

# None of our own: a command imports what it needs itself.
LIBRARIES = (
    "sklearn.datasets", "jax.numpy", "flax.nnx", "optax", "orbax.checkpoint", "grain.python", "transformers",
    "transformers.models.auto", "transformers.models.qwen2", "transformers.tokenization_utils_tokenizers",
    "transformers.models.qwen2_vl", "transformers.models.qwen2_vl.image_processing_pil_qwen2_vl", "ml_collections",
    "fastapi", "uvicorn", "httpx", "openai", "prometheus_client", "PIL.Image", "tensorboardX", "matplotlib.pyplot",
    "pyarrow.parquet", "tqdm", "jaxtyping", "jinja2",
)  # fmt: skip

_STAND_IN = """#!{python} -IS
import json, os, signal, socket, sys
server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
server.connect({address!r})
request = json.dumps([{first!r} + sys.argv[1:], os.getcwd(), dict(os.environ)])
socket.send_fds(server, [request.encode()], [0, 1, 2])
command = int(server.recv(64))
with open("/proc/self/comm", "w") as name:
    name.write(str(command))
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: os.kill(command, number))
code = int(server.recv(64))
if code < 0:  # ended by a signal
    if -code in (signal.SIGINT, signal.SIGTERM):
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
sys.exit(code)
"""


@functools.cache
def warm_address() -> Path:
    """Starts a warm Python for this process, and returns the socket at which it waits for commands."""
    folder = Path(tempfile.mkdtemp(prefix="ares_warm_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    address = folder / "socket"
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    line = [sys.executable, "-m", "tests.warm_python", str(address), str(os.getpid())]
    process = subprocess.Popen(line, cwd=Path(__file__).parents[1], env=environment)
    while not address.exists():
        assert process.poll() is None, "no warm Python"
        time.sleep(0.02)
    return address


@functools.cache
def warm_python() -> str:
    """Returns the path of a program to start in place of `sys.executable`."""
    file = warm_address().with_name("python")
    stand_in(file, warm_address())
    return str(file)


def kill(process: subprocess.Popen) -> None:
    """SIGKILL to the command of a stand-in, which then ends the same way; returns when both are gone."""
    command = Path(f"/proc/{process.pid}/comm").read_text().strip()
    os.kill(int(command) if command.isdigit() else process.pid, signal.SIGKILL)
    process.wait()


def stand_in(file: Path, address: Path, *first: str) -> None:
    """Writes a program that has the Python at `address` run its arguments, after `first`, with its files and folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(_STAND_IN.format(python=sys.executable, address=str(address), first=list(first)))
    file.chmod(0o755)


def next_command(address: str) -> list[str]:
    """Waits for commands. Returns in the fork that is to run one, as it were typed, with the command's arguments."""
    server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    server.bind(address)
    server.listen()
    warm = os.getpid()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those who wait for commands
    while True:
        asker, _ = server.accept()
        if os.fork():
            asker.close()
            continue
        die_with(warm)
        server.close()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        request, files, *_ = socket.recv_fds(asker, 1 << 20, 3)
        if command := os.fork():
            for file in files:
                os.close(file)
            _attend(asker, command)
        die_with(os.getppid())
        asker.close()
        for number, file in enumerate(files):
            os.dup2(file, number)
            os.close(file)
        arguments, folder, environment = json.loads(request)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        return arguments


def _attend(asker: socket.socket, command: int) -> None:
    """Tells the stand-in its command's number and exit code; kills the command if the stand-in is killed."""
    with contextlib.suppress(OSError):
        asker.send(str(command).encode())
    ended = os.pidfd_open(command)
    if ended not in select.select([asker, ended], [], [])[0]:
        os.kill(command, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(command, 0)[1])
    with contextlib.suppress(OSError):
        asker.send(str(code).encode())
    os._exit(0)


def _run(first: str, *rest: str) -> None:
    """Runs what `python` would with these arguments."""
    if first == "-m":
        sys.argv = list(rest)
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)  # a command sees PyTorch when its imports are over
        return
    show_torch()
    if first == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(rest[0], {"__name__": "__main__"})
    else:
        sys.argv = [first, *rest]
        runpy.run_path(first, run_name="__main__")


def _end(code: int) -> NoReturn:
    """Ends as an interpreter does, but does not take all modules to pieces, which takes a second."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    die_with(int(sys.argv[2]))
    importlib.import_module(LIBRARIES[0])  # SciPy, which stumbles over a module that is None
    sys.modules["torch"] = None  # type: ignore[assignment]  # as for a command (ares_jax/__init__.py)
    for name in LIBRARIES[1:]:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # a collection in a fork does not write to what is shared
    command = next_command(sys.argv[1])
    try:
        _run(*command)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        _end(end.code if isinstance(end.code, int) else int(end.code is not None))
    except BaseException:
        traceback.print_exc()
        _end(1)
    _end(0)
