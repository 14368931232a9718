"""`python -m ares_jax.train`: AEPO, from the cold start's weights, with rollouts from the sampler service."""

from pathlib import Path

import jax
from ml_collections import ConfigDict

from ares_jax.aepo.loop import Trainer
from ares_jax.commands import cli
from ares_jax.lifecycle.startup import STARTUP
from ares_jax.metrics import goodput_sentence, read_jsonl, stage
from ares_jax.parallel.distributed import is_first
from ares_jax.parallel.micro_batch import check_rows
from ares_jax.run.run import open_run

TOPICS = {
    "The run (every field: ares_jax/config.py)": ("config", "workdir"),
    "A trace of it": ("profile_steps",),
    "Several processes": ("coordinator_address", "num_processes", "process_id", "heartbeat_timeout"),
}


def main(config: ConfigDict, workdir: Path) -> None:
    check_rows(config, jax.device_count(), jax.process_count())
    run = open_run(config, workdir)
    trainer = Trainer(run)  # before the sampler: what is missing or damaged is said at once
    STARTUP.mark("weights")
    with stage(workdir, "AEPO") as record, run.sampler() as client:
        record["tokens"] = trainer.train(client)
    print(f"AEPO: weights in {workdir / 'checkpoints' / 'aepo'}")
    if is_first():
        print(goodput_sentence(read_jsonl(trainer.training.folder / "metrics.jsonl")))


def start() -> None:
    """Runs the command with the process's arguments."""
    cli.run(main)
