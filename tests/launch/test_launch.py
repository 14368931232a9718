"""The launchers: linted, their dry runs checked, and run against a `gcloud` that loses its slice."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import pytest
import yaml

from tests.launch.jobset_schema import JOBSET

LAUNCH = Path("launch")
TPU = ["--name=ares", "--zone=us-east5-a", "--type=v5p-128", "--bucket=b", "--workdir=runs/7b", "--config=c.py"]
GKE = [
    "--name=ares", "--image=r.io/ares:1", "--claim=runs", "--workdir=7b", "--config=c.py",
    "--learner=tpu-v5p-slice:4x4x8:32:4", "--sampler=tpu-v6e-slice:2x2:1:4", "--samplers=3",
]  # fmt: skip
SLURM = ["--nodes=4", "--gpus=8", "--workdir=/shared/r", "--config=c.py"]


def launched(script, *arguments, **options):
    return subprocess.run(["bash", LAUNCH / script, *arguments], capture_output=True, text=True, **options)


def test_lint():
    tool = Path(sys.executable).with_name("shellcheck")
    result = subprocess.run([tool, *LAUNCH.glob("*.sh")], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("script", ["tpu_vm.sh", "gke.sh", "slurm.sh"])
def test_an_unknown_or_missing_flag_is_named(script):
    for flags, message in ((["--nmae=x"], "--nmae=x is unknown"), ([], "is missing")):
        result = launched(script, *flags)
        assert result.returncode == 2 and message in result.stderr


def test_the_jobset_is_one():
    result = launched("gke.sh", *GKE, "--dry_run", "--", '--config.data.train=("jsonl://a.jsonl",)')
    assert result.returncode == 0, result.stderr
    manifest = yaml.safe_load(result.stdout)
    jsonschema.validate(manifest, JOBSET)
    learner, sampler = manifest["spec"]["replicatedJobs"]
    for job, hosts, chips, replicas in ((learner, 32, 4, 1), (sampler, 1, 4, 3)):
        spec = job["template"]["spec"]
        (container,) = spec["template"]["spec"]["containers"]
        assert spec["parallelism"] == spec["completions"] == hosts and job["replicas"] == replicas
        assert container["resources"]["limits"] == {"google.com/tpu": chips}
        assert container["args"][-1] == '--config.data.train=("jsonl://a.jsonl",)'
        # A pool of slices of one host has several nodes: exclusive, it would take one sampler.
        assert ("metadata" in job["template"]) == (hosts > 1)
        assert {"name": "shm", "mountPath": "/dev/shm"} in container["volumeMounts"]
        assert container["command"][:2] == ["launch/worker.sh", "/runs/7b" if hosts > 1 else "-"]
    (urls,) = [a for a in learner["template"]["spec"]["template"]["spec"]["containers"][0]["args"] if "sampler.url" in a]
    assert urls.count("http://ares-sampler-") == 3 and "http://ares-sampler-2-0.ares:8000" in urls
    assert manifest["spec"]["successPolicy"]["targetReplicatedJobs"] == ["learner"]


@pytest.mark.parametrize("script, flags", [("tpu_vm.sh", TPU), ("gke.sh", GKE), ("slurm.sh", SLURM)])
def test_a_command_of_one_process_runs_once_or_is_refused(script, flags):
    """Several of them would write the same files."""
    result = launched(script, *flags, "--dry_run", "--command=serve")
    assert result.returncode == 2 and "--command=serve is none of cold_start, train, evaluate" in result.stderr
    result = launched(script, *flags, "--dry_run", "--command=convert")
    if script == "gke.sh":
        assert result.returncode == 2 and "one process" in result.stderr
    else:
        (line,) = [line for line in result.stdout.splitlines() if "ares_jax.convert" in line]
        assert "--worker=0" in line if script == "tpu_vm.sh" else "#SBATCH --nodes=1" in result.stdout.splitlines()
        # Of a run that was stopped: `stopped` in its folder starts no other attempt.
        assert re.search(r"launch/worker.sh.{1,2}/dev/null", line)
        assert script == "tpu_vm.sh" or '[[ -e "/dev/null/stopped" ]]' in result.stdout


def test_the_image_holds_what_a_command_needs():
    copied = re.findall(r"^COPY (\S+) \S+$", (LAUNCH / "Dockerfile").read_text(), re.MULTILINE)
    packages = {path.parent.name for path in Path().glob("*/__init__.py")} - {"tests", "benchmarks"}
    assert set(copied) == packages | {"requirements.txt", "launch"}


def test_the_batch_script_is_one():
    result = launched("slurm.sh", *SLURM, "--dry_run", "--", "--config.aepo.steps=3", "--config.model.dtype=a b")
    assert result.returncode == 0, result.stderr
    assert subprocess.run(["bash", "-n"], input=result.stdout, text=True).returncode == 0
    lines = result.stdout.splitlines()
    assert "#SBATCH --nodes=4" in lines and "#SBATCH --signal=TERM@300" in lines and "#SBATCH --requeue" in lines
    assert "#SBATCH --exclusive" in lines and "#SBATCH --mem=0" in lines
    (run,) = [line for line in lines if line.startswith("srun ")]
    assert '--cpus-per-task="${SLURM_CPUS_PER_TASK:-$SLURM_CPUS_ON_NODE}"' in run  # or a task has one core
    assert run.endswith("--config.aepo.steps=3 --config.model.dtype=a\\ b") and "--workdir=/shared/r" in run


@pytest.mark.parametrize(
    "codes, requeued",
    [
        ([0], [False]),
        ([75, 0], [True, False]),  # told to go, then done
        ([2], [False]),  # bad input
        ([134, 134, 137], [True, True, False]),  # a process was lost
        ([134, 75, 134, 134, 134], [True, True, True, True, False]),  # it got on meanwhile
    ],
)
def test_a_stopped_or_crashed_job_is_queued_again_but_not_for_ever(tmp_path, codes, requeued):
    """The batch script itself, with stand-ins for SLURM's commands."""
    srun = '[[ $(cat code) != 75 ]] || touch stopped; exit "$(cat code)"'
    for name, text in {"srun": srun, "scontrol": 'echo "$@" > requeued'}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    flags = ["--nodes=1", f"--workdir={tmp_path}", "--config=c.py", "--crashes=2", "--dry_run"]
    script = launched("slurm.sh", *flags).stdout
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_CPUS_ON_NODE": "2"}
    for number, (code, again) in enumerate(zip(codes, requeued, strict=True)):
        (tmp_path / "code").write_text(str(code))
        (tmp_path / "requeued").unlink(missing_ok=True)
        done = subprocess.run(["bash"], input=script, text=True, env=environment, cwd=tmp_path)
        assert done.returncode == code
        assert (tmp_path / "requeued").exists() == again, number
        assert not again or (tmp_path / "requeued").read_text() == "requeue 7\n"


