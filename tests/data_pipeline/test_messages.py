"""Placeholders, format prompts, limits and videos of a prompt."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_pipeline import digits
from data_pipeline.errors import DataError, OverlongError
from data_pipeline.problems import Problem
from data_pipeline.prompts import PromptEncoder
from tests.digits import encoder

A, B = (np.full((56, 28 * n, 3), 40 * n, np.uint8) for n in (1, 2))


def problem(question, images=(), videos=()):
    return Problem("p", "s", "easy", question, tuple(images), "1", (), tuple(videos))


def text_of(prompt):
    """The prompt with runs of image tokens written once."""
    text = encoder().tokenizer.decode(prompt.token_ids)
    for pad in ("<|image_pad|>", "<|video_pad|>"):
        while pad + pad in text:
            text = text.replace(pad + pad, pad)
    return text


def formatted(template, **limits):
    return PromptEncoder(encoder().tokenizer, encoder().image_processor, format_prompt=template, **limits)


def test_images_stand_where_their_placeholders_do():
    prompt = encoder()(problem("In <image> and <image>?", (A, B)))
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    assert f"user\nIn {image} and {image}?<|im_end|>" in text_of(prompt)
    assert prompt.grid_thw.tolist() == [[1, 4, 2], [1, 4, 4]]
    before = encoder()(problem("In?", (A, B)))
    assert f"user\n{image}{image}In?<|im_end|>" in text_of(before)
    np.testing.assert_array_equal(before.patches, prompt.patches)


def test_videos_keep_their_place_among_images():
    frames = np.stack([A, 2 * A, 3 * A])
    prompt = encoder()(problem("<video> <image>", (B,), (frames,)))
    assert prompt.grid_thw.tolist() == [[2, 4, 2], [1, 4, 4]]
    still = [encoder().image_processor([frame], return_tensors="np")["pixel_values"] for frame in frames]
    shaped = prompt.patches[:16].reshape(2, 8, 3, 2, 196)
    for row, pair in enumerate([(0, 1), (2, 2)]):
        for time, frame in enumerate(pair):
            np.testing.assert_array_equal(shaped[row, :, :, time], still[frame].reshape(8, 3, 2, 196)[:, :, time])
    # Its second row of two frames stands 2 positions (a second) behind the first; the image comes after.
    video = encoder().tokenizer.convert_tokens_to_ids("<|video_pad|>")
    times = prompt.positions[0][prompt.token_ids == video]
    assert (times - times[0]).tolist() == [0, 0, 2, 2]


@pytest.mark.parametrize(
    "question, images, message",
    [
        ("<image> <image>", (A,), r"2 <image> in the text for 1 images of sizes 56x28 .*; it needs one each"),
        ("<image>", (), "1 <image> in the text for 0 images"),
        ("<video>", (A,), "0 <image> in the text for 1 images"),
        ("<image> <video>", (A,), "1 <video> in the text for 0 videos"),
        ("What is <|image_pad|>?", (A, B), "3 image placeholders for 2 images of sizes 56x28, 56x56"),
        ("long", (np.zeros((2, 2000, 3), np.uint8),), "aspect ratio"),
    ],
)
def test_what_does_not_match_names_the_problem(question, images, message):
    with pytest.raises(DataError, match=f"problem p: .*{message}"):
        encoder()(problem(question, images))


def test_a_format_prompt_stands_around_the_question():
    shipped = Path("configs/formats/think_then_box.jinja").read_text()
    text = text_of(formatted(shipped)(problem(" Add <image>. ", (A,))))
    assert "user\nAdd <|vision_start|><|image_pad|><|vision_end|>.\n\nReason first" in text
    assert text.split("<|im_end|>")[1].endswith("alone in \\boxed{}.")
    assert "first {{ 1 }}" in text_of(formatted("{{ content }}!")(problem("first {{ 1 }}")))
    for template, message in (
        ("{{ question }}", "no Jinja template"),
        ("{% if", "no Jinja"),
        ("Think.", "leaves the question out"),
    ):
        with pytest.raises(DataError, match=message):
            formatted(template)


def test_what_does_not_fit_is_overlong():
    example = digits.DigitsSource("train", 3, seed=0)[0]
    size = encoder()(example)
    for limits, message in (
        ({"max_tokens": len(size.token_ids) - 1}, "prompt tokens, at most"),
        ({"max_patches": len(size.patches) - 1}, "image patches, at most"),
    ):
        with pytest.raises(OverlongError, match=f"problem {example.problem_id}: .*{message}"):
            formatted("", **limits)(example)
    exact = formatted("", max_tokens=len(size.token_ids), max_patches=len(size.patches))(example)
    np.testing.assert_array_equal(exact.token_ids, size.token_ids)
    with pytest.raises(OverlongError):
        formatted("", max_tokens=40)(replace(example, question="Add the digits. " * 20))
