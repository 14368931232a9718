"""The harness against an endpoint that is wrong, slow, full, broken, cut off: nothing is lost, no error counts as wrong."""

import json
import signal
import subprocess
import time

import pytest
from absl import flags
from absl.testing import flagsaver

from ares_jax.commands import evaluate
from ares_jax.errors import UserError
from ares_jax.evaluation.answer_cache import answer_cache
from ares_jax.evaluation.benchmark import Benchmark, Sample, Verdict
from ares_jax.evaluation.benchmarks.math_500 import MATH_500, grade
from ares_jax.evaluation.questions import Asked, cache_path, chat, scaled_size
from ares_jax.evaluation.results import run_benchmark
from ares_jax.metrics import read_jsonl
from ares_jax.service import endpoint
from tests.cold_start import fake
from tests.evaluation import published_layouts
from tests.evaluation.images import png
from tests.warm_python import warm_python

RIGHT, WRONG = r"<think>a</think>\boxed{1}", r"<think>a</think>\boxed{2}"


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(endpoint, "_FIRST_WAIT", 0.01)
    monkeypatch.setattr(endpoint, "_LONGEST_WAIT", 0.05)


def benchmark(count=6, **values):
    def load(folder):
        return [Sample(f"s{i}", (f"q{i}",), "1", groups={"level": str(i % 2)}) for i in range(count)]

    return Benchmark("toy", "Toy", "", (), load, grade, **values)


def run(url, folder, toy=None, **values):
    asked = Asked(url, "m", **{"patience": 5.0, **values})
    return run_benchmark(
        toy or benchmark(), asked, dataset_dir=folder, cache_dir=folder / "cache", output_dir=folder, judge=None
    )


def right(question, body, times):
    return [RIGHT]


def test_results_hold_every_prompt_response_verdict_and_count(tmp_path):
    server = fake.Fake(lambda question, body, times: [WRONG if question == "q1" else RIGHT])
    with fake.serving(server) as url:
        result = run(url + "/v1", tmp_path, temperature=0.5, max_tokens=77, system_prompt="Think.")
    assert result == json.loads((tmp_path / "m___toy.json").read_text())
    metrics = result["metrics"]
    assert (metrics["correct"], metrics["total"], metrics["errors"], metrics["tokens"]) == (5, 6, 0, 42)
    score = metrics["scores"]["accuracy"]
    assert score["value"] == 5 / 6 and score["interval"][0] < 5 / 6 < score["interval"][1] == 1
    assert metrics["groups"]["level"]["1"]["accuracy"] == 2 / 3 and metrics["groups"]["level"]["0"]["accuracy"] == 1
    assert metrics["length_unit"] == "tokens" and [part["answers"] for part in metrics["lengths"].values()] == [6]
    line = result["results"][1]
    assert (line["prompt"], line["response"], line["extracted"], line["correct"], line["tokens"]) == (
        "q1",
        WRONG,
        "2",
        False,
        7,
    )
    body = server.bodies[0]
    assert body["path"] == "/v1/chat/completions" and (body["temperature"], body["max_tokens"]) == (0.5, 77)
    assert body["messages"][0] == {"role": "system", "content": "Think."} and body["messages"][1]["role"] == "user"


