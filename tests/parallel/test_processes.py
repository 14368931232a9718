"""A run of two processes with 4 devices each is the run of one process with 8: real processes, gloo between them."""

import json
import shutil
import signal
import socket
import subprocess
import time

import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file

from ares_jax.metrics import read_jsonl
from tests.warm_python import warm_python
from tests.xla import environment

FLAGS = {
    "model.text.hidden_size": 32, "model.text.intermediate_size": 48, "model.text.num_layers": 2,
    "model.text.num_heads": 2, "model.text.num_kv_heads": 1, "model.text.mrope_section": "(2,3,3)",
    "model.vision.hidden_size": 32, "model.vision.intermediate_size": 32, "mesh.tensor": 2,
    "data.validation": "('digits://validation?size=4',)", "data.test": "('digits://test?size=6',)", "data.prefetch": 4,
    "sampler.colocated": True, "sampler.tensor": 2,
    "sampler.slots": 16, "sampler.pages": 300, "sampler.max_response_tokens": 24,
    "packing.rows": 4, "cold_start.alignment_steps": 0, "cold_start.warmup_steps": 2, "cold_start.pass_rate_problems": 8,
    "cold_start.pass_rate_samples": 2, "cold_start.selected": 8, "cold_start.epochs": 1, "cold_start.batch_size": 8,
    "aepo.steps": 2, "aepo.prompts_per_step": 2, "aepo.group_size": 4,
    "aepo.root_leaves": 2, "aepo.learning_rate": 1e-4, "aepo.filter.low": -9.0, "aepo.filter.high": 9.0,
    "aepo.log_rollouts_every": 1,
    # Answers are all wrong; without a reward that differs gradients are rounding, which Adam makes as large as any.
    "aepo.overlong_buffer": 16,
}  # fmt: skip


def start(log, folder, devices, module, *flags):
    """Starts one process of a run; its output goes to `log`."""
    line = [warm_python(), "-m", module, "--config=configs/digits_cpu.py", f"--workdir={folder}"]
    line += [f"--config.{name}={value}" for name, value in FLAGS.items()]
    if module == "ares_jax.report":  # of the run alone
        line = [warm_python(), "-m", module, f"--workdir={folder}"]
    with log.open("w") as output:
        return subprocess.Popen([*line, *flags], env=environment(devices), stdout=output, stderr=subprocess.STDOUT)


def finish(processes, logs):
    """Waits for the end, which is a good one; returns what each said."""
    try:
        for process in processes:
            process.wait(timeout=900)
    finally:
        for process in processes:
            process.kill()
    outputs = [log.read_text() for log in logs]
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output[-3000:]
    return outputs


def both(folder, module, until=None):
    """Runs a command as two processes with 4 devices each; SIGTERM to the second once `until` says so."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        cluster = [f"--coordinator_address=127.0.0.1:{listener.getsockname()[1]}", "--num_processes=2"]
    logs = [folder.with_name(f"{folder.name}.{module}.{i}.log") for i in range(2)]
    processes = [start(log, folder, 4, module, *cluster, f"--process_id={i}") for i, log in enumerate(logs)]
    while until and not until(logs[1]) and processes[1].poll() is None:
        time.sleep(0.02)
    if until:
        processes[1].send_signal(signal.SIGTERM)
    return finish(processes, logs)


def alone(folder, module):
    log = folder.with_name(f"{folder.name}.{module}.log")
    return finish([start(log, folder, 8, module)], [log])[0]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of each command as two processes, in `two`, and all in one, in `one`."""
    folder = tmp_path_factory.mktemp("processes")
    two = folder / "two"
    stopped = both(two, "ares_jax.cold_start", lambda log: "cold_start: pass rates" in log.read_text())
    assert all("stopped: all that was done is on disk" in output for output in stopped)
    assert (two / "stopped").exists() and not read_jsonl(two / "cold_start" / "pass_rates.jsonl")
    both(two, "tests.parallel.pipeline")
    shutil.copytree(two, folder / "parts", ignore=shutil.ignore_patterns("aepo", "evaluation", "export"))
    for command in ("convert", "report"):
        both(two, f"ares_jax.{command}")
    for module in ("tests.parallel.pipeline", "ares_jax.convert"):
        alone(folder / "one", module)
    return folder


def weights(folder):
    """Reads them whole, whatever devices they lay on."""
    reader = ocp.PyTreeCheckpointer()
    tree = reader.metadata(folder).item_metadata.tree
    return reader.restore(folder, restore_args={name: ocp.RestoreArgs(restore_type=np.ndarray) for name in tree})


def close(one, two):
    assert one.keys() == two.keys() and len(one) > 20
    for name in one:
        np.testing.assert_allclose(one[name], two[name], atol=2e-5, err_msg=name)


@pytest.mark.parametrize("stage, step", [("base", 2), ("cold_start", 1), ("aepo", 2)])
def test_the_weights_are_those_of_one_process(runs, stage, step):
    """Also of the two of which one was told to go while they measured pass rates."""
    close(*(weights(runs / run / "checkpoints" / stage / str(step) / "params") for run in ("one", "two")))


def test_so_are_the_evaluations_and_the_export(runs):
    for name in ("base", "cold_start", "aepo"):
        one, two = (json.loads((runs / run / "evaluation" / f"{name}.json").read_text()) for run in ("one", "two"))
        assert sum(level["problems"] for level in two["levels"].values()) == 6 and one == two
    assert [path.suffix for path in (runs / "two" / "evaluation").iterdir()] == [".json"] * 3
    close(*(load_file(runs / run / "export" / "model.safetensors") for run in ("one", "two")))
    assert "Not yet measured." not in (runs / "two" / "report.html").read_text()


def test_one_of_two_is_told_to_go_while_they_draw_and_one_with_8_devices_goes_on(runs):
    """The second draw is broken off: what is saved is the first step, and the end is that of a run never stopped."""
    folder = runs / "parts"
    outputs = both(folder, "ares_jax.train", lambda log: len(read_jsonl(folder / "aepo" / "metrics.jsonl")) > 1)
    assert all("stopped: saved AEPO at step 1 of 2" in output for output in outputs)
    assert (folder / "stopped").exists() and [p.name for p in (folder / "checkpoints" / "aepo").iterdir()] == ["1"]
    alone(folder, "ares_jax.train")
    assert not (folder / "stopped").exists()
    close(*(weights(runs / run / "checkpoints" / "aepo" / "2" / "params") for run in ("one", "parts")))
    assert [line["step"] for line in read_jsonl(folder / "aepo" / "metrics.jsonl")] == [0, 1, 2]


def test_one_process_writes_and_what_it_writes_is_of_all(runs):
    one, two = (read_jsonl(runs / run / "aepo" / "metrics.jsonl") for run in ("one", "two"))
    assert [line["step"] for line in two] == [0, 1, 2]
    for mine, other in zip(one[1:], two[1:], strict=True):
        assert mine["grad_norm"] > 1e-3
        for name in ("length", "reward/mean", "groups/drawn", "tokens/response", "validation/accuracy", "tau_high", "loss"):
            assert (name in mine) == (name in other) and mine.get(name) == pytest.approx(other.get(name), abs=1e-4), name
    assert len(read_jsonl(runs / "two" / "aepo" / "rollouts.jsonl")) == 2  # those of process 0, one a step
