"""What a cluster says of its processes, and what each command makes of it: real processes with its variables."""

import socket
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from jax._src.clusters import cloud_tpu_cluster

from ares_jax.parallel import distributed
from tests.warm_python import warm_python
from tests.xla import environment

_JOIN = """
from ares_jax.parallel import distributed
from tests.warm_python import warm_python
from tests.xla import environment
distributed.initialize()
import jax
print(jax.process_count(), distributed.is_first(), jax.config.values["jax_cuda_visible_devices"])
"""
SLURM = {
    "SLURM_JOB_ID": "4711", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "1", "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0", "SLURM_STEP_NUM_NODES": "1",
}  # fmt: skip


def run(*arguments, **variables):
    return subprocess.run(
        [warm_python(), *arguments], capture_output=True, text=True, env=environment(**variables), timeout=120
    )


def test_a_process_a_node_has_all_gpus_of_its_node():
    """By itself JAX gives a task of SLURM the one whose number it has on its node."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    done = run("-c", _JOIN, **SLURM, JAX_COORDINATOR_PORT=str(port))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1", "True", "all"]


@pytest.mark.parametrize(
    "variables, expected",
    [
        ({}, False),
        (SLURM, True),
        (SLURM | {"SLURM_NTASKS": "8"}, False),  # one a GPU: as JAX has it
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, True),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, False),
    ],
)
def test_one_a_host(variables, expected):
    assert distributed._one_a_host(variables) is expected


@pytest.mark.parametrize(
    "variables, expected",
    [
        ({}, (0, 1)),
        ({"SLURM_PROCID": "3", "SLURM_NTASKS": "4"}, (3, 4)),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}, (1, 2)),
    ],
)
def test_the_number_of_a_task(monkeypatch, variables, expected):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert distributed.task() == expected


class Metadata(BaseHTTPRequestHandler):
    """What Google's metadata server says on worker 2 of a slice of three hosts, one of two slices."""

    attributes = {
        "agent-worker-number": "2", "worker-network-endpoints": "a:1:10.0.0.1,b:2:10.0.0.2,c:3:10.0.0.3",
        "tpu-env": "MEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'\n",
    }  # fmt: skip

    def do_GET(self):
        text = self.attributes.get(self.path.rpartition("/")[2])
        self.send_response(404 if text is None else 200)
        self.end_headers()
        self.wfile.write((text or "").encode())

    def log_message(self, *_):
        pass


def test_the_number_of_a_tpu_vm_is_what_joining_would_give_it(monkeypatch):
    """A TPU VM has no variables: JAX asks Google's metadata server, of which one stands here, and so do we."""
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY")
    with ThreadingHTTPServer(("127.0.0.1", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("GCE_METADATA_IP", f"127.0.0.1:{server.server_port}")
        assert distributed.task() == (0, 1)  # no TPU here: nobody is asked
        monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
        assert distributed.task() == (5, 6)
        monkeypatch.setattr(Metadata, "attributes", {"agent-worker-number": "?", "worker-network-endpoints": "a"})
        monkeypatch.setattr(cloud_tpu_cluster.time, "sleep", lambda seconds: None)
        with pytest.raises(distributed.UserError, match="does not say which of its slice it is .*--num_processes=1"):
            distributed.task()
        server.shutdown()
    monkeypatch.setenv("TPU_WORKER_ID", "2")
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "a,b,c")
    monkeypatch.setattr(cloud_tpu_cluster, "get_tpu_env_value_from_metadata", lambda key: None)
    assert distributed.task() == (2, 3)  # GKE


def test_what_one_process_does_is_done_once(tmp_path):
    """All tasks of a cluster are given the same command; the first says what it would say alone."""
    line = ["-m", "ares_jax.report", f"--workdir={tmp_path}"]
    first, second = (run(*line, SLURM_PROCID=str(i), SLURM_NTASKS="2") for i in range(2))
    assert first.returncode == 2 and "no run in it" in first.stderr
    assert (second.returncode, second.stdout) == (0, "")
    assert second.stderr == "task 1 of 2: one process does this, task 0; --num_processes=1 makes this one do it, too\n"
    alone = run(*line, "--num_processes=1", SLURM_PROCID="1", SLURM_NTASKS="2")
    assert alone.returncode == 2 and "no run in it" in alone.stderr


def test_a_host_of_a_larger_slice_is_told_how_to_be_alone(monkeypatch):
    distributed.require_alone("serve")
    monkeypatch.setattr(distributed.jax, "process_count", lambda: 4)
    with pytest.raises(distributed.UserError, match="serve is one process, and this is number 0 of 4: .*TPU_PROCESS_BOUNDS"):
        distributed.require_alone("serve")
