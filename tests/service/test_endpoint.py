"""Questions to an endpoint: concurrency, pace, retries, refusals, resumption, and what the user reads when it is away."""

import json
import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from ares_jax.cold_start.responses import endpoint_responses
from ares_jax.config import default_config
from ares_jax.errors import UserError
from ares_jax.metrics import read_jsonl
from ares_jax.service import endpoint as module
from data_pipeline.errors import DataError
from data_pipeline.problems import Problem
from tests.cold_start import fake

RIGHT, WRONG = r"<think>a</think>\boxed{1}", r"<think>a</think>\boxed{2}"


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(module, "_FIRST_WAIT", 0.01)
    monkeypatch.setattr(module, "_LONGEST_WAIT", 0.05)


def problems(count, images=()):
    return [Problem(f"p{i}", "s", "easy", f"q{i}", images, "1") for i in range(count)]


def config(url, **values):
    section = default_config().cold_start.endpoint
    with section.unlocked():
        section.update(url=url, model="m", patience=5.0, retries=3, concurrency=4, **values)
    return section


def ask(section, source, path, samples=4, indices=None):
    indices = range(len(source)) if indices is None else indices
    return endpoint_responses(
        section, source, list(indices), path, samples=samples, max_tokens=99, seed=0, name="pass rates"
    )  # fmt: skip


