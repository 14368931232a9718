"""Pass rates from our own sampler: graded, written as they come, gone on with, never mixed with those of another request."""

from types import SimpleNamespace

import numpy as np
import pytest

from ares_jax.cold_start.pass_rates import candidates, endpoint_pass_rates, measure_pass_rates
from ares_jax.cold_start.teacher import Trace
from ares_jax.config import default_config
from ares_jax.errors import UserError
from ares_jax.metrics import read_jsonl
from data_pipeline.errors import DataError
from data_pipeline.problems import Problem
from data_pipeline.reading import Ledger
from tests.cold_start import fake

SIZE = 300  # problems: three chunks


class Client:
    """Answers problem i rightly i % 5 times of 4, at most; dies after `dies` calls."""

    def __init__(self, dies=99):
        self.calls, self.dies = [], dies

    def rollouts(self, requests, on_group):
        if len(self.calls) == self.dies:
            raise KeyboardInterrupt
        self.calls.append(requests)
        return [self.group(int(request.problem_id), request.group_size) for request in requests]

    def group(self, index, size):
        return SimpleNamespace(leaves=[SimpleNamespace(token_ids=np.array([index, k < index % 5])) for k in range(size)])


@pytest.fixture
def space():
    config = default_config()
    config.cold_start.pass_rate_samples = 4
    config.sampler.max_response_tokens = 77

    def encode(problem):
        if problem.problem_id == "7":
            raise DataError("problem 7 is corrupt")
        return SimpleNamespace(
            problem_id=problem.problem_id, token_ids=None, patches=None, grid_thw=None, positions=None, rope_delta=0
        )

    problems = [Problem(str(i), "s", "easy", f"q{i}", (), "1") for i in range(SIZE)]
    return SimpleNamespace(
        config=config, encoder=encode, problems=lambda split: problems, ledger=lambda source: Ledger(len(source), 0.01),
        decode=lambda ids: r"\boxed{1}" if ids[1] else r"\boxed{2}",
    )  # fmt: skip


def test_a_killed_measurement_goes_on_and_asks_nothing_twice(space, tmp_path):
    path, indices = tmp_path / "sub" / "rates.jsonl", range(0, SIZE)
    killed = Client(dies=1)
    with pytest.raises(KeyboardInterrupt):
        measure_pass_rates(space, killed, indices, path)
    assert 0 < len(read_jsonl(path)) < SIZE / 2
    path.write_text(path.read_text() + '{"index": 299, "prob')  # and killed while it wrote
    rest = Client()
    records = measure_pass_rates(space, rest, indices, path)
    asked = [request.problem_id for client in (killed, rest) for call in client.calls for request in call]
    assert len(asked) == len(set(asked)) == SIZE - 1 and "7" not in asked
    assert [r["index"] for r in records] == [i for i in indices if i != 7] and {r["index"] for r in read_jsonl(path)} == {
        r["index"] for r in records
    }
    assert all(r["correct"] == min(r["index"] % 5, 4) and r["samples"] == 4 and r["tokens"] == 8 for r in records)
    again = Client()
    assert measure_pass_rates(space, again, indices, path) == records and not again.calls


def test_they_are_drawn_as_told_and_never_mixed(space, tmp_path):
    space.config.cold_start.endpoint.update(temperature=0.7, top_p=0.9)
    client = Client()
    (record,) = measure_pass_rates(space, client, [3], tmp_path / "r.jsonl")
    ((request,),) = client.calls
    assert (request.temperature, request.top_p, request.max_new_tokens, request.group_size) == (0.7, 0.9, 77, 4)
    space.config.cold_start.endpoint.temperature = 1.0
    with pytest.raises(UserError, match="r.jsonl holds answers to .*0.7.*move that file away"):
        measure_pass_rates(space, Client(), [3], tmp_path / "r.jsonl")
    # Nor with an endpoint's, either way round.
    with fake.serving(fake.Fake(lambda question, body, times: [r"\boxed{1}"] * body["n"])) as url:
        space.config.cold_start.endpoint.update(url=url)
        with pytest.raises(UserError, match="r.jsonl holds answers to .*our own"):
            endpoint_pass_rates(space, [3], tmp_path / "r.jsonl")
        (record,) = endpoint_pass_rates(space, [3], tmp_path / "e.jsonl")
    assert (record["correct"], record["samples"]) == (4, 4)
    with pytest.raises(UserError, match="e.jsonl holds answers to"):
        measure_pass_rates(space, Client(), [3], tmp_path / "e.jsonl")


def test_candidates_are_the_problems_with_a_trace():
    records = [{"index": i, "problem_id": f"p{i}", "source": "s", "correct": i, "samples": 4} for i in range(3)]
    (found,) = candidates(records, {1: [Trace("a", 5), Trace("b", 9)], 2: []})
    assert (found.problem_id, found.pass_rate, found.lengths) == ("p1", 0.25, (5, 9))
