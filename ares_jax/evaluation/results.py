"""One benchmark from its files to its results: ask, grade by rules, ask the judge where it has one, score, write."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ares_jax.errors import UserError
from ares_jax.evaluation.answer_cache import answer_cache
from ares_jax.evaluation.benchmark import Benchmark, Graded, Sample, Verdict
from ares_jax.evaluation.judge import judge_chat, judged
from ares_jax.evaluation.published import find_folder
from ares_jax.evaluation.questions import Asked, Reply, ask_missing, ask_samples, cache_path, file_name
from ares_jax.evaluation.scores import Answered, by_group, by_length, measured
from ares_jax.metrics import write_json

_JUDGE_TOKENS = 1024


@dataclass(frozen=True)
class Outcome:
    """One response with everything that is known of it."""

    sample: Sample
    repeat: int
    reply: Reply
    verdict: Verdict
    judge_reply: str = ""
    error: str = ""  # of the request or the judge's: then it is neither right nor wrong


def run_benchmark(
    benchmark: Benchmark, asked: Asked, *, dataset_dir: Path, cache_dir: Path, output_dir: Path, judge: Asked | None = None,
    limit: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Evaluates one benchmark and writes `<output_dir>/<model>___<benchmark>.json`; returns what it holds.

    `limit`: the first so many samples; 0: all. An answer that is already in the cache is not asked for again.

    Raises:
      UserError: the data set is not there or has another layout, or an endpoint is away.
    """
    samples = list(benchmark.load(find_folder(benchmark, dataset_dir)))[: limit or None]
    _check(benchmark, samples)
    replies = ask_samples(benchmark, samples, asked, cache_dir)
    outcomes = [
        _graded(benchmark, sample, repeat, reply)
        for sample, drawn in zip(samples, replies, strict=True)
        for repeat, reply in enumerate(drawn)
    ]
    if judge is not None and benchmark.judge_rule:
        outcomes = _judge(benchmark, outcomes, judge, cache_dir, asked)
    result = summary(benchmark, outcomes, asked, judge)
    write_json(output_dir / f"{file_name(asked.model)}___{benchmark.name}.json", result)
    return result


def summary(benchmark: Benchmark, outcomes: Sequence[Outcome], asked: Asked, judge: Asked | None) -> dict[str, Any]:
    """Returns what the results file holds: "metrics", "config" and, for every response, "results".

    Unanswered samples count in no accuracy; their whole unit is left out of the metrics. Undecided answers (rules cannot
    tell, and there is no judge) count as not right, and are counted.
    """
    counted = all(outcome.reply.tokens for outcome in outcomes if not outcome.error)
    broken = {_unit(outcome) for outcome in outcomes if outcome.error}
    answered = [_answered(outcome, counted) for outcome in outcomes if not outcome.error]
    whole = [item for item in answered if item.unit not in broken]
    right = sum(item.graded.score for item in answered)
    lengths = [item.length for item in answered]
    metrics: dict[str, Any] = {
        "accuracy": right / len(answered) if answered else None,
        "correct": int(right),
        "total": len(answered),
        "errors": sum(bool(outcome.error) for outcome in outcomes),
        "undecided": sum(outcome.verdict.correct is None and not outcome.error for outcome in outcomes),
        "cut_off": sum(outcome.reply.finish == "length" for outcome in outcomes),
        "headline": benchmark.metrics[0].name,
        "scores": measured(benchmark.metrics, whole),
        "length_unit": "tokens" if counted else "characters",
        "mean_length": sum(lengths) / len(lengths) if lengths else None,
        "tokens": sum(outcome.reply.tokens for outcome in outcomes),
        "prompt_tokens": sum(outcome.reply.prompt_tokens for outcome in outcomes),
        "groups": by_group(answered),
        "lengths": by_length(answered),
    }
    config = {**asked.settings(), "repeats": benchmark.repeats, "judge": judge.settings() if judge else None}
    return {
        "benchmark": benchmark.name, "title": benchmark.title, "model": asked.model, "metrics": metrics, "config": config,
        "results": [_line(outcome) for outcome in outcomes],
    }  # fmt: skip


def _graded(benchmark: Benchmark, sample: Sample, repeat: int, reply: Reply) -> Outcome:
    if reply.error:
        return Outcome(sample, repeat, reply, Verdict(None), error=reply.error)
    return Outcome(sample, repeat, reply, benchmark.grade(sample, reply.text))


def _judge(benchmark: Benchmark, outcomes: Sequence[Outcome], judge: Asked, cache_dir: Path, asked: Asked) -> list[Outcome]:
    """Returns the outcomes with the judge's verdicts where rules could not tell; a judge that fails makes an error."""
    judge = replace(judge, temperature=0.0, top_p=1.0, system_prompt="", max_tokens=_JUDGE_TOKENS)
    open_ones = [i for i, outcome in enumerate(outcomes) if outcome.verdict.correct is None and not outcome.error]
    chats = [judge_chat(outcomes[i].sample, outcomes[i].reply.text, benchmark.judge_rule) for i in open_ones]
    keys = [
        hashlib.blake2b(chat[0]["content"].encode("utf-8", "surrogatepass"), digest_size=12).hexdigest() for chat in chats
    ]
    with answer_cache(cache_path(cache_dir, f"{benchmark.name}-judge", judge)) as cache:
        replies = ask_missing(keys, lambda k: chats[k], judge, cache, description=f"judge {benchmark.name}")
    result = list(outcomes)
    for i, reply in zip(open_ones, replies, strict=True):
        verdict = None if reply.error else judged(reply.text)
        error = f"judge: {reply.error or 'its reply gives no verdict'}" if verdict is None else ""
        result[i] = replace(
            result[i], verdict=Verdict(verdict, result[i].verdict.extracted), judge_reply=reply.text, error=error
        )
    return result


def _answered(outcome: Outcome, counted: bool) -> Answered:
    length = outcome.reply.tokens if counted else len(outcome.reply.text)
    return Answered(Graded(outcome.sample, float(outcome.verdict.correct is True)), length)


def _unit(outcome: Outcome) -> str:
    return outcome.sample.unit or outcome.sample.sample_id


def _line(outcome: Outcome) -> dict[str, Any]:
    prompt = "".join(part if isinstance(part, str) else "<image>" for part in outcome.sample.parts)
    return {
        "id": outcome.sample.sample_id, "repeat": outcome.repeat, "unit": _unit(outcome),
        "groups": dict(outcome.sample.groups),
        "prompt": prompt, "answer": outcome.sample.answer, "response": outcome.reply.text,
        "extracted": outcome.verdict.extracted, "correct": None if outcome.error else outcome.verdict.correct,
        "judge_reply": outcome.judge_reply or None, "error": outcome.error or None, "finish": outcome.reply.finish,
        "tokens": outcome.reply.tokens, "prompt_tokens": outcome.reply.prompt_tokens,
    }  # fmt: skip


def _check(benchmark: Benchmark, samples: Sequence[Sample]) -> None:
    if not samples:
        raise UserError(f"{benchmark.title}: the data set's files hold no sample")
    name, count = Counter(sample.sample_id for sample in samples).most_common(1)[0]
    if count > 1:
        raise UserError(f"{benchmark.title}: {count} samples are called {name!r}; is a file there twice?")
