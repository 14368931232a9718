"""The teacher's traces from each source, the hard split, and that nothing is dropped silently."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from ares_jax.cold_start.teacher import longest_trace, normalised_traces, read_responses, teacher_responses
from ares_jax.config import default_config
from ares_jax.errors import UserError
from ares_jax.metrics import read_jsonl
from ares_jax.rewards.hard_split import hard_problems, held_out, write_hard_split
from ares_jax.service.endpoint import Response
from data_pipeline.errors import DataError
from data_pipeline.problems import Problem
from data_pipeline.sources import open_sources
from tests.cold_start import fake

RIGHT, WRONG = r"<think>a</think>\boxed{1}", r"<think>a</think>\boxed{2}"
IMAGE = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)


def workspace(**teacher):
    config = default_config()
    config.packing.row_tokens, config.sampler.max_prompt_tokens = 100, 40
    with config.unlocked():
        config.cold_start.teacher.update(teacher)
    source = [Problem(f"p{i}", "s", "easy", f"q{i}", (IMAGE,), "1", (RIGHT,) * (i % 2)) for i in range(4)]
    encoder = SimpleNamespace(encode_response=lambda text: [0] * (len(text) + 1))
    return SimpleNamespace(config=config, encoder=encoder, problems=lambda split: source)


def encode(text):
    if "<|image_pad|>" in text:  # as the encoder does
        raise DataError("1 image tokens for 0 image features")
    return [0] * (len(text) + 1)


def test_the_problems_own_responses(tmp_path):
    assert teacher_responses(workspace(), range(4), tmp_path) == {1: [Response(RIGHT)], 3: [Response(RIGHT)]}


def test_responses_of_files(tmp_path):
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    first.write_text(json.dumps({"problem_id": "p0", "responses": [RIGHT, WRONG]}) + "\n\n")
    second.write_text(json.dumps({"problem_id": "p0", "response": RIGHT}) + "\n" + '{"problem_id": "px", "response": "x"}')
    found = teacher_responses(workspace(source="file", files=(str(first), str(second))), range(4), tmp_path)
    assert found == {0: [Response(RIGHT), Response(WRONG), Response(RIGHT)]}
    for line in ("nonsense", '{"problem_id": "p"}', '{"problem_id": "p", "responses": "x"}', "[]"):
        second.write_text(json.dumps({"problem_id": "p0", "response": "a"}) + "\n" + line)
        with pytest.raises(DataError, match="b.jsonl, line 2: needs problem_id and responses"):
            read_responses([second])
    with pytest.raises(DataError, match="gone.jsonl: no such file"):
        teacher_responses(workspace(source="file", files=(str(first), "gone.jsonl")), [0], tmp_path)
    with pytest.raises(DataError, match="teacher.files is empty"):
        teacher_responses(workspace(source="file"), [0], tmp_path)


def test_responses_of_an_endpoint(tmp_path):
    server = fake.Fake(lambda question, body, times: [RIGHT, WRONG], finish="length")
    with fake.serving(server) as url:
        space = workspace(source="endpoint", samples=2)
        space.config.cold_start.teacher.endpoint.url = url
        found = teacher_responses(space, [0, 2], tmp_path)
    assert found == {i: [Response(RIGHT, "length"), Response(WRONG, "length")] for i in (0, 2)}
    assert len(read_jsonl(tmp_path / "teacher.jsonl")) == 2 and server.bodies[0]["max_tokens"] == 60
    with pytest.raises(UserError, match="teacher.endpoint.url is empty"):
        teacher_responses(workspace(source="endpoint"), [0], tmp_path)
    with pytest.raises(UserError, match="teacher.source='x' is not one of data, file, endpoint"):
        teacher_responses(workspace(source="x"), [0], tmp_path)


def test_every_response_is_a_trace_or_a_reject_with_its_verdict(tmp_path):
    space = workspace()
    space.encoder.encode_response = encode
    long, drawing = f"<think>{'a' * 80}</think>\\boxed{{1}}", r"<think><|image_pad|></think>\boxed{1}"
    responses = {
        0: [Response(RIGHT), Response(WRONG), Response(r"b </think> \boxed{1}")],
        1: [Response(RIGHT, "length"), Response(long), Response(drawing)], 2: [],
    }  # fmt: skip
    traces, verdicts = normalised_traces(space, responses, tmp_path)
    assert verdicts == {
        "kept": 1, "rewritten": 1, "truncated": 1, "wrong_answer": 1, "too_long": 1, "image_token": 1,
    }  # fmt: skip
    assert [t.text for t in traces[0]] == [RIGHT, r"<think>b </think> \boxed{1}"] and set(traces) == {0}
    assert traces[0][0].tokens == len(RIGHT) + 1 and longest_trace(space.config) == 60
    rejects = read_jsonl(tmp_path / "rejects.jsonl")
    assert [(r["problem_id"], r["verdict"]) for r in rejects] == [
        ("p0", "wrong_answer"), ("p1", "truncated"), ("p1", "too_long"), ("p1", "image_token"),
    ]  # fmt: skip
    assert rejects[0]["response"] == WRONG and rejects[2]["response"] == long


def test_three_wrong_attempts_make_a_hard_problem_and_the_split_can_be_read_back(tmp_path):
    space = workspace()
    right, wrong = Response(RIGHT), Response(WRONG)
    responses = {0: [wrong] * 3 + [right], 1: [wrong, wrong, right], 2: [wrong] * 2, 3: [wrong] * 4}
    assert hard_problems(space.problems("train"), responses) == [0, 3]
    filmed = [replace(p, videos=(np.stack([IMAGE, IMAGE]),), video_fps=(4.0,)) for p in space.problems("train")]
    write_hard_split(filmed, [0, 3], tmp_path)
    source = open_sources((f"jsonl://{tmp_path}/hard_validation.jsonl",))
    assert [(p.problem_id, p.level, p.question, p.answer) for p in (source[0], source[1])] == [
        ("p0", "hard", "q0", "1"), ("p3", "hard", "q3", "1"),
    ]  # fmt: skip
    np.testing.assert_array_equal(source[1].images[0], IMAGE)
    np.testing.assert_array_equal(source[1].videos[0], [IMAGE, IMAGE])
    assert source[1].video_fps == (4.0,)
    assert held_out(tmp_path) == {("s", "p0"), ("s", "p3")}
    write_hard_split(filmed, [], tmp_path)  # a later cold start finds none
    assert held_out(tmp_path) == frozenset()
