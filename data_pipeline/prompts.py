"""The arrays of a problem's prompt: token ids with expanded image placeholders, pixel patches, positions.

A prompt is never cut: one that is too long is refused whole.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8

from data_pipeline.errors import DataError, OverlongError
from data_pipeline.messages import message_parts, rendered
from data_pipeline.mrope import mrope_positions
from data_pipeline.pixels import PixelPatches, pixel_patches, value_table
from data_pipeline.placeholders import problem_sizes
from data_pipeline.problems import Problem
from data_pipeline.videos import RAW, video_pixels


@dataclass(frozen=True)
class Prompt:
    """A problem as the model reads it. P patches of I images and videos; T tokens, placeholders expanded."""

    problem_id: str
    source: str
    level: str
    question: str
    answer: str
    token_ids: Int[np.ndarray, "T"]
    patches: PixelPatches | Float[np.ndarray, "P V"]
    grid_thw: Int[np.ndarray, "I 3"]  # in the order of the text: pairs of frames, rows and columns of patches
    positions: Int[np.ndarray, "3 T"]  # mRoPE: time, height, width
    rope_delta: int  # the token at index i >= T has position i + rope_delta

    def picture(self) -> UInt8[np.ndarray, "H W 3"] | None:
        """Returns the first image, as the model sees it: for people. None of a text, or where the pixels are elsewhere."""
        if not isinstance(self.patches, PixelPatches) or not len(self.patches):
            return None
        _, rows, columns = self.grid_thw[0].tolist()
        return self.patches.image(0, rows, columns)


class PromptEncoder:
    """Turns a `Problem` into a `Prompt` with the tokenizer's chat template and the image processor.

    Picklable, so that worker processes can run it.
    """

    def __init__(
        self,
        tokenizer,
        image_processor,
        *,
        tokens_per_second: int = 2,
        format_prompt: str = "",
        max_tokens: int | None = None,
        max_patches: int | None = None,
    ):
        """Args:
          tokens_per_second: the model's: mRoPE positions that a second of video takes.
          format_prompt: a Jinja template around the question, its `content`; empty: the question alone.
          max_tokens, max_patches: of a prompt.

        Raises `DataError` where the template is none.
        """
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.tokens_per_second = tokens_per_second
        self._format, self._max_tokens, self._max_patches = format_prompt.strip(), max_tokens, max_patches
        if self._format and "a question" not in rendered(self._format, "a question"):
            raise DataError(f"the format prompt {self._format[:60]!r} leaves the question out; it needs {{{{ content }}}}")
        p = image_processor
        self._patch, self._table = (3, p.temporal_patch_size, p.patch_size**2), value_table(p)
        self._image_pad, self._video_pad = tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|video_pad|>"])

    def __call__(self, problem: Problem) -> Prompt:
        """Returns the prompt of a problem.

        Raises:
          DataError: placeholders and images do not match; it names the problem, the sizes and both counts.
          OverlongError: it has more tokens or patches than this encoder's limits.
        """
        return self.encode_chat([{"role": "user", "content": message_parts(problem, self._format)}], problem)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], problem: Problem) -> Prompt:
        """Returns the prompt of a chat: {"role", "content": parts as of `message_parts`} a message.

        `problem` holds the images and videos of all messages, in their order. The format prompt does not apply.

        Raises: as `__call__`; `jinja2.TemplateError` where the chat template refuses the messages.
        """
        kinds = [part["type"] for message in messages for part in message["content"] if part["type"] != "text"]
        patches, grid_thw, seconds = self._pixels(problem, kinds)
        text = self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        token_ids = self._expand(self._encode(text), grid_thw, kinds, problem)
        if self._max_tokens is not None and len(token_ids) > self._max_tokens:
            raise OverlongError(
                f"problem {problem.problem_id}: {len(token_ids)} prompt tokens, at most {self._max_tokens} fit"
            )
        positions, rope_delta = mrope_positions(
            token_ids, grid_thw, image_token_id=self._image_pad, video_token_id=self._video_pad, seconds_per_grid=seconds,
            tokens_per_second=self.tokens_per_second, problem_id=problem.problem_id,
        )  # fmt: skip
        return Prompt(
            problem.problem_id, problem.source, problem.level, problem.question, problem.answer, token_ids, patches,
            grid_thw, positions, rope_delta,
        )  # fmt: skip

    @property
    def placeholder_ids(self) -> set[int]:
        """The tokens that stand for image and video features."""
        return {self._image_pad, self._video_pad}

    def encode_response(self, response: str, problem_id: str = "?") -> Int[np.ndarray, "N"]:
        """Returns the tokens of a response, the end-of-turn token included. Raises `DataError` if it draws an image."""
        token_ids = np.append(self._encode(response), np.int32(self.tokenizer.eos_token_id))
        if places := int(self._is_placeholder(token_ids).sum()):
            raise DataError(
                f"problem {problem_id}: {places} image tokens in the response {response[:40]!r} for 0 image features of its "
                "own; take them out of it"
            )
        return token_ids

    def _encode(self, text: str) -> Int[np.ndarray, "N"]:
        return np.array(self.tokenizer.encode(text, add_special_tokens=False), np.int32)

    def _is_placeholder(self, token_ids):
        return (token_ids == self._image_pad) | (token_ids == self._video_pad)

    def _pixels(self, problem: Problem, kinds: Sequence[str]):
        """Returns patches, grids and the seconds a grid covers of all images and videos, in the order of `kinds`."""
        patches: list[np.ndarray] = []
        grids, seconds = [np.zeros((0, 3), np.int32)], []
        rates = problem.video_fps or (2.0,) * len(problem.videos)
        if len(rates) != len(problem.videos) or min(rates, default=1) <= 0:
            raise DataError(
                f"problem {problem.problem_id}: video_fps {rates} for {len(problem.videos)} videos; one above 0 each"
            )
        try:
            images, videos = iter(problem.images), iter(zip(problem.videos, rates, strict=True))
            for kind in kinds:
                if kind == "image":
                    features = self.image_processor(
                        [next(images)], return_tensors="np", input_data_format="channels_last", **RAW
                    )  # fmt: skip
                    shown = features["pixel_values"].reshape(len(features["pixel_values"]), *self._patch)
                    pixels, grid, duration = shown[:, :, :1].astype(np.uint8), features["image_grid_thw"], 0.0
                else:
                    video, rate = next(videos)
                    pixels, grid = video_pixels(self.image_processor, video)
                    duration = self.image_processor.temporal_patch_size / rate
                patches.append(pixels)
                grids.append(grid.astype(np.int32))
                seconds.append(duration)
                size = sum(map(len, patches))
                if self._max_patches is not None and size > self._max_patches:  # before the next image takes more memory
                    raise OverlongError(
                        f"problem {problem.problem_id}: {size} image patches, at most {self._max_patches} fit"
                    )
        except OverlongError:
            raise
        except ValueError as error:  # a strip that no scaling brings between the limits
            raise DataError(f"problem {problem.problem_id}: {problem_sizes(problem)}: {error}; crop them") from None
        values = int(np.prod(self._patch))
        cut = pixel_patches(patches, self._table, values)
        return cut, np.concatenate(grids), np.array(seconds, np.float32)

    def _expand(self, token_ids, grid_thw, kinds: Sequence[str], problem: Problem):
        """Repeats each placeholder once for every feature of its image."""
        counts = grid_thw.prod(axis=1) // self.image_processor.merge_size**2
        is_placeholder = self._is_placeholder(token_ids)
        expected = [self._image_pad if kind == "image" else self._video_pad for kind in kinds]
        if token_ids[is_placeholder].tolist() != expected:
            raise DataError(
                f"problem {problem.problem_id}: {int(is_placeholder.sum())} image placeholders for "
                f"{problem_sizes(problem)}; an image placeholder must not stand in the question's text"
            )
        repeats = np.ones(len(token_ids), int)
        repeats[is_placeholder] = counts
        return np.repeat(token_ids, repeats)
