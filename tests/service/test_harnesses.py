"""The requests of independent evaluation harnesses, field by field as they send them, against a real engine.

Read in their published code: lm-eval 0.4.9.1 (`LocalChatCompletion`), lmms-eval 0.7.3 (`models/chat/openai.py`), and
VLMEvalKit's OpenAI wrapper. They post JSON and read `choices[i].message.content`.
"""

import re

import httpx
import pytest

from data_pipeline.images import to_data_url
from tests import digits
from tests.service import fake
from tests.service.test_chat import FORMAT, PROBLEM

IMAGE = to_data_url(PROBLEM.images[0])
SYSTEM = {"role": "system", "content": "Read."}
SEEN = [
    {"type": "image_url", "image_url": {"url": IMAGE, "detail": "low"}},
    {"type": "text", "text": PROBLEM.question},
]
LM_EVAL = {
    "messages": [SYSTEM, {"role": "user", "content": "1 2?"}, {"role": "assistant", "content": "3"},
                 {"role": "user", "content": "3 4?"}],
    "model": "fake", "max_tokens": 20, "temperature": 0, "stop": ["Q:", "\n\n", "</s>", "<|im_end|>"], "seed": 1234,
}  # fmt: skip
LMMS_EVAL = {
    "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": IMAGE}}, SEEN[1]]}],
    "model": "fake", "max_tokens": 20, "temperature": 0.7, "top_p": 0.9, "seed": 1, "presence_penalty": 0,
    "frequency_penalty": 0.0, "n": 2,
}  # fmt: skip
VLM_EVAL_KIT = {
    "model": "fake", "messages": [SYSTEM, {"role": "user", "content": SEEN}], "n": 1, "temperature": 0, "max_tokens": 20,
}  # fmt: skip
BODIES = {
    "lm-eval": LM_EVAL,
    "lm-eval, other settings of a task": {**LM_EVAL, "stop": [], "top_p": 1.0, "top_k": 1, "top_logprobs": None},
    "lmms-eval": LMMS_EVAL,
    "lmms-eval, reasoning models": {
        "messages": LMMS_EVAL["messages"], "model": "fake", "response_format": {"type": "text"},
        "max_completion_tokens": 20, "chat_template_kwargs": {"enable_thinking": False},
    },
    "VLMEvalKit": VLM_EVAL_KIT,
    "VLMEvalKit, reasoning models without images": {
        "model": "fake", "messages": [{"role": "user", "content": [{"type": "text", "text": "1 2?"}]}], "n": 1,
        "max_completion_tokens": 20,
    },
    "a chat sent back as the openai package holds it": {
        "model": "fake", "max_tokens": 20, "logprobs": True, "top_logprobs": 0, "stream": False, "user": "me",
        "store": False, "service_tier": "auto", "parallel_tool_calls": True,
        "messages": [
            {"role": "user", "content": "1 2?", "name": "me"},
            {"role": "assistant", "content": None, "refusal": None, "tool_calls": [], "function_call": None, "audio": None},
            {"role": "user", "content": "3 4?"},
        ],
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def server():
    with fake.serving(digits.engine(), chat_format=FORMAT) as url:
        yield url


@pytest.mark.parametrize("name", BODIES)
def test_a_harness_is_answered(server, name):
    asked = BODIES[name]
    headers = {"Authorization": "Bearer sk-none", "Content-Type": "application/json"}
    answer = httpx.post(f"{server}/v1/chat/completions", json=asked, headers=headers, timeout=60)
    assert answer.status_code == 200, answer.text
    choices = answer.json()["choices"]
    assert [choice["index"] for choice in choices] == list(range(asked.get("n", 1)))
    for choice in choices:
        assert choice["finish_reason"] in ("stop", "length") and choice["message"]["role"] == "assistant"
        assert isinstance(choice["message"]["content"], str)
        assert not any(stop in choice["message"]["content"] for stop in asked.get("stop", []))
    assert answer.json()["usage"]["completion_tokens"] >= len(choices)


@pytest.mark.parametrize(
    "asked, reason",
    [
        ({**LM_EVAL, "logprobs": True, "top_logprobs": 5}, "no top_logprobs; leave it out"),
        ({**LM_EVAL, "max_tokens": 2048}, "leave room for .* max_tokens=2048; ask for fewer"),
        ({**LM_EVAL, "response_format": {"type": "json_schema"}}, "no response_format; leave it out"),
        ({**LM_EVAL, "messages": [{"role": "user", "content": None}]}, "messages.0.content"),
        ({**LM_EVAL, "messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages.0.tool_calls: .* at most 0"),
    ],
)
def test_what_would_change_the_answer_is_refused_in_words(server, asked, reason):
    answer = httpx.post(f"{server}/v1/chat/completions", json=asked)
    assert answer.status_code == 422
    assert re.search(reason, answer.json()["error"]["message"])
