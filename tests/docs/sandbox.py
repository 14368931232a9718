"""A folder laid out like a clone of the project, with tiny models and data, in which commands run as they are typed."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from tests.warm_python import stand_in, warm_address
from tests.xla import environment

ROOT = Path(__file__).parents[2]
_TINY = """import runpy

def get_config(*method):
    config = runpy.run_path({path!r})["get_config"](*method)
    for section in {sections!r}:
        config[section].update(runpy.run_path("configs/digits_cpu.py")["get_config"]()[section])
    config.update_from_flattened_dict({changes!r})
    return config
"""
_GCLOUD = r"""#!/usr/bin/env bash
# A slice that is ready; of what its workers are told, our command is run here, and nothing installed or mounted.
[[ $4 != describe ]] || echo READY
command=${!#}
if [[ $4 == ssh && $command == *ares_jax* ]]; then
  bash -c "$(sed -E "s#(^|[ =])/mnt/#\1$ROOT/mnt/#g" <<< "${command#--command=}")"
fi
"""
_HF = """#!/usr/bin/env bash
[[ $1 == download && $3 == --local-dir ]] && cp -rL "$ROOT/models/qwen" "$4"  # what the hub would give
"""
_CURL = """#!/usr/bin/env bash
exec {curl} --fail-with-body "$@"  # an answer that is an error is no success
"""


class Sandbox:
    """`run` takes a block of shell. What it starts in the background goes with `close`."""

    def __init__(self, folder: Path, configs: Mapping[str, tuple[Sequence[str], Mapping[str, object]]]):
        """`configs`: by a config's file, the sections it takes from the digits' and the fields that change."""
        self.folder = folder
        packages = ("ares_jax", "data_pipeline", "kernels")  # for what a command starts: it has no installation to find
        for name in ("docs", "launch", "Makefile", "requirements.txt", "requirements.lock", *packages):
            (folder / name).symlink_to(ROOT / name)
        (folder / "ares").symlink_to(".")  # the clone on a worker
        (folder / "configs").mkdir()
        (folder / "configs" / "formats").symlink_to(ROOT / "configs" / "formats")
        for pattern, (sections, changes) in configs.items():
            for path in (ROOT / "configs").glob(pattern):
                (folder / "configs" / path.name).write_text(_TINY.format(path=str(path), sections=sections, changes=changes))
        self._models_and_data()
        address = warm_address()
        stand_in(folder / "bin" / "python", address)
        stand_in(folder / ".venv" / "bin" / "ares-jax", address, "-m", "ares_jax")
        (folder / ".venv" / "bin" / "python").symlink_to(folder / "bin" / "python")
        (folder / ".venv" / ".installed").touch()  # nothing is installed here
        curl = subprocess.run(["which", "curl"], capture_output=True, text=True, check=True).stdout.strip()
        for name, text in {"gcloud": _GCLOUD, "hf": _HF, "curl": _CURL.format(curl=curl)}.items():
            (folder / "bin" / name).write_text(text)
            (folder / "bin" / name).chmod(0o755)
        self._environment = {
            **environment(), "PATH": f"{folder / 'bin'}:/usr/bin:/bin", "ROOT": str(folder),
            "XDG_CACHE_HOME": str(folder / "cache"),
        }  # fmt: skip
        self._started: list[subprocess.Popen] = []

    def _models_and_data(self) -> None:
        for name in ("models", "data", "mnt/ares"):
            (self.folder / name).mkdir(parents=True)
        for name in ("qwen", "Qwen2.5-VL-3B-Instruct"):  # what the demo exports: its programs are compiled already
            (self.folder / "models" / name).symlink_to(self.folder / "runs" / "digits" / "export")
        Image.new("RGB", (56, 28), (90, 60, 30)).save(self.folder / "data" / "a.png")
        for split in ("train", "validation", "test"):
            records = [
                {"question": f"{i} + {i}?", "answer": f"{2 * i}", "images": ["a.png"], "responses": [solution(2 * i)]}
                for i in range(8)
            ]
            (self.folder / "data" / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        (self.folder / "questions.txt").write_text("Add the digits.\nMultiply the digits.\n")

    def start(self, command: list[str]) -> subprocess.Popen:
        """Starts a process that `close` ends, with all that it started."""
        with (self.folder / "background.log").open("ab") as log:
            process = subprocess.Popen(
                command, cwd=self.folder, env=self._environment, stdout=log, stderr=log, start_new_session=True
            )
        self._started.append(process)
        return process

    def wait_for(self, condition, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end and all(process.poll() is None for process in self._started), self.log()
            time.sleep(0.05)

    def log(self) -> str:
        return (self.folder / "background.log").read_text()[-3000:]

    def run(self, block: str, *, seconds: float = 300) -> subprocess.CompletedProcess:
        """Runs a block of shell to its first command that fails."""
        return subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block], cwd=self.folder, env=self._environment, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=seconds,
        )  # fmt: skip

    def close(self) -> None:
        for process in self._started:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def solution(number: int) -> str:
    return f"<think>\nTwice the number is {number}.\n</think>\nSo \\boxed{{{number}}}."