def test_a_part_of_a_node_is_asked_for():
    result = launched("slurm.sh", *SLURM, "--cpus=16", "--memory=64G", "--dry_run")
    lines = result.stdout.splitlines()
    assert "#SBATCH --cpus-per-task=16" in lines and "#SBATCH --mem=64G" in lines and "#SBATCH --exclusive" not in lines


def test_a_dry_run_on_tpu_runs_nothing_and_prints_all(tmp_path):
    result = launched("tpu_vm.sh", *TPU, "--spot", "--dry_run", env={"PATH": f"{tmp_path}:/usr/bin:/bin"})
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if line.startswith("+ ")]
    steps = [line.split()[5] if "gcloud" in line else line.split()[1] for line in lines]
    assert steps == ["delete", "create", "tar", "scp", "ssh", "ssh"]
    assert "--accelerator-type=v5p-128" in lines[1] and "--spot" in lines[1] and "--worker=all" in lines[5]
    assert "ares_jax.train" in lines[5] and "--output-directory=logs/train.1" in lines[5]


def test_a_preempted_slice_is_made_again_and_the_command_resumed(tmp_path):
    """The third call of ssh, the first of the command, loses the slice."""
    gcloud = tmp_path / "gcloud"
    gcloud.write_text(f"""#!/bin/bash
echo "$4" >> {tmp_path}/calls
case $4 in
  describe) [[ -e {tmp_path}/slice ]] && echo READY || exit 1 ;;
  create) touch {tmp_path}/slice ;;
  delete) rm -f {tmp_path}/slice ;;
  ssh) [[ "$*" != *ares_jax* || $(grep -c ssh {tmp_path}/calls) -gt 2 ]] || {{ rm {tmp_path}/slice; exit 1; }} ;;
esac
""")
    gcloud.chmod(0o755)
    (tmp_path / "sleep").write_text("#!/bin/bash\n")
    (tmp_path / "sleep").chmod(0o755)
    result = launched("tpu_vm.sh", *TPU, f"--logs={tmp_path}/logs", env={"PATH": f"{tmp_path}:/usr/bin:/bin"})
    assert result.returncode == 0, result.stderr
    calls = [call for call in (tmp_path / "calls").read_text().split() if call not in ("describe", "delete")]
    assert calls == ["create", "scp", "ssh", "ssh"] * 2
    assert "attempt 1 of 20 ended, the slice is MISSING" in result.stderr