def half(question, body, times):
    return [RIGHT, WRONG] * (body["n"] // 2)


def test_images_stand_where_the_question_says(tmp_path):
    image = np.zeros((4, 4, 3), np.uint8)
    asked = Problem("p", "s", "easy", "Is <image> in <image>?", (image, image), "1")
    (message,) = module.messages(asked, "Box it.")
    kinds = [part["type"] for part in message["content"]]
    assert kinds == ["text", "image_url", "text", "image_url", "text"] and message["content"][-1]["text"] == "?\nBox it."
    assert module.messages(problems(1)[0], "") == [{"role": "user", "content": "q0"}]
    with pytest.raises(DataError, match="problem p: videos are not sent"):
        module.messages(replace(asked, videos=(image[None],)), "")
    filmed = [*problems(2), replace(asked, videos=(image[None],))]
    with fake.serving(fake.Fake(half)) as url:
        assert [r["index"] for r in ask(config(url), filmed, tmp_path / "r.jsonl")] == [0, 1]
    assert "videos are not sent" in read_jsonl(tmp_path / "r.refused.jsonl")[0]["reason"]


def test_every_problem_is_asked_once_graded_and_recorded(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    server, image = fake.Fake(half), np.zeros((4, 4, 3), np.uint8)
    with fake.serving(server) as url:
        records = ask(config(url + "/v1"), problems(12, (image,)), tmp_path / "r.jsonl")
    assert [r["index"] for r in records] == list(range(12)) and len(server.bodies) == 12
    assert all(r["verdicts"] == [True, False, True, False] and r["tokens"] == 28 for r in records)
    assert {r["index"]: r for r in read_jsonl(tmp_path / "r.jsonl")} == {r["index"]: r for r in records}
    body = server.bodies[0]
    assert body["path"] == "/v1/chat/completions" and (body["model"], body["max_tokens"], body["n"]) == ("m", 99, 4)
    picture, text = body["messages"][0]["content"]
    assert picture["image_url"]["url"].startswith("data:image/png;base64,") and text["text"].endswith(r"\boxed{}.")
    assert server.headers[0]["Authorization"] == "Bearer secret"
    assert len({b["seed"] for b in server.bodies}) == 12


def test_requests_run_at_once_up_to_the_limit(tmp_path):
    server = fake.Fake(half, delay=0.05)
    with fake.serving(server) as url:
        ask(config(url), problems(12), tmp_path / "r.jsonl")
    assert server.most_at_once == 4


def test_the_rate_limit_holds(tmp_path):
    server = fake.Fake(half)
    with fake.serving(server) as url:
        ask(config(url, requests_per_minute=1200), problems(8), tmp_path / "r.jsonl")
    assert server.started[-1] - server.started[0] >= 7 * 0.05 - 0.03


def test_only_what_is_missing_is_asked_again(tmp_path):
    path, server = tmp_path / "r.jsonl", fake.Fake(half)
    with fake.serving(server) as url:
        first = ask(config(url), problems(9), path, indices=range(6))
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(lines[:5]) + lines[5][:40])  # killed while it wrote the sixth
        lost = json.loads(lines[5])["index"]
        again = ask(config(url), problems(9), path)
    assert sorted(fake.text_of(b) for b in server.bodies[6:]) == sorted({f"q{lost}", "q6", "q7", "q8"})
    assert again[:6] == first and len(read_jsonl(path)) == 9
    with pytest.raises(UserError, match="r.jsonl holds answers to .*'samples': 4.*; move that file away"):
        ask(config(url), problems(9), path, samples=2)


def test_a_failed_request_is_tried_again_and_a_refused_problem_is_named(tmp_path, capsys):
    def reply(question, body, times):
        if question == "q1":
            return 400
        if question == "q2":
            return 500
        return (
            (500, 429, 503, half(question, body, times))[min(times, 3)] if question == "q3" else half(question, body, times)
        )

    server = fake.Fake(reply)
    with fake.serving(server) as url:
        records = ask(config(url), problems(5), tmp_path / "r.jsonl")
        assert [r["index"] for r in records] == [0, 3, 4]
        refused = read_jsonl(tmp_path / "r.refused.jsonl")
        assert [(r["problem_id"], r["reason"]) for r in refused] == [
            ("p1", "HTTP 400 status 400"),
            ("p2", "HTTP 500 status 500"),
        ]
        assert "2 of 5 problems were refused" in capsys.readouterr().out
        server.reply = half
        assert len(ask(config(url), problems(5), tmp_path / "r.jsonl")) == 5
        assert read_jsonl(tmp_path / "r.refused.jsonl") == []


@pytest.mark.parametrize("most", [1, 3])
def test_a_server_that_gives_fewer_choices_is_asked_for_the_rest(tmp_path, most):
    server = fake.Fake(lambda question, body, times: [RIGHT] * min(body["n"], most))
    with fake.serving(server) as url:
        (record,) = ask(config(url), problems(1), tmp_path / "r.jsonl")
    assert len(record["responses"]) == 4 and len(server.bodies) == -(-4 // most)
    assert len({b["seed"] for b in server.bodies}) == len(server.bodies)


def test_a_server_that_refuses_several_choices_is_asked_for_one(tmp_path):
    server = fake.Fake(lambda question, body, times: 400 if body["n"] > 1 else [RIGHT])
    with fake.serving(server) as url:
        records = ask(config(url), problems(6), tmp_path / "r.jsonl")
    assert all(len(r["responses"]) == 4 for r in records)
    assert sum(b["n"] > 1 for b in server.bodies) <= 4  # those that were in flight when it was learned


def test_an_endpoint_that_is_away_is_named_and_one_that_comes_back_is_waited_for(tmp_path):
    port = fake.free_port()
    away = config(f"http://127.0.0.1:{port}")
    with away.unlocked():
        away.patience = 0.3
    with pytest.raises(
        UserError, match=f"http://127.0.0.1:{port}/v1/chat/completions is away for more than 0.3 s .*same command"
    ):
        ask(away, problems(3), tmp_path / "r.jsonl")
    away.patience = 20.0
    result = []
    thread = threading.Thread(target=lambda: result.extend(ask(away, problems(3), tmp_path / "r.jsonl")))
    thread.start()
    time.sleep(0.2)
    with fake.serving(fake.Fake(half), port):
        thread.join()
    assert len(result) == 3


@pytest.mark.parametrize("status, hint", [(401, "OPENAI_API_KEY"), (404, "model 'm'")])
def test_a_wrong_key_or_model_ends_it_at_once(tmp_path, status, hint):
    server = fake.Fake(lambda question, body, times: status)
    with fake.serving(server) as url, pytest.raises(UserError, match=hint):
        ask(config(url), problems(50), tmp_path / "r.jsonl")
    assert len(server.bodies) <= 8


def test_an_endpoint_that_refuses_everything_is_not_asked_everything(tmp_path):
    server = fake.Fake(lambda question, body, times: 400)
    with fake.serving(server) as url, pytest.raises(UserError, match="refused 21 problems in a row"):
        ask(config(url), problems(200), tmp_path / "r.jsonl")
    assert len(server.bodies) <= 60


def test_many_problems_that_are_too_long_for_it_do_not_end_the_rest(tmp_path):
    server = fake.Fake(lambda question, body, times: 400 if 30 <= int(question[1:]) < 58 else half(question, body, times))
    with fake.serving(server) as url:
        records = ask(config(url), problems(60), tmp_path / "r.jsonl")
    assert [r["index"] for r in records] == [*range(30), 58, 59]
    assert len(read_jsonl(tmp_path / "r.refused.jsonl")) == 28


def test_thinking_that_the_server_parts_off_is_put_back():
    choice = {"message": {"content": r"\boxed{1}", "reasoning_content": "hm"}, "finish_reason": "length"}
    assert module._response(choice) == module.Response(r"<think>hm</think>\boxed{1}", "length")
    assert module._response({"message": {"content": None}}) == module.Response("", "stop")
