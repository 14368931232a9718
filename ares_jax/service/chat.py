"""OpenAI's chat completions as requests to the sampler, and its tokens as their answers. Pure: no HTTP, no engine.

Source: https://platform.openai.com/docs/api-reference/chat. `top_k` is added to it. What the sampler does not do (tools,
penalties, other tokens' log-probs) is refused unless it is neutral: an answer is never drawn otherwise than was asked.
"""

import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import jinja2
import numpy as np
from jaxtyping import UInt8
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationInfo, field_validator

from ares_jax.sampling.options import LOWEST_TEMPERATURE
from ares_jax.sampling.requests import Piece, RolloutRequest, rollout_request
from ares_jax.service.text_stream import TextStream
from data_pipeline.errors import DataError
from data_pipeline.problems import Problem
from data_pipeline.prompts import Prompt, PromptEncoder
from data_pipeline.tokenizer import token_bytes

MAX_CHOICES = 128
_LOWEST_LOG_PROB = -9999.0  # OpenAI's number for what JSON cannot say
_NEUTRAL: dict[str, tuple] = {  # of fields that the sampler does not follow; absent and null are neutral too
    "allowed_token_ids": (), "audio": (), "bad_words": ([],), "echo": (False,), "frequency_penalty": (0,),
    "function_call": ("auto", "none"), "functions": ([],), "guided_choice": (), "guided_grammar": (), "guided_json": (),
    "guided_regex": (), "ignore_eos": (False,), "logit_bias": ({},), "min_p": (0,), "min_tokens": (0,),
    "modalities": (["text"],), "prediction": (), "presence_penalty": (0,), "prompt_logprobs": (),
    "repetition_penalty": (1,), "response_format": ({"type": "text"},), "stop_token_ids": ([],), "structured_outputs": (),
    "tool_choice": ("auto", "none"), "tools": ([],), "top_logprobs": (0,), "use_beam_search": (False,),
    "web_search_options": (),
}  # fmt: skip

StopString = Annotated[str, StringConstraints(min_length=1, max_length=256)]
StopStrings = Annotated[list[StopString], Field(max_length=16)]


class RefusedError(Exception):
    """A chat that is not answered, with its HTTP status."""

    def __init__(self, status: int, message: str, *, field: str | None = None):
        super().__init__(message)
        self.status, self.field = status, field


class _Model(BaseModel):
    model_config = ConfigDict(allow_inf_nan=False)


class ImageUrl(_Model):
    url: str


class ImagePart(_Model):
    type: Literal["image_url"]
    image_url: ImageUrl


class TextPart(_Model):
    type: Literal["text"]
    text: str


class Message(_Model):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Annotated[TextPart | ImagePart, Field(discriminator="type")]] = Field(None, validate_default=True)
    tool_calls: list[Any] | None = Field(None, max_length=0)  # clients send empty ones back; there are no others

    @field_validator("content", mode="before")
    @classmethod
    def _nothing_was_said(cls, content: Any, others: ValidationInfo) -> Any:
        return "" if content is None and others.data.get("role") == "assistant" else content


def image_urls(messages: Sequence[Message]) -> list[str]:
    """Returns those of all messages, in their order."""
    return [part.image_url.url for message in messages for part in message.content if isinstance(part, ImagePart)]


class StreamOptions(_Model):
    include_usage: bool | None = None


class ChatModel(_Model):
    """Body of `POST /v1/chat/completions`."""

    model_config = ConfigDict(allow_inf_nan=False, extra="allow")
    model: str
    messages: list[Message] = Field(min_length=1, max_length=4096)
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    seed: int | None = None
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1, lt=2**31)  # -1 and 0: off
    max_tokens: int | None = Field(None, ge=1, lt=2**31)
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31)
    stop: StopString | StopStrings | None = None
    logprobs: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def choices(self) -> int:
        return self.n or 1

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    def check(self) -> None:
        """Raises `RefusedError` where a field asks for what the sampler does not do."""
        for name, value in (self.model_extra or {}).items():
            if name in _NEUTRAL and value is not None and value not in _NEUTRAL[name]:
                raise RefusedError(422, f"{name}={str(value)[:60]!r}: this sampler has no {name}; leave it out", field=name)


@dataclass(frozen=True)
class Delta:
    """What a response grew by."""

    text: str
    log_probs: list[dict[str, Any]]


class ChatFormat:
    """Prompts and texts of chats, with a run's tokenizer. Its methods may run in any thread."""

    def __init__(self, encoder: PromptEncoder, *, max_prompt_tokens: int):
        self._encoder = encoder
        self._table = token_bytes(encoder.tokenizer)
        self._longest_text = max_prompt_tokens * max(map(len, encoder.tokenizer.get_vocab()))
        self._max_tokens = max_prompt_tokens

    def prompt(self, messages: Sequence[Message], images: Sequence[UInt8[np.ndarray, "H W 3"]]) -> Prompt:
        """Returns the prompt by the tokenizer's chat template; `images` are those of `image_urls(messages)`.

        Raises `RefusedError`: it is too long, the template refuses it, or its text holds image tokens.
        """
        parts = [_template_message(message) for message in messages]
        text = "".join(part.get("text", "") for message in parts for part in message["content"])
        if len(text) > self._longest_text:  # known before it is tokenized
            raise RefusedError(422, f"a text of {len(text)} characters has more than {self._max_tokens} tokens; shorten it")
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise RefusedError(422, "the text holds half a surrogate pair, which is no character; mend it", field="messages")
        problem = Problem("chat", "chat", "", "", tuple(images), "")
        try:
            return self._encoder.encode_chat(parts, problem)
        except (DataError, jinja2.TemplateError) as error:
            raise RefusedError(422, str(error).removeprefix("problem chat: "), field="messages") from None

    def response(self, chat: ChatModel, index: int) -> "Response":
        """Returns an empty response, the `index`-th of a chat."""
        return Response(index, self._table, self._encoder.tokenizer, chat)