def test_a_host_is_made_ready_and_what_an_earlier_attempt_left_is_told_to_go(tmp_path):
    """With stand-ins for what it installs with; a second time nothing is installed or mounted again."""
    home, bin = tmp_path / "home", tmp_path / "bin"
    for folder in (bin, home / ".local" / "bin", tmp_path / "launch"):
        folder.mkdir(parents=True)
    tools = {
        "sudo": 'exec "$@"', "curl": "echo key", "tee": "cat > /dev/null", "apt-get": "", "lsb_release": "echo jammy",
        "mountpoint": f"[[ -e {tmp_path}/mounted ]]",
    }  # fmt: skip
    uv = "[[ $1 != venv ]] || { mkdir -p .venv/bin; printf '#!/bin/sh' > .venv/bin/python; chmod +x .venv/bin/python; }"
    # Ubuntu's packages have no gcsfuse: it is there once they were installed.
    tools["apt-get"] = (
        f"[[ $1 != install ]] || {{ printf '#!/bin/bash\\necho \"$0 $*\" >> {tmp_path}/calls; touch {tmp_path}/mounted'"
        f" > {bin}/gcsfuse; chmod +x {bin}/gcsfuse; }}"
    )
    for path, text in {**{bin / name: text for name, text in tools.items()}, home / ".local/bin/uv": uv}.items():
        path.write_text(f'#!/bin/bash\necho "{path.name} $*" >> {tmp_path}/calls\n{text}\n')
        path.chmod(0o755)
    (tmp_path / "launch" / "worker.sh").write_text((LAUNCH / "worker.sh").read_text())
    left = subprocess.Popen(["bash", "launch/worker.sh", "-", "sleep", "15"], cwd=tmp_path)
    (tmp_path / "ares.pid").write_text(f"{left.pid}\n")
    time.sleep(0.3)  # its trap is set
    line = ["bash", (LAUNCH / "tpu_host.sh").absolute(), "bucket", tmp_path / "mnt"]
    options = {"cwd": tmp_path, "env": {"HOME": str(home), "PATH": f"{bin}:/usr/bin:/bin"}}
    waiting = subprocess.Popen(line, **options)
    assert left.wait(timeout=20) != 0  # it, and the command in it, ended by SIGTERM
    assert waiting.wait(timeout=20) == 0
    calls = (tmp_path / "calls").read_text()
    assert "uv venv --quiet --python 3.11 .venv" in calls and "-r requirements.txt jax[tpu] libtpu==" in calls
    assert "gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0" in calls and f"bucket {tmp_path}/mnt" in calls
    (tmp_path / "calls").unlink()
    assert subprocess.run(line, **options).returncode == 0
    again = (tmp_path / "calls").read_text()
    assert "gcsfuse" not in again and "venv --quiet" not in again and "apt-get" not in again


def test_the_worker_hands_sigterm_on_and_asks_to_be_started_again(tmp_path):
    command = (
        f"trap 'touch {tmp_path}/stopped; exit 0' TERM; touch {tmp_path}/ready; for i in {{1..200}}; do sleep 0.05; done"
    )
    process = subprocess.Popen(["bash", LAUNCH / "worker.sh", tmp_path, "bash", "-c", command])
    while not (tmp_path / "ready").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 75
    (tmp_path / "stopped").unlink()
    assert launched("worker.sh", "-", "true").returncode == 75  # a service: its end is never wanted
    assert launched("worker.sh", tmp_path, "true").returncode == 0
    assert launched("worker.sh", tmp_path, "bash", "-c", "exit 3").returncode == 3
