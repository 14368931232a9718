"""A run of two processes with 4 devices each is the run of one process with 8: real processes, gloo between them."""

import os
import socket
import subprocess
import sys

import numpy as np
import orbax.checkpoint as ocp
import pytest

from ares_jax.metrics import read_jsonl

FLAGS = {
    "model.text.hidden_size": 32, "model.text.intermediate_size": 48, "model.text.num_layers": 2,
    "model.text.num_heads": 2, "model.text.num_kv_heads": 1, "model.text.mrope_section": "(2,3,3)",
    "model.vision.hidden_size": 32, "model.vision.intermediate_size": 32, "mesh.tensor": 2,
    "data.validation": "('digits://validation?size=4',)", "data.prefetch": 4,
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

QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"  # to compile, not to run


def start(folder, devices, *flags):
    """Starts one process of a run."""
    line = [sys.executable, "-m", "tests.parallel.pipeline", "--config=configs/digits_cpu.py", f"--workdir={folder}"]
    line += [f"--config.{name}={value}" for name, value in FLAGS.items()]
    options = f"--xla_force_host_platform_device_count={devices} {QUICK}"
    environment = {**os.environ, "XLA_FLAGS": options}
    return subprocess.Popen([*line, *flags], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(processes):
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output[-3000:]
    return outputs


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    cluster = [f"--coordinator_address={address}", "--num_processes=2"]
    finish([start(folder / "two", 4, *cluster, f"--process_id={i}") for i in range(2)])
    finish([start(folder / "one", 8)])
    return folder


def weights(folder):
    """Reads them whole, whatever devices they lay on."""
    reader = ocp.PyTreeCheckpointer()
    tree = reader.metadata(folder).item_metadata.tree
    return reader.restore(folder, restore_args={name: ocp.RestoreArgs(restore_type=np.ndarray) for name in tree})


@pytest.mark.parametrize("stage, step", [("base", 2), ("cold_start", 1), ("aepo", 2)])
def test_the_weights_are_those_of_one_process(runs, stage, step):
    one, two = (weights(runs / run / "checkpoints" / stage / str(step) / "params") for run in ("one", "two"))
    assert one.keys() == two.keys() and len(one) > 20
    for name in one:
        np.testing.assert_allclose(one[name], two[name], atol=2e-5, err_msg=name)


def test_one_process_writes_and_what_it_writes_is_of_all(runs):
    one, two = (read_jsonl(runs / run / "aepo" / "metrics.jsonl") for run in ("one", "two"))
    assert [line["step"] for line in two] == [0, 1, 2]
    for mine, other in zip(one[1:], two[1:], strict=True):
        assert mine["grad_norm"] > 1e-3
        for name in ("length", "reward/mean", "groups/drawn", "tokens/response", "validation/accuracy", "tau_high", "loss"):
            assert (name in mine) == (name in other) and mine.get(name) == pytest.approx(other.get(name), abs=1e-4), name
    assert len(read_jsonl(runs / "two" / "aepo" / "rollouts.jsonl")) == 2  # those of process 0, one a step
