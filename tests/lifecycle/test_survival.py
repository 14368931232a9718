"""Real processes, killed, hung and starved."""

import functools
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import jax.numpy as jnp
import pytest
from absl import flags
from ml_collections import config_flags

from ares_jax.aepo.checks import check
from ares_jax.checkpoints.manager import Checkpoints
from ares_jax.errors import UserError
from ares_jax.lifecycle.memory import ADVICE
from ares_jax.lifecycle.profiling import Profiler, trace_steps
from ares_jax.lifecycle.startup import _COMPILATION, Startup
from ares_jax.lifecycle.step_guard import StepGuard
from ares_jax.lifecycle.watchdog import feed, watchdog
from ares_jax.models.qwen2_5_vl.layers import REMAT
from ares_jax.parallel.micro_batch import check_rows
from ares_jax.sampling.gathering import GatheringSampler
from ares_jax.training import make_optimizer
from configs.qwen2_5_vl_7b_aepo import get_config
from tests.warm_python import warm_python
from tests.xla import environment


def started(folder, *arguments, devices=1):
    line = [warm_python(), "-m", "tests.lifecycle.loop", "--config=configs/digits_cpu.py", f"--workdir={folder}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([*line, *arguments], env=environment(devices), **pipes)


def pair(folder, *arguments):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    cluster = [f"--coordinator_address=127.0.0.1:{port}", "--num_processes=2"]
    return [started(folder, *cluster, f"--process_id={i}", *arguments, devices=2) for i in range(2)]


def wait_for(process, text):
    """Returns the output up to a line with `text`."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return "".join(lines)
    raise AssertionError(f"no {text!r} in\n{''.join(lines)}")


def test_one_of_two_processes_is_told_to_go_and_both_save_and_another_mesh_resumes(tmp_path):
    both = pair(tmp_path)
    try:
        for process in both:
            wait_for(process, "start-up: imports" if process is both[0] else "resumed at 0 on 4")
        both[1].send_signal(signal.SIGTERM)
        outputs = [process.communicate(timeout=300)[0] for process in both]
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [0, 0], outputs
    saved = int(os.listdir(tmp_path / "steps")[0])
    assert all(f"stopped: saved at step {saved}, goodput" in output for output in outputs)
    assert (tmp_path / "stopped").exists()
    alone = started(tmp_path, devices=1)
    try:
        wait_for(alone, f"resumed at {saved} on 1 {float(saved)}")
        wait_for(alone, "start-up: imports")
        alone.send_signal(signal.SIGTERM)
        output = alone.communicate(timeout=300)[0]
    finally:
        alone.kill()
    assert alone.returncode == 0 and "the same command resumes" in output


def test_a_hung_collective_shows_its_stacks(tmp_path):
    both = pair(tmp_path, "--mode=hang", "--config.watchdog_seconds=2")
    try:
        wait_for(both[0], "Timeout (0:00:02)!")
        stacks = wait_for(both[0], "loop.py")
    finally:
        for process in both:
            process.kill()
            process.communicate()
    assert "barrier" in stacks


def test_what_is_no_step_is_watched_too_and_an_answer_feeds_it(monkeypatch):
    calls = []
    monkeypatch.setattr("faulthandler.dump_traceback_later", lambda seconds, **_: calls.append(seconds))
    monkeypatch.setattr("faulthandler.cancel_dump_traceback_later", lambda: calls.append("off"))

    def rollouts(requests, on_group):
        for index in range(len(requests)):
            on_group(index, None)
        return list(requests)

    client = GatheringSampler(SimpleNamespace(rollouts=rollouts, break_off=None))
    with watchdog(9.0):
        client.rollouts([1, 2])
        with watchdog(0.0):
            client.rollouts([3])
        feed()
    feed()
    client.rollouts([4])
    assert calls == ["off", 9.0, 9.0, 9.0, "off", "off", 9.0, 9.0, "off"]


@pytest.mark.skipif(os.getuid() != 0, reason="takes another user's rights")
@pytest.mark.parametrize("mode", ["full", "forbidden"])
def test_a_full_disk_or_a_forbidden_folder_leaves_the_last_checkpoint(tmp_path, mode):
    process = started(tmp_path, f"--mode={mode}")
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 2, output
    assert "a checkpoint cannot be written (" in output and "step 1 is whole" in output
    again = started(tmp_path)
    try:
        wait_for(again, "resumed at 1 on 1 0.0")
    finally:
        again.kill()
        again.communicate()


@pytest.mark.parametrize("mode", ["metrics", "rollouts", "config"])
def test_a_full_disk_is_said_in_one_line_whatever_is_written(tmp_path, mode):
    process = started(tmp_path, f"--mode={mode}")
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 2, output
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert f"error: {tmp_path}: File too large; make room" in line and "the same command resumes" in line


def test_one_of_two_cannot_save_and_both_end_with_the_last_checkpoint(tmp_path):
    both = pair(tmp_path, "--mode=half", "--heartbeat_timeout=5")
    outputs = ended(both)
    assert {process.returncode for process in both} <= {2, -signal.SIGABRT}, outputs  # JAX ends who is left behind
    assert "a checkpoint cannot be written (" in "".join(outputs) and "step 1 is whole" in "".join(outputs)
    assert Checkpoints(tmp_path / "steps").steps() == [1]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_lost_host_ends_the_other_and_the_last_checkpoint_is_whole(tmp_path, victim):
    both = pair(tmp_path, "--mode=lost", "--heartbeat_timeout=5")
    try:
        while not (tmp_path / "steps" / "5").is_dir():
            assert both[0].poll() is None and both[1].poll() is None
            time.sleep(0.05)
        time.sleep(0.5)  # it works on
    finally:
        both[victim].kill()
    outputs = ended(both)
    assert both[1 - victim].returncode not in (0, 143, None), outputs
    checkpoints, like = Checkpoints(tmp_path / "steps"), {"w": jnp.zeros(4096)}
    assert checkpoints.steps() == [5] and not (tmp_path / "stopped").exists()
    assert checkpoints.restore(5, like, like)[0]["w"][0] == 5.0


def ended(processes):
    """Returns what they say until they end, by themselves."""
    try:
        return [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()


def test_out_of_memory_says_what_to_change_and_leaves_a_profile(tmp_path):
    process = started(tmp_path, "--mode=memory")
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 2, output
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert "error: out of device memory (RESOURCE_EXHAUSTED" in line and "packing.rows" in line
    assert f"{tmp_path}/memory.0.prof shows what was there" in line and (tmp_path / "memory.0.prof").stat().st_size > 0


def test_what_to_change_when_memory_is_short_can_be_typed(monkeypatch):
    """Each alone, into the real config: the checks, the model and the optimizer take it."""
    typed = re.findall(r"--config\.\S+=[\w-]+", ADVICE)
    assert len(typed) > 7
    for text in typed:
        values = flags.FlagValues()
        config_flags.DEFINE_config_file("config", flag_values=values)
        monkeypatch.setattr(sys, "argv", ["", "--config=configs/qwen2_5_vl_7b_aepo.py", "--config.aepo.staleness=0", text])
        values(sys.argv)
        config = values.config
        check(config)
        check_rows(config, 64, 16)
        assert config.model.remat in REMAT
        make_optimizer(config.optimizer, learning_rate=1.0, steps=1)
    fields = re.findall(r"\b((?:sampler|packing|mesh|aepo|model|optimizer|lora)(?:\.[a-z_]+)+)", ADVICE)
    assert len(fields) > len(typed)
    for field in fields:
        functools.reduce(getattr, field.split("."), get_config())  # a ConfigDict raises for one that it has not


def test_goodput_counts_what_will_not_be_done_again(tmp_path, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr("ares_jax.lifecycle.step_guard.time", SimpleNamespace(time=lambda: clock[0]))

    def pass_step(around, number, *, broken=False):
        with around.step(number):
            clock[0] += 10
            if broken:
                around.broken_off()

    with StepGuard(tmp_path, watchdog=0) as around:
        pass_step(around, 0)  # which compiles
        pass_step(around, 1)
        assert around.goodput() == 10 / 20
        with pytest.raises(RuntimeError), around.step(2):
            clock[0] += 10
            raise RuntimeError
        pass_step(around, 2, broken=True)
        assert around.goodput() == 10 / 40
    clock[0] += 40  # nobody runs it
    with StepGuard(tmp_path, watchdog=0, state=around.state()) as again:
        pass_step(again, 2)
        pass_step(again, 3)
        assert again.goodput() == 20 / 100


def _trace(folder):
    trace_steps("1:3")
    profiler = Profiler(folder)
    for step in range(4):
        with profiler.step(step):
            jnp.arange(3.0).sum().block_until_ready()
        assert profiler._open == (step == 1)


def test_steps_are_traced(tmp_path):
    # In a process of its own: where a TPU's compiler was loaded without a TPU, as other tests do, the profiler crashes.
    child = multiprocessing.get_context("spawn").Process(target=_trace, args=(tmp_path,))
    child.start()
    child.join()
    assert child.exitcode == 0
    assert list(tmp_path.glob("profile/**/*.xplane.pb"))
    with pytest.raises(UserError, match="--profile_steps=3:1: give FIRST:LAST"):
        trace_steps("3:1")


def test_the_start_is_told_once_and_its_parts_add_up():
    startup = Startup()
    startup.mark("imports")
    startup.mark("weights")
    with startup.apart():  # hours of pass rates
        time.sleep(0.2)
        startup._listen(_COMPILATION, 5.0)
    startup._listen(_COMPILATION, 0.3)
    line = startup.told()
    assert line.startswith("start-up: imports ") and "weights 0.0 s, first step 0.0 s" in line
    assert line.endswith("of it compilation 0.3 s")
    assert startup.told() is None
