"""A problem, and the arrays of its prompt: token ids with expanded image placeholders, pixel patches, positions."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int, UInt8

from data_pipeline.errors import DataError
from data_pipeline.mrope import mrope_positions


@dataclass(frozen=True)
class Problem:
    """A question with a verifiable answer."""

    problem_id: str
    source: str  # data set it comes from: target lengths are per source
    level: str  # nominal family: "easy", "medium", "hard"
    question: str
    images: tuple[UInt8[np.ndarray, "H W 3"], ...]
    answer: str
    responses: tuple[str, ...] = ()  # teacher traces, may be empty


@dataclass(frozen=True)
class Prompt:
    """A problem as the model reads it. P patches of I images; T tokens, placeholders expanded."""

    problem_id: str
    source: str
    level: str
    question: str
    answer: str
    images: tuple[UInt8[np.ndarray, "H W 3"], ...]
    token_ids: Int[np.ndarray, "T"]
    patches: Float[np.ndarray, "P 1176"]
    grid_thw: Int[np.ndarray, "I 3"]  # frames, rows and columns of patches
    positions: Int[np.ndarray, "3 T"]  # mRoPE: time, height, width
    rope_delta: int  # the token at index i >= T has position i + rope_delta


class PromptEncoder:
    """Turns a `Problem` into a `Prompt` with the tokenizer's chat template and the image processor."""

    def __init__(self, tokenizer, image_processor):
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self._image_pad = tokenizer.convert_tokens_to_ids("<|image_pad|>")

    def __call__(self, problem: Problem) -> Prompt:
        """Raises `DataError`, naming the problem and both counts, where placeholders and image features do not match."""
        patches, grid_thw = self._pixels(problem)
        content = [{"type": "image"} for _ in problem.images] + [{"type": "text", "text": problem.question}]
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        token_ids = self._expand(np.array(self.tokenizer.encode(text), np.int32), grid_thw, problem)
        positions, rope_delta = mrope_positions(token_ids, grid_thw, image_token_id=self._image_pad)
        return Prompt(
            problem.problem_id, problem.source, problem.level, problem.question, problem.answer, problem.images,
            token_ids, patches, grid_thw, positions, rope_delta,
        )  # fmt: skip

    def encode_response(self, response: str) -> Int[np.ndarray, "N"]:
        """Returns the tokens of a response, the end-of-turn token included."""
        return np.array([*self.tokenizer.encode(response), self.tokenizer.eos_token_id], np.int32)

    def _pixels(self, problem: Problem):
        if not problem.images:
            return np.zeros((0, 1176), np.float32), np.zeros((0, 3), np.int32)
        features = self.image_processor(list(problem.images), return_tensors="np")
        return features["pixel_values"].astype(np.float32), features["image_grid_thw"].astype(np.int32)

    def _expand(self, token_ids, grid_thw, problem: Problem):
        merge = self.image_processor.merge_size**2
        counts = (grid_thw.prod(axis=1) // merge).tolist()
        places = int((token_ids == self._image_pad).sum())
        if places != len(counts):
            sizes = [image.shape[:2] for image in problem.images]
            raise DataError(
                f"problem {problem.problem_id}: {places} image placeholders for {len(counts)} images of sizes {sizes}; "
                "an image placeholder must not stand in the question's text"
            )
        repeats = np.ones(len(token_ids), int)
        repeats[token_ids == self._image_pad] = counts
        return np.repeat(token_ids, repeats)
