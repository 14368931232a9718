"""`python -m ares_jax.cold_start`: the adaptive cold start. Starting model, pass rates, curation, fine-tuning."""

from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from ares_jax.aepo.difficulty import bucket
from ares_jax.aepo.kl import ESTIMATORS
from ares_jax.cold_start.alignment import align_vision
from ares_jax.cold_start.curation import curate
from ares_jax.cold_start.curation_report import curation_report, write_report
from ares_jax.cold_start.pass_rates import candidates, endpoint_pass_rates, measure_pass_rates
from ares_jax.cold_start.sft import example, fine_tune
from ares_jax.cold_start.teacher import check as check_teacher
from ares_jax.cold_start.teacher import longest_trace, normalised_traces, teacher_responses
from ares_jax.commands import cli
from ares_jax.errors import UserError
from ares_jax.lifecycle.preemption import from_first
from ares_jax.lifecycle.startup import STARTUP
from ares_jax.lifecycle.watchdog import watchdog
from ares_jax.metrics import stage
from ares_jax.parallel.micro_batch import check_rows, share_of
from ares_jax.rewards.hard_split import hard_problems, write_hard_split
from ares_jax.run.run import Run, open_run
from ares_jax.sampling.gathering import GatheringSampler
from ares_jax.sampling.requests import derive_seed
from data_pipeline.errors import DataError, OverlongError
from data_pipeline.problems import Problem

TOPICS = {
    "The run (every field: ares_jax/config.py)": ("config", "workdir"),
    "A trace of it": ("profile_steps",),
    "Several processes": ("coordinator_address", "num_processes", "process_id", "heartbeat_timeout"),
}


def check(config: ConfigDict) -> None:
    """Raises `UserError` or `DataError` where the cold start cannot run as configured: before pass rates take hours."""
    c = config.cold_start
    check_teacher(c.teacher)
    if c.kl.estimator not in ESTIMATORS:
        raise UserError(f"cold_start.kl.estimator={c.kl.estimator!r} is not one of {', '.join(ESTIMATORS)}")
    if len(c.kl.weight) != 3:
        raise UserError(f"cold_start.kl.weight={c.kl.weight}: give three, for easy, medium and hard problems")
    if longest_trace(config) < 1:
        raise UserError(
            f"packing.row_tokens={config.packing.row_tokens}: a prompt may have {config.sampler.max_prompt_tokens} tokens; "
            "raise it, so that there is room for a trace, or lower sampler.max_prompt_tokens"
        )


def main(config: ConfigDict, workdir: Path) -> None:
    check(config)
    check_rows(config, jax.device_count(), jax.process_count())
    share_of(config.cold_start.batch_size, "cold_start.batch_size", jax.process_count())
    run, c = open_run(config, workdir), config.cold_start
    if c.warmup_steps:
        with stage(workdir, "warm-up fine-tuning") as record:
            record["tokens"] = _warm_up(run)
    choice = np.random.default_rng([config.seed, 1]).permutation(len(run.problems("train")))
    indices = np.sort(choice[: c.pass_rate_problems]).tolist()
    with STARTUP.apart():
        selected = _selected(run, indices)
    with stage(workdir, "cold-start fine-tuning") as record:
        record["tokens"] = _fine_tune(run, selected)
    print(f"cold start: {len(selected)} problems of {len(indices)}, weights in {workdir / 'checkpoints' / 'cold_start'}")


