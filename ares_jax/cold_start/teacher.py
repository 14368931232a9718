"""The teacher's traces: from the problems themselves, from files or from an endpoint; normalised, each with a verdict."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ml_collections import ConfigDict

from ares_jax.cold_start.normalise import KEPT, REJECTS, REWRITTEN, normalise
from ares_jax.cold_start.responses import endpoint_responses
from ares_jax.errors import UserError
from ares_jax.metrics import write_atomic
from ares_jax.run.run import Run
from ares_jax.service.endpoint import Response
from data_pipeline.errors import DataError


@dataclass(frozen=True)
class Trace:
    """A normalised response and its length in tokens, the end of turn included."""

    text: str
    tokens: int


def check(teacher: ConfigDict) -> None:
    """Raises `UserError` or `DataError` if the section `cold_start.teacher` names no teacher that can be asked or read."""
    if teacher.source not in ("data", "file", "endpoint"):
        raise UserError(f"cold_start.teacher.source={teacher.source!r} is not one of data, file, endpoint")
    if teacher.source == "endpoint" and not teacher.endpoint.url:
        raise UserError("cold_start.teacher.endpoint.url is empty; name the teacher's endpoint, such as http://host:8000")
    if teacher.source == "file" and not teacher.files:
        raise DataError("cold_start.teacher.files is empty; name JSONL files of problem_id and responses")
    for file in teacher.files if teacher.source == "file" else ():
        if not Path(file).is_file():
            raise DataError(f"{file}: no such file; cold_start.teacher.files lists JSONL files")


def teacher_responses(run: Run, indices: Sequence[int], folder: Path) -> dict[int, list[Response]]:
    """Returns the teacher's raw responses to the training problems `indices`; a problem without any is left out.

    Raises as `check` and `read_responses` do.
    """
    teacher, problems = run.config.cold_start.teacher, run.problems("train")
    check(teacher)
    if teacher.source == "data":
        found = {index: [Response(text) for text in problems[index].responses] for index in indices}
        return {index: responses for index, responses in found.items() if responses}
    if teacher.source == "file":
        by_id = read_responses([Path(file) for file in teacher.files])
        names = {index: problems[index].problem_id for index in indices}
        return {index: by_id[name] for index, name in names.items() if name in by_id}
    records = endpoint_responses(
        teacher.endpoint, problems, indices, folder / "teacher.jsonl", samples=teacher.samples,
        max_tokens=longest_trace(run.config), seed=run.config.seed, name="teacher",
    )  # fmt: skip
    pairs = {r["index"]: zip(r["responses"], r["finish"], strict=True) for r in records}
    return {index: [Response(*pair) for pair in both] for index, both in pairs.items()}


def longest_trace(config: ConfigDict) -> int:
    """Returns the tokens of a trace that fits a training row beside the longest prompt."""
    return config.packing.row_tokens - config.sampler.max_prompt_tokens


def read_responses(files: Sequence[Path]) -> dict[str, list[Response]]:
    """Reads JSONL files of {"problem_id", "responses": [text]} (or "response": text), several lines a problem allowed.

    Raises:
      DataError: naming file and line.
    """
    found: dict[str, list[Response]] = {}
    for file in files:
        with file.open() as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                    texts = record["responses"] if "responses" in record else [record["response"]]
                    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
                        raise TypeError("responses is no list of texts")
                    found.setdefault(str(record["problem_id"]), []).extend(map(Response, texts))
                except (ValueError, KeyError, TypeError) as error:
                    raise DataError(f"{file}, line {number}: needs problem_id and responses ({error!r})") from None
    return found


def normalised_traces(
    run: Run, responses: Mapping[int, Sequence[Response]], folder: Path
) -> tuple[dict[int, list[Trace]], dict[str, int]]:
    """Returns the usable traces of each problem that has any, and how many responses got each verdict.

    Nothing is dropped silently: every response that is not used stands in `folder/rejects.jsonl` with its verdict.
    """
    problems, encoder = run.problems("train"), run.encoder
    limit = longest_trace(run.config)
    traces: dict[int, list[Trace]] = {}
    counts: Counter[str] = Counter()
    rejects = []
    for index, raw in responses.items():
        problem = problems[index]
        for response in raw:
            result = normalise(response.text, problem.answer, response.finish_reason)
            verdict = result.verdict
            if result.text is not None:
                try:
                    tokens = len(encoder.encode_response(result.text))
                except DataError:
                    verdict = "image_token"
                else:
                    if tokens <= limit:
                        traces.setdefault(index, []).append(Trace(result.text, tokens))
                    else:
                        verdict = "too_long"
            counts[verdict] += 1
            if verdict in REJECTS:
                rejects.append(
                    {
                        "problem_id": problem.problem_id, "verdict": verdict, "answer": problem.answer,
                        "response": response.text,
                    }
                )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "rejects.jsonl", "".join(json.dumps(line) + "\n" for line in rejects))
    return traces, {name: counts[name] for name in (KEPT, REWRITTEN, *REJECTS) if counts[name]}
