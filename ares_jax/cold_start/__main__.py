"""`python -m ares_jax.cold_start`: the adaptive cold start. Starting model, pass rates, curation, fine-tuning."""

from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from ares_jax import cli
from ares_jax.cold_start.alignment import align_vision
from ares_jax.cold_start.curation import curate, summary
from ares_jax.cold_start.pass_rates import candidates, measure_pass_rates
from ares_jax.cold_start.sft import example, fine_tune
from ares_jax.metrics import stage, write_json
from ares_jax.sampling.requests import derive_seed
from ares_jax.workspace import Workspace, host, open_workspace
from data_pipeline.prompts import Problem
from data_pipeline.sources import make_iterator


def main(config: ConfigDict, workdir: Path) -> None:
    workspace, c = open_workspace(config, workdir), config.cold_start
    if c.warmup_steps:
        with stage(workdir, "warm-up fine-tuning") as record:
            record["tokens"] = _warm_up(workspace)
    choice = np.random.default_rng([config.seed, 1]).permutation(len(workspace.problems("train")))
    indices = np.sort(choice[: c.pass_rate_problems]).tolist()
    with stage(workdir, "pass rates") as record, workspace.sampler() as client:
        client.push_weights(host(workspace.params("base")), 0)
        records = measure_pass_rates(workspace, client, indices, workdir / "cold_start" / "pass_rates.jsonl")
        record["tokens"] = sum(r["tokens"] for r in records)
    pool = candidates(records)
    choices = curate(pool, c.selected, config.seed)
    write_json(workdir / "cold_start" / "curation.json", summary(pool, choices))
    selected = [(records[choice.candidate]["index"], choice.trace) for choice in choices]
    with stage(workdir, "cold-start fine-tuning") as record:
        record["tokens"] = _fine_tune(workspace, selected)
    print(f"cold start: {len(selected)} problems of {len(records)}, weights in {workdir / 'checkpoints' / 'cold_start'}")


def _warm_up(workspace: Workspace) -> int:
    """A short fine-tuning on traces of any length: the starting model where there is no pretrained one."""
    c, encoder, seed = workspace.config.cold_start, workspace.encoder, workspace.config.seed

    def teach(problem: Problem):
        trace = derive_seed(seed, "warm-up", problem.problem_id) % len(problem.responses)
        return example(encoder(problem), encoder.encode_response(problem.responses[trace]))

    batches = make_iterator(workspace.problems("train"), teach, seed=seed, batch_size=c.batch_size)
    return fine_tune(
        workspace, "base", lambda: align_vision(workspace, workspace.initial_params(), c.alignment_steps), batches,
        steps=c.warmup_steps, learning_rate=c.warmup_learning_rate,
    )  # fmt: skip


def _fine_tune(workspace: Workspace, selected: list[tuple[int, int]]) -> int:
    c, encoder, problems = workspace.config.cold_start, workspace.encoder, workspace.problems("train")

    def teach(choice: tuple[int, int]):
        problem = problems[choice[0]]
        return example(encoder(problem), encoder.encode_response(problem.responses[choice[1]]))

    batches = make_iterator(selected, teach, seed=workspace.config.seed, batch_size=c.batch_size)
    return fine_tune(
        workspace, "cold_start", lambda: workspace.params("base"), batches,
        steps=max(1, c.epochs * len(selected) // c.batch_size), learning_rate=c.learning_rate,
    )  # fmt: skip


if __name__ == "__main__":
    cli.run(main)
