"""The official OpenAI client against a real engine with the tiny digits model."""

import base64
import contextlib
import http.server
import io
import threading
import time

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from ares_jax.sampling.requests import rollout_request
from ares_jax.service.chat import ChatFormat
from ares_jax.service.chat_routes import ChatLimits
from ares_jax.service.protocol import decode_group, encode_request
from ares_jax.service.server import Limits
from data_pipeline.digits import DigitsSource
from data_pipeline.images import to_data_url
from data_pipeline.prompts import Prompt, PromptEncoder
from tests import digits
from tests.service import fake

ENCODER = PromptEncoder(digits.encoder().tokenizer, digits.encoder().image_processor, max_tokens=64, max_patches=48)
EOS = ENCODER.tokenizer.eos_token_id
FORMAT = ChatFormat(ENCODER, max_prompt_tokens=64)
PROBLEM = DigitsSource("train", 3, seed=0)[1]
QUESTION = [{"role": "user", "content": "Add the digits."}]
SEEN = [
    {
        "role": "user",
        "content": [
            {"type": "image_url", "image_url": {"url": to_data_url(PROBLEM.images[0]), "detail": "high"}},
            {"type": "text", "text": PROBLEM.question},
        ],
    }
]


def client(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)


@pytest.fixture(scope="module")
def engine():
    return digits.engine()


@pytest.fixture(scope="module")
def server(engine):
    with fake.serving(engine, chat_format=FORMAT) as url:
        yield url


@pytest.fixture(scope="module")
def ask(server):
    def ask(messages=QUESTION, **options):
        return client(server).chat.completions.create(**{"model": "fake", "messages": messages, "max_tokens": 20} | options)

    return ask


@contextlib.contextmanager
def faked(limits=ChatLimits(), **engine):  # noqa: B008
    made = fake.FakeEngine(**engine)
    with fake.serving(made, chat_format=FORMAT, limits=Limits(chat=limits)) as url:
        yield made, url


def text(token_ids):
    return ENCODER.tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def streamed(chunks, count):
    """Returns content, log-probs and finish reason of each choice, and the usage."""
    contents, log_probs, reasons, usage = [""] * count, [[] for _ in range(count)], [None] * count, None
    for chunk in chunks:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            assert reasons[choice.index] is None  # nothing follows the end
            contents[choice.index] += choice.delta.content or ""
            log_probs[choice.index] += choice.logprobs.content if choice.logprobs else []
            reasons[choice.index] = choice.finish_reason
    return contents, log_probs, reasons, usage


def test_the_model_is_listed(server):
    (model,) = client(server).models.list().data
    assert model.id == "fake" and model.created > 1.7e9
    assert client(server).models.retrieve("fake").id == "fake"
    with pytest.raises(openai.NotFoundError, match="no model 'other' here"):
        client(server).models.retrieve("other")


def test_answers_are_the_engines_leaves(ask):
    sampling = dict(temperature=0.9, top_p=0.95)
    prompt = ENCODER(PROBLEM)
    group = digits.engine().generate(
        [rollout_request(prompt, seed=7, group_size=3, max_new_tokens=20, top_k=50, **sampling)]
    )[0]
    answer = ask(SEEN, n=3, seed=7, logprobs=True, extra_body={"top_k": 50}, **sampling)
    assert answer.object == "chat.completion" and answer.system_fingerprint == "policy-0"
    for choice, leaf in zip(answer.choices, group.leaves, strict=True):
        assert choice.message.role == "assistant"
        assert choice.message.content == text(leaf.token_ids)
        assert choice.finish_reason == leaf.finish_reason
        np.testing.assert_allclose([entry.logprob for entry in choice.logprobs.content], leaf.log_probs, atol=1e-5)
        assert b"".join(bytes(e.bytes) for e in choice.logprobs.content).decode(errors="replace") == choice.message.content
    drawn = sum(len(leaf.token_ids) for leaf in group.leaves)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt.token_ids), drawn)
    assert answer.usage.total_tokens == len(prompt.token_ids) + drawn


def test_seeds_reproduce_whatever_n_is_and_no_seed_is_a_new_one(ask):
    def contents(**options):
        return [choice.message.content for choice in ask(**options).choices]

    assert contents(seed=3, n=4)[:2] == contents(seed=3, n=2)
    assert contents(seed=-(2**63)) == contents(seed=-(2**63)) != contents(seed=1)
    assert contents() != contents()
    assert len(set(contents(temperature=0, n=2))) == 1
    assert contents(temperature=0) == contents(temperature=1e-30) == contents(extra_body={"top_k": 1}, seed=5)