def _selected(run: Run, indices: list[int]) -> list[tuple[int, str, int]]:
    """Measures pass rates, gets teacher traces, curates. Returns what is learned: (problem, trace, difficulty)."""
    workdir, c = run.folder, run.config.cold_start
    folder = workdir / "cold_start"
    with stage(workdir, "pass rates") as record:
        records = _pass_rates(run, indices, folder / "pass_rates.jsonl")
        record["tokens"] = sum(r["tokens"] for r in records)
    measured = [r["index"] for r in records]
    with stage(workdir, "teacher traces"):
        responses = from_first(lambda: teacher_responses(run, measured, folder))
        traces, verdicts = normalised_traces(run, responses, folder)
        hard = hard_problems(run.problems("train"), responses) if c.teacher.source != "data" else []
        write_hard_split(run.problems("train"), hard, folder)
    held_out = set(hard)
    usable = [r for r in records if r["index"] in traces and r["index"] not in held_out]
    if not usable:
        raise UserError(
            f"no problem has a usable teacher trace (verdicts: {verdicts}); {folder / 'rejects.jsonl'} has them all"
        )
    pool = candidates(usable, traces)
    choices = curate(pool, c.selected, run.config.seed)
    problems = {
        "asked": len(indices), "measured": len(records), "held out for hard validation": len(hard),
        "without a usable trace": len(records) - len(usable) - len(hard), "selected": len(choices),
    }  # fmt: skip
    write_report(folder, curation_report(pool, choices, {"verdicts": verdicts, "problems": problems}))
    print(f"cold start: teacher responses: {', '.join(f'{count} {name}' for name, count in verdicts.items())}")
    chosen = [(usable[choice.candidate], choice.trace) for choice in choices]
    rule = run.config.aepo.difficulty_rule
    levels = [int(bucket(r["correct"], r["samples"], rule)) for r, _ in chosen]
    return [(r["index"], traces[r["index"]][i].text, level) for (r, i), level in zip(chosen, levels, strict=True)]


def _pass_rates(run: Run, indices: list[int], path: Path) -> list[dict]:
    if run.config.cold_start.endpoint.url:
        return from_first(lambda: endpoint_pass_rates(run, indices, path))
    with watchdog(run.config.watchdog_seconds), run.sampler() as client:
        run.push(client, run.params("base"), 0)
        return measure_pass_rates(run, GatheringSampler(client), indices, path)


def _warm_up(run: Run) -> int:
    """A short fine-tuning on traces of any length: the starting model where there is no pretrained one."""
    c, encoder, seed = run.config.cold_start, run.encoder, run.config.seed

    def teach(problem: Problem):
        if not problem.responses:
            raise DataError(
                f"problem {problem.problem_id}: no teacher trace; give problems `responses`, or a pretrained model and "
                "cold_start.warmup_steps=0"
            )
        trace = derive_seed(seed, "warm-up", problem.problem_id) % len(problem.responses)
        prompt, response = encoder(problem), encoder.encode_response(problem.responses[trace], problem.problem_id)
        if (size := len(prompt.token_ids) + len(response)) > (most := run.config.packing.row_tokens):
            raise OverlongError(f"problem {problem.problem_id}: {size} tokens of prompt and trace, at most {most} fit")
        return example(prompt, response)

    batches = run.stream(run.problems("train"), teach, seed=seed, batch_size=c.batch_size)
    return fine_tune(
        run, "base", lambda: align_vision(run, run.initial_params(), c.alignment_steps), batches,
        steps=c.warmup_steps, learning_rate=c.warmup_learning_rate, lora=False,
    )  # fmt: skip


def _fine_tune(run: Run, selected: list[tuple[int, str, int]]) -> int:
    """Learns from (problem, trace, difficulty) triples."""
    c, encoder, problems = run.config.cold_start, run.encoder, run.problems("train")

    def teach(choice: tuple[int, str, int]):
        index, trace, difficulty = choice
        prompt = encoder(problems[index])
        return example(prompt, encoder.encode_response(trace, prompt.problem_id), c.kl.weight[difficulty])

    batches = run.stream(selected, teach, seed=run.config.seed, batch_size=c.batch_size)
    return fine_tune(
        run, "cold_start", lambda: run.params("base"), batches,
        steps=max(1, c.epochs * len(selected) // c.batch_size), learning_rate=c.learning_rate,
        lora=run.model.lora is not None, guided=any(c.kl.weight),
    )  # fmt: skip


def start() -> None:
    """Runs the command with the process's arguments."""
    cli.run(main)
