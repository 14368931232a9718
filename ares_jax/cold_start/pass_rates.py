"""How hard is a problem? The share of sampled responses that a starting model gets right (method.md, section 4)."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from ares_jax.cold_start.curation import Candidate
from ares_jax.cold_start.responses import endpoint_responses, known_records
from ares_jax.cold_start.teacher import Trace
from ares_jax.metrics import append_jsonl
from ares_jax.rewards.grading import is_correct
from ares_jax.run.run import Run
from ares_jax.sampling.requests import derive_seed, rollout_request
from data_pipeline.reading import Reader, read_all

_CHUNK = 128  # problems between two writes: what a killed run loses at most


def measure_pass_rates(run: Run, client, indices: Sequence[int], path: Path) -> list[dict]:
    """Returns one record for each readable training problem in `indices`; what `path` already holds is not asked again.

    A record: {"index", "problem_id", "source", "level", "correct", "samples", "tokens": sampled, "asked"}.

    Raises:
      UserError: `path` holds the answers to another request.
    """
    config, problems, encoder = run.config, run.problems("train"), run.encoder
    samples, draw = config.cold_start.pass_rate_samples, config.cold_start.endpoint
    how = {
        "max_new_tokens": config.sampler.max_response_tokens, "temperature": draw.temperature, "top_p": draw.top_p,
    }  # fmt: skip
    asked = {"sampler": "our own", "samples": samples, **how}
    reader, ledger = Reader(problems, lambda problem: (problem, encoder(problem))), run.ledger(problems)
    known = known_records(path, asked)
    todo = [index for index in indices if index not in known]
    bar = tqdm(total=len(indices), initial=len(indices) - len(todo), desc="cold_start: pass rates", unit="problem")
    for begin in range(0, len(todo), _CHUNK):
        chunk = todo[begin : begin + _CHUNK]
        members = list(read_all(reader, chunk, ledger))
        requests = [
            rollout_request(
                prompt, seed=derive_seed(config.seed, "pass rate", problem.problem_id), group_size=samples, **how
            )
            for _, (problem, prompt) in members
        ]  # fmt: skip
        groups = client.rollouts(requests, on_group=lambda index, group: bar.update()) if requests else []
        for (index, (problem, _)), group in zip(members, groups, strict=True):
            texts = [run.decode(leaf.token_ids.tolist()) for leaf in group.leaves]
            known[index] = {
                "index": index, "problem_id": problem.problem_id, "source": problem.source, "level": problem.level,
                "correct": sum(is_correct(text, problem.answer) for text in texts), "samples": samples,
                "tokens": sum(len(leaf.token_ids) for leaf in group.leaves), "asked": asked,
            }  # fmt: skip
        append_jsonl(path, [known[index] for index, _ in members])
        mean = sum(r["correct"] / r["samples"] for r in known.values()) / max(len(known), 1)
        bar.set_postfix(pass_rate=f"{mean:.2f}")
    bar.close()
    return [known[index] for index in indices if index in known]


def endpoint_pass_rates(run: Run, indices: Sequence[int], path: Path) -> list[dict]:
    """Returns the same records, measured at `cold_start.endpoint`; problems that it refuses are left out and reported."""
    config, problems = run.config, run.problems("train")
    readable = read_all(Reader(problems, run.encoder), indices, run.ledger(problems))
    records = endpoint_responses(
        config.cold_start.endpoint, problems, [index for index, _ in readable], path,
        samples=config.cold_start.pass_rate_samples, max_tokens=config.sampler.max_response_tokens, seed=config.seed,
        name="pass rates",
    )  # fmt: skip
    return [{**r, "correct": sum(r["verdicts"]), "samples": len(r["verdicts"])} for r in records]


def candidates(records: Sequence[dict], traces: Mapping[int, Sequence[Trace]]) -> list[Candidate]:
    """Returns the records as curation wants them, with their traces' lengths; those without a trace are left out."""
    return [
        Candidate(r["problem_id"], r["source"], r["correct"] / r["samples"], tuple(t.tokens for t in traces[r["index"]]))
        for r in records
        if traces.get(r["index"])
    ]