@pytest.mark.parametrize("messages", [QUESTION, SEEN])
@pytest.mark.parametrize("stop", [None, "e", [" the", "o"]])
def test_streaming_equals_not_streaming(ask, messages, stop):
    options = dict(n=3, seed=11, logprobs=True, stop=stop)
    whole = ask(messages, **options)
    chunks = list(ask(messages, stream=True, stream_options={"include_usage": True}, **options))
    contents, log_probs, reasons, usage = streamed(chunks, 3)
    assert contents == [choice.message.content for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert log_probs == [choice.logprobs.content for choice in whole.choices]
    assert usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1 and chunks[0].choices[0].delta.role == "assistant"
    if stop is None:  # 20 tokens, 5 a step
        assert sum(bool(chunk.choices and chunk.choices[0].delta.content) for chunk in chunks) > 3


def test_a_stop_string_ends_a_response_and_the_work_on_it(ask, engine):
    free = ask(seed=2, max_tokens=60).choices[0].message.content
    stop = next(free[i : i + 2] for i in range(10, len(free) - 1) if "�" not in free[i : i + 2])
    before = engine.stats()["decoded"]
    answer = ask(seed=2, max_tokens=60, stop=[stop])
    assert answer.choices[0].message.content == free[: free.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    assert fake.until(lambda: not engine.busy)
    assert engine.stats()["decoded"] - before == answer.usage.completion_tokens < 30


def test_length_is_bounded_by_the_room_when_no_maximum_is_given(ask):
    answer = ask(seed=4, max_tokens=None, logprobs=True)
    if answer.choices[0].finish_reason == "length":
        assert answer.usage.total_tokens == 128
    assert ask(seed=4, max_tokens=50, max_completion_tokens=3).usage.completion_tokens == 3


def test_a_chats_prompt_is_the_chat_templates(ask):
    chat = [
        {"role": "developer", "content": "Read."},
        {"role": "user", "content": [{"type": "text", "text": "Add "}, {"type": "text", "text": "it."}]},
        {"role": "assistant", "content": "3"},
        {"role": "user", "content": "The digits?"},
    ]
    plain = [{**chat[0], "role": "system"}, {"role": "user", "content": "Add it."}, *chat[2:]]
    tokens = ENCODER.tokenizer.apply_chat_template(plain, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert ask(chat, max_tokens=1).usage.prompt_tokens == len(tokens)
    assert ask(chat, seed=5).choices[0].message.content == ask(plain, seed=5).choices[0].message.content


def test_the_image_is_looked_at(ask):
    other = to_data_url(255 - PROBLEM.images[0])
    changed = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": other}}, SEEN[0]["content"][1]]}]
    first, second = (ask(messages, seed=1, max_tokens=30, logprobs=True).choices[0] for messages in (SEEN, changed))
    assert [e.logprob for e in first.logprobs.content] != [e.logprob for e in second.logprobs.content]


def image(url):
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"messages": []}, "at least 1 item"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "role"),
        ({"messages": [{"role": "user"}]}, "content"),
        ({"messages": [{"role": "user", "content": [{"type": "video", "video": "x"}]}]}, "video"),
        ({"messages": [{"role": "user", "content": "<|image_pad|>"}]}, "image placeholder"),
        ({"messages": [{"role": "user", "content": "1 " * 60}]}, "prompt tokens, at most 64 fit"),
        ({"messages": [{"role": "user", "content": "1" * 100_000}]}, "more than 64 tokens"),
        ({"max_tokens": 1000}, "leave room for .* max_tokens=1000"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"n": 100, "max_tokens": 90}, "leave room for"),
        ({"n": 0}, "n:"),
        ({"n": 129}, "n:"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"stop": [""]}, "stop"),
        ({"logprobs": True, "top_logprobs": 2}, "no top_logprobs; leave it out"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "no tools"),
        ({"response_format": {"type": "json_object"}}, "no response_format"),
        ({"presence_penalty": 0.5}, "no presence_penalty"),
        ({"extra_body": {"min_tokens": 5}}, "no min_tokens"),
        ({"extra_body": {"guided_regex": "a+"}}, "no guided_regex"),
        ({"messages": image("data:image/png;base64,AAAA")}, "not a readable image"),
        ({"messages": image("data:image/png;base64,ö")}, "bad image data URL"),
        ({"messages": image("data:text/plain;base64,AAAA")}, "not an image data URL"),
        ({"messages": image("http://[")}, "images are not fetched"),
        ({"messages": image("http://127.0.0.1:1/a.png")}, "sampler.image_hosts"),
    ],
)
def test_what_cannot_be_answered_is_refused_with_the_reason(ask, options, reason):
    with pytest.raises(openai.UnprocessableEntityError, match=reason) as refused:
        ask(**options)
    assert len(str(refused.value)) < 1000
    assert refused.value.body["type"] == "invalid_request_error"


