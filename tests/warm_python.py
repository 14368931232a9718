"""A Python that has the libraries imported already: each command is a fork of it, seconds sooner than a new interpreter.

`python -m tests.docs.warm_python SOCKET PARENT` waits for commands and ends with its parent; `stand_in` writes the program
that is typed as `python`.
"""

import importlib
import json
import os
import runpy
import signal
import socket
import sys
from pathlib import Path

from ares_jax.service.process import die_with

# None of our own: a command imports what it needs itself.
LIBRARIES = (
    "jax.numpy", "flax.nnx", "optax", "orbax.checkpoint", "grain.python", "transformers", "transformers.models.auto",
    "transformers.models.qwen2", "transformers.tokenization_utils_tokenizers", "transformers.models.qwen2_vl",
    "ml_collections", "fastapi", "uvicorn", "httpx", "openai", "prometheus_client", "sklearn.datasets", "PIL.Image",
    "tensorboardX", "matplotlib.pyplot", "pyarrow.parquet", "tqdm", "jaxtyping", "jinja2",
)  # fmt: skip

_STAND_IN = """#!{python} -IS
import json, os, signal, socket, sys
server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
server.connect({address!r})
request = json.dumps([{first!r} + sys.argv[1:], os.getcwd(), dict(os.environ)])
socket.send_fds(server, [request.encode()], [0, 1, 2])
command = int(server.recv(64))
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: os.kill(command, number))
code = int(server.recv(64))
sys.exit(code if code >= 0 else 128 - code)
"""


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
            asker.send(str(command).encode())
            asker.send(str(os.waitstatus_to_exitcode(os.waitpid(command, 0)[1])).encode())
            os._exit(0)
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


if __name__ == "__main__":
    die_with(int(sys.argv[2]))
    for name in LIBRARIES:
        importlib.import_module(name)
    first, *rest = next_command(sys.argv[1])
    if first == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [first, *rest]
        runpy.run_path(first, run_name="__main__")
