"""Asks an endpoint every sample of a benchmark, concurrently; what is answered is in the cache and never asked again."""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from PIL import Image
from tqdm import tqdm

from ares_jax.config import endpoint_section
from ares_jax.evaluation.answer_cache import AnswerCache, answer_cache
from ares_jax.evaluation.benchmark import Benchmark, Sample
from ares_jax.service.endpoint import Answer, ask_all
from data_pipeline.errors import DataError
from data_pipeline.images import decode_image, to_data_url


@dataclass(frozen=True)
class Asked:
    """An endpoint, and how it is asked: what must be the same for an answer to be used again."""

    url: str
    model: str
    api_key: str = ""
    identity: str = ""  # of the model, where the URL does not tell: a local checkpoint
    temperature: float = 0.3
    top_p: float = 0.95
    max_tokens: int = 8192
    system_prompt: str = ""
    min_pixels: int = 262_144
    max_pixels: int = 1_048_576
    threads: int = 8
    retries: int = 3
    patience: float = 300.0
    timeout: float = 1800.0

    def settings(self) -> dict[str, Any]:
        """Returns what an answer depends on."""
        names = ("model", "temperature", "top_p", "max_tokens", "system_prompt", "min_pixels", "max_pixels")
        return {"endpoint": self.identity or self.url, **{name: getattr(self, name) for name in names}}


@dataclass(frozen=True)
class Reply:
    """What came back for one sample: a text, or the error after all retries."""

    text: str = ""
    finish: str = ""
    tokens: int = 0  # drawn; 0: the endpoint does not say
    prompt_tokens: int = 0
    error: str = ""


def ask_samples(benchmark: Benchmark, samples: Sequence[Sample], asked: Asked, cache_dir: Path) -> list[list[Reply]]:
    """Returns `benchmark.repeats` replies for each sample, in order. Raises `UserError` where the endpoint is away."""
    asked = asked if benchmark.scale_images else replace(asked, min_pixels=0, max_pixels=0)
    path = cache_path(cache_dir, benchmark.name, asked)
    work = [(sample, repeat) for sample in samples for repeat in range(benchmark.repeats)]
    keys = [f"{sample.sample_id}#{repeat}/{_digest(sample)}" for sample, repeat in work]
    with answer_cache(path) as cache:
        replies = ask_missing(
            keys, lambda i: chat(work[i][0], asked), asked, cache, description=f"ask {benchmark.name}"
        )  # fmt: skip
    return [replies[start : start + benchmark.repeats] for start in range(0, len(work), benchmark.repeats)]


def cache_path(cache_dir: Path, name: str, asked: Asked) -> Path:
    """Returns the file with the answers to `name`: its name changes with everything that an answer depends on."""
    digest = hashlib.blake2b(json.dumps(asked.settings(), sort_keys=True).encode(), digest_size=6).hexdigest()
    return cache_dir / f"{file_name(asked.model)}___{name}-{digest}.jsonl"


def file_name(model: str) -> str:
    """Returns a model's name as part of a file's."""
    return "".join(c if c.isalnum() or c in "-._" else "-" for c in model).strip(".") or "model"


def ask_missing(
    keys: Sequence[str], make_chat: Callable[[int], list[dict]], asked: Asked, cache: AnswerCache, *, description: str
) -> list[Reply]:
    """Returns a reply for every key, asking only for those that the cache does not hold."""
    errors: dict[int, str] = {}
    todo = [i for i, key in enumerate(keys) if cache.get(key) is None]

    def keep(index: int, answer: Answer) -> tuple[int, dict]:
        response = answer.responses[0]
        record = {
            "response": response.text, "finish": response.finish_reason, "tokens": answer.tokens,
            "prompt_tokens": answer.prompt_tokens,
        }  # fmt: skip
        return index, record

    def arrived(result: tuple[int, dict]) -> None:
        cache.put(keys[result[0]], result[1])
        bar.update()

    def refused(index: int, reason: str) -> None:
        errors[index] = reason
        bar.set_postfix(errors=len(errors))
        bar.update()

    with tqdm(total=len(keys), initial=len(keys) - len(todo), desc=description, unit="answer") as bar:
        if todo:
            ask_all(
                _endpoint(asked), todo, make_chat, lambda i: _seed(keys[i]), keep, samples=1,
                max_tokens=asked.max_tokens, on_answer=arrived, on_refusal=refused, api_key=asked.api_key,
            )  # fmt: skip
    return [_reply(cache.get(key), errors.get(i, "")) for i, key in enumerate(keys)]


def chat(sample: Sample, asked: Asked) -> list[dict]:
    """Returns the messages of a sample. Raises `DataError` if an image cannot be read."""
    content: list[dict[str, Any]] = []
    for part in sample.parts:
        if isinstance(part, str):
            content.append({"type": "text", "text": part})
        else:
            content.append({"type": "image_url", "image_url": {"url": _picture(part, asked, sample.sample_id)}})
    texts_only = all(isinstance(part, str) for part in sample.parts)
    user = {"role": "user", "content": "\n".join(map(str, sample.parts)) if texts_only else content}
    system = [{"role": "system", "content": asked.system_prompt}] if asked.system_prompt else []
    return [*system, user]


def scaled_size(width: int, height: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Returns the size of an image between the limits, its aspect kept (as the original's harness scales; 0: no limit)."""
    area = width * height
    limit = max_pixels if max_pixels and area > max_pixels else min_pixels if area < min_pixels else area
    factor = math.sqrt(limit / area)
    return (width, height) if factor == 1 else (max(1, int(width * factor)), max(1, int(height * factor)))


def _picture(encoded: bytes, asked: Asked, sample_id: str) -> str:
    try:
        pixels = decode_image(encoded)
    except DataError as error:
        raise DataError(f"sample {sample_id}: {error}") from None
    height, width = pixels.shape[:2]
    size = scaled_size(width, height, asked.min_pixels, asked.max_pixels)
    return to_data_url(pixels if size == (width, height) else np.asarray(Image.fromarray(pixels).resize(size)))


def _digest(sample: Sample) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for part in sample.parts:
        data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        digest.update(f"{len(data)}/".encode() + data)
    return digest.hexdigest()


def _seed(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=4).digest(), "little") >> 1


def _endpoint(asked: Asked) -> ConfigDict:
    section = endpoint_section()
    section.update(
        url=asked.url, model=asked.model, temperature=asked.temperature, top_p=asked.top_p, concurrency=asked.threads,
        retries=asked.retries, patience=asked.patience, timeout=asked.timeout,
    )  # fmt: skip
    return section


def _reply(record: Mapping[str, Any] | None, error: str) -> Reply:
    if record is None:
        return Reply(error=error or "not asked")
    return Reply(record["response"], record["finish"], record["tokens"], record["prompt_tokens"])