def test_neutral_settings_of_other_servers_are_taken(ask):
    neutral = dict(
        presence_penalty=0, frequency_penalty=0.0, logit_bias={}, tools=[], response_format={"type": "text"}, user="me",
        top_logprobs=0, tool_choice="none", metadata={"a": "b"}, store=False,
    )  # fmt: skip
    assert ask(seed=1, **neutral).choices[0].message == ask(seed=1).choices[0].message


def test_another_model_is_not_found(ask):
    with pytest.raises(openai.NotFoundError, match="no model 'gpt' here, only 'fake'"):
        ask(model="gpt")


def test_no_file_of_the_server_is_opened(ask, tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(PROBLEM.images[0]).save(path)
    for url in (str(path), f"file://{path}", f"FILE:{path}", path.name, f"data:{path}", f"data:image/png;base64,{path}"):
        with pytest.raises(openai.UnprocessableEntityError, match="data URL"):
            ask(image(url))


def test_large_images_and_bodies_are_413():
    limits = ChatLimits(body_bytes=20_000, image_pixels=40 * 40)
    with faked(limits) as (engine, url):
        create = client(url).chat.completions.create
        good = to_data_url(np.zeros((28, 28, 3), np.uint8))
        assert create(model="fake", messages=image(good), max_tokens=5).choices[0].message.content
        bomb = io.BytesIO()
        Image.new("1", (4000, 4000)).save(bomb, "PNG")
        bomb = "data:image/png;base64," + base64.b64encode(bomb.getvalue()).decode()
        two = [{"role": "user", "content": [*image(good)[0]["content"]] * 3}]
        for messages, reason in ((image(bomb), "16000000 pixels, the limit is 1600"), (two, "2352 pixels")):
            with pytest.raises(openai.APIStatusError, match=reason) as refused:
                create(model="fake", messages=messages)
            assert refused.value.status_code == 413
        with pytest.raises(openai.APIStatusError) as refused:
            create(model="fake", messages=[{"role": "user", "content": "x" * 30_000}])
        assert refused.value.status_code == 413
        assert len(engine.submitted) == 1


def test_images_come_from_allowed_hosts_only_in_time_and_redirects_are_not_followed(monkeypatch):
    monkeypatch.setattr("ares_jax.service.chat_images._TIMEOUT", 0.5)
    data = base64.b64decode(SEEN[0]["content"][0]["image_url"]["url"].split(",")[1])

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(302 if self.path == "/b.png" else 200)
            self.send_header("Location", "/a.png")
            self.end_headers()
            self.wfile.write(data if self.path == "/a.png" else b"")
            with contextlib.suppress(OSError):
                while self.path == "/slow.png":  # a little now and then
                    self.wfile.write(b"x")
                    time.sleep(0.1)

        def log_message(self, *_):
            pass

    images = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=images.serve_forever, daemon=True).start()
    there = f"http://127.0.0.1:{images.server_address[1]}"
    with fake.serving(fake.FakeEngine(), chat_format=FORMAT, image_hosts=("127.0.0.1",)) as url:
        create = client(url).chat.completions.create
        given, fetched = (
            create(model="fake", messages=image(source), seed=1).usage.prompt_tokens
            for source in (SEEN[0]["content"][0]["image_url"]["url"], f"{there}/a.png")
        )
        assert given == fetched
        for source, reason in (
            (f"{there}/b.png", "answered 302"),
            ("http://localhost/a.png", "not fetched from 'localhost'"),
            (f"{there}/slow.png", "127.0.0.1: TimeoutError"),
        ):
            with pytest.raises(openai.UnprocessableEntityError, match=reason):
                create(model="fake", messages=image(source))
    images.shutdown()


def test_a_full_house_is_429_and_empties():
    limits = ChatLimits(waiting=2)
    with faked(limits, delay=0.01, slots=0) as (engine, url):  # nothing finishes yet
        ask = client(url).chat.completions.create
        running = [threading.Thread(target=ask, kwargs=dict(model="fake", messages=QUESTION)) for _ in range(2)]
        for thread in running:
            thread.start()
        assert fake.until(lambda: len(engine.submitted) == 2)
        with pytest.raises(openai.RateLimitError, match="2 chats wait already") as refused:
            ask(model="fake", messages=QUESTION)
        assert int(refused.value.response.headers["retry-after"]) > 0
        engine.slots = 1
        for thread in running:
            thread.join()
        assert ask(model="fake", messages=QUESTION).choices
    with faked(ChatLimits(waiting_bytes=100)) as (engine, url):
        with pytest.raises(openai.RateLimitError, match="bytes already"):
            client(url).chat.completions.create(model="fake", messages=SEEN)
        assert client(url).chat.completions.create(model="fake", messages=QUESTION).choices


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_the_engine_and_its_place(stream):
    with faked(ChatLimits(waiting=1), delay=0.01, slots=0) as (engine, url):  # it never finishes
        body = {"model": "fake", "messages": QUESTION, "stream": stream}
        for _ in range(2):
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{url}/v1/chat/completions", json=body, timeout=0.3)
            assert fake.until(lambda: not engine.work)
        assert len(engine.cancelled) == 2
        engine.slots = 1
        assert fake.until(
            lambda: httpx.post(f"{url}/v1/chat/completions", json={**body, "stream": False}).status_code == 200
        )