def cut_body(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [{"message": {"content": "\\\\boxed{2')


def cut_stream(handler):
    handler.send_response(200)
    handler.send_header("Content-Type", "text/event-stream")
    handler.end_headers()
    handler.wfile.write(b'data: {"choices": [{"delta": {"content": "\\\\boxed{2}"}}]}\n\n')


def no_json(handler):
    handler.send_response(200)
    handler.end_headers()
    handler.wfile.write(b"<html>Bad gateway, try again</html>")


def strange_json(handler):
    data = b'{"choices": [{"message": "hello"}, 3], "usage": null}'
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data)


def slam(handler):
    handler.connection.shutdown(2)


TROUBLES = [429, 503, 500, 502, 408, cut_body, cut_stream, no_json, strange_json, slam]


def test_every_trouble_is_tried_again_and_no_sample_is_lost(tmp_path):
    toy = benchmark(len(TROUBLES))
    server = fake.Fake(lambda question, body, times: TROUBLES[int(question[1:])] if times < 2 else [RIGHT])
    with fake.serving(server) as url:
        result = run(url, tmp_path, toy, retries=3)
    assert [line["correct"] for line in result["results"]] == [True] * len(TROUBLES)
    assert len(server.bodies) == 3 * len(TROUBLES)


def test_an_error_is_no_wrong_answer_and_is_asked_again_the_next_time(tmp_path, capsys):
    server = fake.Fake(lambda question, body, times: {"q1": 500, "q2": no_json, "q3": 400}.get(question, [RIGHT]))
    with fake.serving(server) as url:
        result = run(url, tmp_path, retries=1)
        metrics = result["metrics"]
        assert (metrics["accuracy"], metrics["total"], metrics["errors"]) == (1.0, 3, 3)
        assert metrics["scores"]["accuracy"]["units"] == 3
        errors = [line["error"] for line in result["results"]]
        assert errors == [
            None,
            "HTTP 500 status 500",
            "HTTP 200 an answer without choices",
            "HTTP 400 status 400",
            None,
            None,
        ]
        assert [line["correct"] for line in result["results"]] == [True, None, None, None, True, True]
        asked, server.reply = len(server.bodies), right
        again = run(url, tmp_path, retries=1)
    assert again["metrics"]["errors"] == 0 and again["metrics"]["total"] == 6
    assert sorted(fake.text_of(body) for body in server.bodies[asked:]) == ["q1", "q2", "q3"]


def test_a_slow_endpoint_is_waited_for_and_a_hanging_one_is_an_error(tmp_path):
    def reply(question, body, times):
        if question == "q0":
            time.sleep(1.0)
        return [RIGHT]

    with fake.serving(fake.Fake(reply)) as url:
        result = run(url, tmp_path, benchmark(2), timeout=0.3, retries=1)
        assert result["results"][0]["error"] and result["results"][1]["correct"]
        assert run(url, tmp_path, benchmark(2), timeout=5.0)["metrics"]["errors"] == 0


def test_an_endpoint_that_is_away_ends_it_with_what_was_answered_kept(tmp_path):
    with fake.serving(fake.Fake(right)) as url:
        run(url, tmp_path, benchmark(3))
    with pytest.raises(UserError, match="is away for more than 0.2 s .*same command"):
        run(url, tmp_path, benchmark(9), patience=0.2)
    assert run(url, tmp_path, benchmark(3), patience=0.2)["metrics"]["total"] == 3  # from the cache


def test_a_hundred_threads_lose_nothing(tmp_path):
    server = fake.Fake(right, delay=0.02)
    with fake.serving(server) as url:
        result = run(url, tmp_path, benchmark(200), threads=100)
    assert result["metrics"]["correct"] == 200 and len(server.bodies) == 200 and server.most_at_once > 8


def test_a_killed_evaluation_asks_for_nothing_twice(tmp_path):
    """Real processes, at work: by SIGKILL, then by SIGTERM, which is an orderly end. The last asks for the rest alone."""
    problems = [
        {"unique_id": f"t{i}", "problem": f"q{i}", "answer": "1", "subject": "Algebra", "level": 1} for i in range(60)
    ]
    data = tmp_path / "MATH-500"
    data.mkdir()
    (data / "test.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    server = fake.Fake(right, delay=0.05)
    with fake.serving(server) as url:
        command = [
            warm_python(), "-m", "ares_jax.evaluate", "--model-name", "m", "--openai_base_url", url + "/v1",
            "--datasets=math_500", f"--dataset-dir={tmp_path}", "--output-dir", str(tmp_path / "out"), "--eval-threads=2",
            "--openai-api-key=k",
        ]  # fmt: skip
        kept: set[str] = set()
        for number, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 0)):
            before = len(server.bodies)
            process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
            while len(server.bodies) < before + 20 and process.poll() is None:
                time.sleep(0.01)
            process.send_signal(number)
            said = process.communicate()[1]
            assert process.returncode == code, said
            time.sleep(0.2)
            (path,) = (tmp_path / "out" / "cache").glob("*.jsonl")
            asked, earlier, kept = len(server.bodies) - before, kept, {line["key"] for line in read_jsonl(path)}
            assert kept > earlier and asked - len(kept - earlier) <= 4  # two in flight, two answered as it died
        assert "stopped: all that was done is on disk; the same command resumes" in said
        before = len(server.bodies)
        done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "MATH-500: accuracy 100.0 [100.0, 100.0] (60 answers, 7 tokens each)" in done.stdout
    assert 20 < len(kept) < 60 and len(server.bodies) - before == 60 - len(kept)
    assert server.headers[0]["Authorization"] == "Bearer k"


def test_a_torn_line_is_cut_off_and_two_writers_are_told_apart(tmp_path):
    path = tmp_path / "c" / "a.jsonl"
    with answer_cache(path) as cache:
        cache.put("a", {"response": "ü\ud800"})
        with pytest.raises(UserError, match="another evaluation writes to it"), answer_cache(path):
            pass
    with path.open("ab") as file:
        file.write(b'{"key": "b", "resp')
    with answer_cache(path) as cache:
        assert cache.get("a")["response"] == "ü\ud800" and cache.get("b") is None
        cache.put("b", {"response": "x"})
    with answer_cache(path) as cache:
        assert cache.get("b")["response"] == "x"
    path.write_text("[1]\n")
    with pytest.raises(UserError, match="a line is no answer"), answer_cache(path):
        pass


def test_other_settings_and_other_questions_are_asked_anew(tmp_path):
    server = fake.Fake(right)
    with fake.serving(server) as url:
        run(url, tmp_path)
        run(url, tmp_path)
        assert len(server.bodies) == 6
        run(url, tmp_path, temperature=0.9)
        assert len(server.bodies) == 12
        changed = Benchmark("toy", "Toy", "", (), lambda folder: [Sample("s0", ("other",), "1")], grade)
        run(url, tmp_path, changed)
        assert len(server.bodies) == 13
    a = Asked("u", "m")
    assert cache_path(tmp_path, "t", a) != cache_path(tmp_path, "t", Asked("u", "m", identity="weights@1"))
    assert cache_path(tmp_path, "t", a) == cache_path(tmp_path, "t", Asked("u", "m", threads=99, retries=0, api_key="k"))


def test_repeats_are_drawn_with_seeds_of_their_own_and_scored_as_one_unit(tmp_path):
    server = fake.Fake(lambda question, body, times: [RIGHT if times % 2 else WRONG])
    with fake.serving(server) as url:
        result = run(url, tmp_path, benchmark(3, repeats=4), threads=1)
    assert len(server.bodies) == 12 and len({body["seed"] for body in server.bodies}) == 12
    assert result["metrics"]["scores"]["accuracy"]["value"] == 0.5
    assert result["metrics"]["scores"]["accuracy"]["units"] == 3 and result["metrics"]["total"] == 12


def test_the_judge_decides_what_rules_cannot_and_only_that(tmp_path):
    def verdict(sample, response):
        return Verdict({"yes": True, "no": False}.get(response), response)

    def load(folder):
        return [Sample(f"s{i}", (f"q{i}",), "1") for i in range(5)]

    def reply(question, body, times):
        if body["model"] == "m":
            return [["yes", "no", "maybe right", "maybe wrong", "maybe lost"][int(question[1:])]]
        text = body["messages"][-1]["content"]
        return ["**Verdict: 1**" if "maybe right" in text else "Verdict: 0" if "maybe wrong" in text else "I can't say."]

    toy = Benchmark("toy", "Toy", "", (), load, verdict, judge_rule="Same meaning.")
    server = fake.Fake(reply)
    with fake.serving(server) as url:
        alone = run(url, tmp_path, toy)
        assert alone["metrics"]["undecided"] == 3 and alone["metrics"]["correct"] == 1 and alone["metrics"]["total"] == 5
        arguments = {"dataset_dir": tmp_path, "cache_dir": tmp_path / "cache", "output_dir": tmp_path}
        for _ in range(2):  # the second time from the cache
            result = run_benchmark(
                toy, Asked(url, "m"), judge=Asked(url, "j", system_prompt="not for the judge"), **arguments
            )
    asked = [body for body in server.bodies if body["model"] == "j"]
    assert len(asked) == 3 and all(len(body["messages"]) == 1 and body["temperature"] == 0 for body in asked)
    assert [line["correct"] for line in result["results"]] == [True, False, True, False, None]
    assert result["results"][4]["error"] == "judge: its reply gives no verdict" and result["metrics"]["errors"] == 1
    assert result["metrics"]["undecided"] == 0 and result["metrics"]["accuracy"] == 0.5


def command(folder, url, **values):
    """The command itself, in this process."""
    flags.FLAGS.mark_as_parsed()
    given = {"model_name": "m", "openai_base_url": url, "openai_api_key": "mine", "dataset_dir": str(folder), **values}
    with flagsaver.flagsaver(output_dir=str(folder / "out"), **given):
        evaluate.main(None, None)


def test_a_key_is_sent_to_no_other_host_than_its_own(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    published_layouts.ares_hard(tmp_path / "ares_hard")
    model, judge = (
        fake.Fake(lambda question, body, times: ["Verdict: 1" if body["model"] == "j" else "Hm.\nNo."]) for _ in range(2)
    )
    with fake.serving(model) as url, fake.serving(judge) as other:
        for number, given in enumerate(({"judge_base_url": other}, {"judge_base_url": other, "judge_api_key": "its"}, {})):
            command(tmp_path, url, datasets="ares_hard", judge_model="j", cache_dir=str(tmp_path / f"{number}"), **given)
    assert [header.get("Authorization") for header in judge.headers] == [None, "Bearer its"]
    assert {header["Authorization"] for header in model.headers} == {"Bearer mine"} and len(model.headers) == 4


def test_a_data_set_that_is_missing_is_named_before_anything_is_asked(tmp_path):
    published_layouts.math_500(tmp_path / "MATH-500")
    server = fake.Fake(right)
    with fake.serving(server) as url, pytest.raises(UserError, match="no GSM8K here"):
        command(tmp_path, url, datasets="math_500,gsm8k")
    assert server.bodies == []


def test_pictures_are_scaled_and_stand_where_the_sample_says():
    sample = Sample("s", ("Is ", png(40, 20), " in ", png(4, 3), "?"), "1")
    (message,) = chat(sample, Asked("u", "m", min_pixels=50, max_pixels=200))
    assert [part["type"] for part in message["content"]] == ["text", "image_url", "text", "image_url", "text"]
    sizes = [
        endpoint_image.shape[:2]
        for endpoint_image in map(decoded, (part for part in message["content"] if part["type"] == "image_url"))
    ]
    assert sizes == [(10, 20), (6, 8)]
    assert scaled_size(40, 20, 0, 0) == (40, 20) and scaled_size(10_000, 1, 0, 100) == (1000, 1)


def decoded(part):
    from data_pipeline.images import from_data_url

    return from_data_url(part["image_url"]["url"])


def test_a_damaged_picture_is_an_error_of_its_sample(tmp_path):
    def load(folder):
        return [Sample("broken", (b"no picture", "q0"), "1"), Sample("whole", (png(30, 30), "q1"), "1")]

    with fake.serving(fake.Fake(right)) as url:
        result = run(url, tmp_path, Benchmark("toy", "Toy", "", (), load, grade))
    assert "sample broken: not a readable image" in result["results"][0]["error"] and result["results"][1]["correct"]


def test_a_sample_that_is_there_twice_is_refused(tmp_path):
    toy = Benchmark("toy", "Toy", "", (), lambda folder: [Sample("s", ("q",), "1")] * 2, grade)
    with pytest.raises(UserError, match="2 samples are called 's'"):
        run("http://127.0.0.1:9", tmp_path, toy)


def test_a_data_set_that_is_nowhere_is_named_with_the_command_that_fetches_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="hf download --repo-type dataset HuggingFaceH4/MATH-500 --local-dir"):
        run("http://127.0.0.1:9", tmp_path, MATH_500)