class Response:
    """One response as it is drawn. `finish_reason` is empty until it is whole: "stop" or "length"."""

    def __init__(self, index: int, table: Sequence[bytes], tokenizer, chat: ChatModel):
        self.index, self.tokens, self.finish_reason = index, 0, ""
        self.logprobs = bool(chat.logprobs)
        self._table, self._tokenizer = table, tokenizer
        self._text = TextStream(table, chat.stops)

    def take(self, piece: Piece) -> Delta:
        """Returns the growth by newly drawn tokens; those behind a stop string are dropped."""
        text, log_probs = "", []
        for token, log_prob in zip(piece.token_ids.tolist(), piece.log_probs.tolist(), strict=True):
            text += self._text.push(token)
            self.tokens += 1
            if self.logprobs:
                log_probs.append(self._entry(token, log_prob))
            if self._text.stopped:
                break
        if piece.finish_reason and not self._text.stopped:
            text += self._text.finish()
        self.finish_reason = "stop" if self._text.stopped else piece.finish_reason
        return Delta(text, log_probs)

    def _entry(self, token: int, log_prob: float) -> dict[str, Any]:
        spelled = self._table[token]
        name = spelled.decode(errors="replace") or self._tokenizer.convert_ids_to_tokens(token)  # a special one has no text
        log_prob = log_prob if math.isfinite(log_prob) else _LOWEST_LOG_PROB
        return {"token": name, "logprob": log_prob, "bytes": list(spelled), "top_logprobs": []}


def rollout(chat: ChatModel, prompt: Prompt, room: int) -> RolloutRequest:
    """Returns the request for all choices of a chat, which share the prompt's pages. `room`: tokens it may draw at most.

    Choice i of the same seed is the same whatever `n` is. Without a seed, one is made up.
    Raises `RefusedError` if more tokens are asked for than there is room.
    """
    asked = chat.max_completion_tokens or chat.max_tokens
    if (asked or 1) > room:
        raise RefusedError(
            422,
            f"{len(prompt.token_ids)} prompt tokens leave room for {max(room, 0)} tokens in each of {chat.choices} choices, "
            f"max_tokens={asked}; ask for fewer",
            field="max_tokens",
        )
    temperature = 1.0 if chat.temperature is None else chat.temperature
    return rollout_request(
        prompt, seed=(secrets.randbelow(2**31) if chat.seed is None else chat.seed) % 2**31, group_size=chat.choices,
        max_new_tokens=asked or room, temperature=temperature if temperature >= LOWEST_TEMPERATURE else 0.0,
        top_p=1.0 if chat.top_p is None else chat.top_p, top_k=max(chat.top_k or 0, 0),
        stop=chat.stops,
    )  # fmt: skip


def completion(head: Mapping[str, Any], parts: Sequence[tuple[Response, Delta]], prompt_tokens: int) -> dict[str, Any]:
    """Returns the whole answer: `parts` are all responses with all they grew by."""
    choices = [
        {
            "index": response.index,
            "message": {"role": "assistant", "content": delta.text, "refusal": None},
            "logprobs": _log_probs(response, delta),
            "finish_reason": response.finish_reason,
        }
        for response, delta in parts
    ]
    responses = [response for response, _ in parts]
    return {**head, "object": "chat.completion", "choices": choices, "usage": usage(responses, prompt_tokens)}


def chunk(
    head: Mapping[str, Any], response: Response, delta: Delta | None, *, finish_reason: str | None = None
) -> dict[str, Any]:
    """Returns a piece of a streamed answer: text, or without a delta the first (role) or, with a reason, the last one."""
    content = {"content": delta.text} if delta else {} if finish_reason else {"role": "assistant", "content": ""}
    choice = {
        "index": response.index,
        "delta": content,
        "logprobs": _log_probs(response, delta) if delta else None,
        "finish_reason": finish_reason,
    }
    return {**head, "object": "chat.completion.chunk", "choices": [choice]}


def usage(responses: Sequence[Response], prompt_tokens: int) -> dict[str, int]:
    """Returns the token counts of an answer; end-of-turn tokens count."""
    drawn = sum(response.tokens for response in responses)
    return {"prompt_tokens": prompt_tokens, "completion_tokens": drawn, "total_tokens": prompt_tokens + drawn}


def error_body(status: int, message: str, field: str | None = None) -> dict[str, Any]:
    """Returns an error as OpenAI's clients read it."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": field, "code": None}}


def _template_message(message: Message) -> dict[str, Any]:
    """Returns a message as chat templates read it: always parts, so that text and images are in one form."""
    role = "system" if message.role == "developer" else message.role
    if isinstance(message.content, str):
        return {"role": role, "content": [{"type": "text", "text": message.content}]}
    parts = [{"type": "text", "text": p.text} if isinstance(p, TextPart) else {"type": "image"} for p in message.content]
    return {"role": role, "content": parts}


def _log_probs(response: Response, delta: Delta) -> dict[str, Any] | None:
    return {"content": delta.log_probs, "refusal": None} if response.logprobs else None