def test_a_broken_engine_is_503_and_an_error_in_a_stream():
    with faked() as (engine, url):
        ask = client(url).chat.completions.create
        with pytest.raises(openai.APIError, match="boom"):
            list(ask(model="fake", messages=QUESTION, seed=666, stream=True))
        with pytest.raises(openai.InternalServerError, match="boom.*restart") as refused:
            ask(model="fake", messages=QUESTION)
        assert refused.value.status_code == 503


def test_the_token_is_the_api_key():
    with fake.serving(fake.FakeEngine(), token="secret", chat_format=FORMAT) as url:
        with pytest.raises(openai.AuthenticationError):
            client(url).chat.completions.create(model="fake", messages=QUESTION)
        known = openai.OpenAI(base_url=f"{url}/v1", api_key="secret")
        assert known.chat.completions.create(model="fake", messages=QUESTION).choices


def token_request(plain, **changes):
    ids = np.array(plain["token_ids"], np.int32)
    nothing = np.zeros((0, 1176), np.float32), np.zeros((0, 3), np.int32)
    prompt = Prompt("chat", "", "", "", "", ids, *nothing, np.broadcast_to(np.arange(len(ids)), (3, len(ids))), 0)
    draw = {name: value for name, value in plain.items() if name != "token_ids"}
    return rollout_request(prompt, group_size=8, max_branches_per_sequence=2, **draw, **changes)


def test_rollouts_take_messages_and_token_ids_too(server, engine):
    options = dict(seed=5, group_size=4, root_leaves=2, max_branches_per_sequence=2, tau_high=5.4, max_new_tokens=12)
    answer = httpx.post(f"{server}/v1/rollouts", json={"groups": [{"messages": SEEN, "problem_id": "q", **options}]})
    group = decode_group(answer.json()["group"])
    wanted = digits.engine().generate([rollout_request(ENCODER(PROBLEM), **options)])[0]
    assert group.problem_id == "q" and group.branches == wanted.branches
    for got, leaf in zip(group.leaves, wanted.leaves, strict=True):
        assert got.token_ids.tolist() == leaf.token_ids.tolist() and got.parent == leaf.parent
    short = {"messages": QUESTION, "seed": 1, "max_new_tokens": 3}
    plain = {"token_ids": list(range(20, 33)), "seed": 3, "max_new_tokens": 20, "tau_high": 5.4, "root_leaves": 2}
    whole, stopped, encoded = (
        decode_group(httpx.post(f"{server}/v1/rollouts", json={"groups": [g]}, timeout=60).json()["group"])
        for g in (plain, {**plain, "stop": ["e", "ab"]}, encode_request(token_request(plain, stop=("e", "ab"))))
    )
    for got, leaf in zip(whole.leaves, digits.engine().generate([token_request(plain)])[0].leaves, strict=True):
        assert got.token_ids.tolist() == leaf.token_ids.tolist() and got.parent == leaf.parent
    assert len(stopped.leaves) == 8 and sum(leaf.finish_reason == "stop" for leaf in stopped.leaves) > 2
    for got, leaf in zip(stopped.leaves, encoded.leaves, strict=True):  # with the token that completes one
        spelled = [text(got.token_ids[:n]) for n in (len(got.token_ids) - 1, len(got.token_ids))]
        assert not any(stop in spelled[0] for stop in ("e", "ab"))
        assert any(stop in spelled[1] for stop in ("e", "ab")) or got.finish_reason == "length" or got.token_ids[-1] == EOS
        assert got.token_ids.tolist() == leaf.token_ids.tolist()
    assert len(decode_group(httpx.post(f"{server}/v1/rollouts", json={"groups": [short]}).json()["group"]).leaves) == 8
    for bad in (
        {**short, "messages": []}, {**short, "messages": image("http://x/a.png")}, {**short, "seed": -1},
        {**short, "max_tokens": 3},  # no field of it: it would be ignored
        {**plain, "token_ids": []}, {**plain, "token_ids": [-1]}, {**plain, "stop": [""]}, {**plain, "messages": QUESTION},
    ):  # fmt: skip
        assert httpx.post(f"{server}/v1/rollouts", json={"groups": [bad]}).status_code == 422
