"""Bad input on the command line: one clear line, exit code 2, nothing half-written."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from ares_jax.checkpoints.manager import Checkpoints
from tests.warm_python import warm_python
from tests.xla import environment

CONFIG = "--config=configs/digits_cpu.py"


def run(*arguments):
    return subprocess.run([warm_python(), "-m", *arguments], capture_output=True, text=True, env=environment())


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--workdir={}"], "--config is missing"),
        (["--config=nowhere.py", "--workdir={}"], "nowhere.py: no such file"),
        ([CONFIG + ":ppo", "--workdir={}"], "method 'ppo' is not one of aepo, "),
        ([CONFIG], "--workdir is missing"),
        ([CONFIG, "--workdir={}", "--config.aepo.windw=3"], "windw"),
        ([CONFIG, "--workdir={}", "--config.aepo.window=x"], "window"),
        ([CONFIG, "--workdir={}/train"], "no checkpoint yet; run `python -m ares_jax.cold_start` first"),
    ],
)
def test_one_line_that_names_the_value_and_the_remedy(tmp_path, arguments, message):
    result = run("ares_jax.train", *[a.format(tmp_path) for a in arguments])
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 2 and len(lines) == 1 and message in lines[0]
    assert "Traceback" not in result.stderr


def test_a_sampler_that_is_not_there(tmp_path):
    flags = [
        "--config.sampler.url=http://127.0.0.1:9",
        "--config.sampler.start_timeout=0.2",
        "--config.cold_start.alignment_steps=0",
        "--config.cold_start.warmup_steps=0",
    ]
    result = run("ares_jax.cold_start", CONFIG, f"--workdir={tmp_path}", *flags)
    assert result.returncode == 2 and "cannot be reached" in result.stderr


def test_too_little_memory_is_said_with_what_to_change(tmp_path):
    """A cache of petabytes: in this process, and in the service that it starts."""
    flags = ["--config.cold_start.warmup_steps=0", "--config.sampler.pages=1000000000000"]
    profile = tmp_path / "memory.0.prof"
    for colocated in (True, False):
        flag = f"--config.sampler.colocated={colocated}"
        result = run("ares_jax.cold_start", CONFIG, f"--workdir={tmp_path}", *flags, flag)
        (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert result.returncode == 2 and "out of device memory (RESOURCE_EXHAUSTED" in line, result.stderr
        assert "Where the sampler shares the devices" in line and "fewer sampler.pages" in line
        assert profile.stat().st_size > 0
        profile.unlink()


def test_an_unreadable_image(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    (tmp_path / "p.jsonl").write_text('{"question": "q", "answer": "1", "images": ["broken.png"], "responses": ["r"]}\n' * 8)
    flags = [f"--config.data.{split}=('jsonl://{tmp_path}/p.jsonl',)" for split in ("train", "validation", "test")]
    flags += ["--config.cold_start.alignment_steps=0", "--config.cold_start.batch_size=2"]
    result = run("ares_jax.cold_start", CONFIG, f"--workdir={tmp_path}/run", *flags)
    assert result.returncode == 2 and "broken.png" in result.stderr and "not a readable image" in result.stderr


def test_a_truncated_checkpoint_is_named(tmp_path):
    from ares_jax.errors import UserError

    checkpoints = Checkpoints(tmp_path / "c", keep=3)
    params = {"a": np.arange(6.0)}
    for step in (1, 2):
        checkpoints.save(step, params, params, {"step": step})
    checkpoints.wait()
    restored, _, extra = checkpoints.restore(2, params, params)
    np.testing.assert_array_equal(restored["a"], params["a"])
    assert extra == {"step": 2}
    shutil.rmtree(tmp_path / "c" / "2" / "params" / "d", ignore_errors=True)
    for file in Path(tmp_path / "c" / "2" / "params").rglob("*"):
        if file.is_file() and "ocdbt.process" in str(file):
            file.write_bytes(b"")
    with pytest.raises(UserError, match="c/2 cannot be read .*remove that folder to go on from step 1"):
        checkpoints.restore_params(2, params)


def test_one_wrong_bit_is_noticed(tmp_path):
    """In any file that holds values: of the parameters, read with the optimizer or alone, or of the optimizer."""
    from ares_jax.errors import UserError

    params = {"a": np.random.default_rng(0).standard_normal(999).astype(np.float32)}  # does not compress
    for part in ("params", "optimizer"):
        checkpoints = Checkpoints(tmp_path / part)
        checkpoints.save(1, params, params, {})
        checkpoints.wait()
        file = max((tmp_path / part / "1" / part).rglob("*"), key=lambda f: f.stat().st_size if f.is_file() else 0)
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 4
        file.write_bytes(data)
        with pytest.raises(UserError, match=f"{part}/1 cannot be read .*remove it to start afresh"):
            checkpoints.restore(1, params, params)
        if part == "params":
            with pytest.raises(UserError, match="cannot be read"):
                checkpoints.restore_params(1, params)
