"""A small training loop between the real start-up, steps and checkpoints: what test_survival.py does things to."""

import os
import resource
import time

import jax
import jax.numpy as jnp
from absl import flags
from jax.sharding import NamedSharding, PartitionSpec

from ares_jax.checkpoints import manager
from ares_jax.checkpoints.manager import Checkpoints
from ares_jax.commands import cli
from ares_jax.errors import Preempted
from ares_jax.lifecycle.step_guard import StepGuard
from ares_jax.metrics import MetricsWriter, append_jsonl
from ares_jax.parallel.distributed import barrier, put
from ares_jax.parallel.sharding import make_mesh
from ares_jax.run.environment import save_config

_MODES = ["train", "hang", "lost", "full", "forbidden", "half", "metrics", "rollouts", "config", "memory"]
_MODE = flags.DEFINE_enum("mode", "train", _MODES, "what goes wrong")


def main(config, workdir):
    mesh = make_mesh()
    sharding = NamedSharding(mesh, PartitionSpec("fsdp"))
    if _MODE.value == "half":
        manager.LONGEST_SAVE = 10
    checkpoints = Checkpoints(workdir / "steps", keep=3)
    params = {"w": put(jnp.zeros(4096), sharding)}
    first, progress = checkpoints.latest() or 0, None
    if first:
        params, _, extra = checkpoints.restore(first, params, params)
        progress = extra["progress"]
    print("resumed at", first, "on", len(jax.devices()), float(params["w"][0] if first else 0), flush=True)
    if _MODE.value in ("full", "forbidden", "half"):
        return storage(checkpoints, params)
    if _MODE.value in ("metrics", "rollouts", "config"):
        return small_files(config, workdir)
    if _MODE.value == "memory":
        jnp.zeros(2**46).block_until_ready()
    with StepGuard(workdir, watchdog=config.watchdog_seconds, state=progress) as around:
        for step in range(first, 10_000):
            with around.step(step):
                if _MODE.value == "hang" and jax.process_index() == 1:
                    time.sleep(600)  # never joins the others
                if _MODE.value in ("hang", "lost"):
                    barrier("everyone")
                params = {"w": params["w"] + 1}
                time.sleep(0.02)
            if _MODE.value == "lost" and step == 4:
                checkpoints.save(step + 1, params, params, {"progress": around.state()})
                checkpoints.wait()
            if around.must_stop():
                checkpoints.save(step + 1, params, params, {"progress": around.state()})
                checkpoints.wait()
                raise Preempted(f"saved at step {step + 1}, goodput {around.goodput():.2f}")


def storage(checkpoints, params):
    """Saves once, then on a full disk (of one host in two, if it is `half`) or without permission."""
    checkpoints.save(1, params, params, {"progress": None})
    checkpoints.wait()
    if _MODE.value == "forbidden":
        os.seteuid(65534)
    elif _MODE.value == "full" or jax.process_index() == 1:
        fill_disk()
    checkpoints.save(2, params, params, {"progress": None})
    checkpoints.wait()


def small_files(config, workdir):
    """Writes on a full disk what is not a checkpoint."""
    writer = MetricsWriter(workdir, 0)
    fill_disk()
    long = {f"m{i}": i for i in range(99)}
    if _MODE.value == "metrics":
        writer.write(1, long)
    elif _MODE.value == "rollouts":
        append_jsonl(workdir / "rollouts.jsonl", [long])
    else:
        save_config(config, workdir)


def fill_disk():
    """No file may grow from now on: EFBIG."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


if __name__ == "__main__":
    cli.run(main)
