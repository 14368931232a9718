"""Patches and grids equal transformers' image processor; video frames go through it in pairs."""

import io

import numpy as np
import pytest
from PIL import Image
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from data_pipeline.errors import DataError
from data_pipeline.images import decode_image
from data_pipeline.pixels import pixel_patches, value_table
from data_pipeline.prompts import Problem, PromptEncoder
from data_pipeline.tokenizer import load_processors, make_image_processor, save_processors
from data_pipeline.videos import video_pixels
from tests import digits

LIMITS = 262_144, 4_194_304  # upstream's


def encoder(limits=(784, 784 * 64)):
    return PromptEncoder(digits.encoder().tokenizer, make_image_processor(*limits))


def picture(rng, height, width):
    """Smooth and rough parts, so that resampling shows."""
    ramp = np.add.outer(np.arange(height), np.arange(width))[..., None] * rng.uniform(0.2, 2, 3)
    noise = rng.integers(0, 256, (height // 9 + 1, width // 9 + 1, 3)).repeat(9, 0).repeat(9, 1)[:height, :width]
    return ((ramp + noise) % 256).astype(np.uint8)


def problem(**changes):
    return Problem(**{**dict(problem_id="p1", source="s", level="easy", question="Sum?", images=(), answer="1"), **changes})


@pytest.mark.parametrize("size", [(300, 420), (640, 480), (40, 700), (2048, 2300), (28, 28)])
def test_images_between_upstreams_limits(size):
    image = picture(np.random.default_rng(0), *size)
    prompt = encoder(LIMITS)(problem(images=(image,)))
    theirs = Qwen2VLImageProcessorPil(min_pixels=LIMITS[0], max_pixels=LIMITS[1])(
        Image.fromarray(image), return_tensors="np"
    )
    np.testing.assert_array_equal(prompt.patches, theirs["pixel_values"])
    np.testing.assert_array_equal(prompt.grid_thw, theirs["image_grid_thw"])
    assert LIMITS[0] <= prompt.grid_thw.prod() * 196 <= LIMITS[1]


@pytest.mark.parametrize(
    "mode, kind",
    [("RGBA", "PNG"), ("LA", "PNG"), ("P", "PNG"), ("P", "GIF"), ("L", "PNG"), ("1", "PNG"), ("I;16", "PNG"),
     ("RGB", "JPEG"), ("L", "JPEG"), ("CMYK", "JPEG")],
)  # fmt: skip
def test_images_in_every_mode_are_what_the_processor_makes_of_them(mode, kind):
    pixels = picture(np.random.default_rng(6), 90, 130)
    if mode == "I;16":
        drawn = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    elif mode in ("RGBA", "LA"):
        drawn = Image.fromarray(pixels).convert(mode)
        drawn.putalpha(Image.fromarray(pixels[::-1, :, 1]))  # seen through, here and there
    else:
        drawn = Image.fromarray(pixels).convert(mode)
    buffer = io.BytesIO()
    drawn.save(buffer, format=kind)
    opened = Image.open(buffer)
    assert opened.mode == mode
    prompt = encoder()(problem(images=(decode_image(buffer.getvalue()),)))
    theirs = Qwen2VLImageProcessorPil(min_pixels=784, max_pixels=784 * 64)(opened, return_tensors="np")
    np.testing.assert_array_equal(prompt.patches, theirs["pixel_values"])
    np.testing.assert_array_equal(prompt.grid_thw, theirs["image_grid_thw"])
    assert np.asarray(prompt.patches).std() > 0.1


def test_several_images_keep_their_order():
    rng = np.random.default_rng(1)
    images = tuple(picture(rng, *size) for size in [(60, 200), (28, 28), (90, 90)])
    prompt = encoder()(problem(images=images))
    theirs = Qwen2VLImageProcessorPil(min_pixels=784, max_pixels=784 * 64)([Image.fromarray(i) for i in images])
    np.testing.assert_array_equal(prompt.patches, np.asarray(theirs["pixel_values"]))
    np.testing.assert_array_equal(prompt.grid_thw, np.asarray(theirs["image_grid_thw"]))


@pytest.mark.parametrize("height", [1, 3])
def test_an_image_three_pixels_high_is_not_taken_for_three_channels(height):
    image = picture(np.random.default_rng(2), height, 120)
    theirs = encoder().image_processor(Image.fromarray(image), return_tensors="np")
    np.testing.assert_array_equal(encoder()(problem(images=(image,))).patches, theirs["pixel_values"])


def their_video(frames, limits):
    """What transformers' video processor documents, patch by patch, in plain loops."""
    frames = [*frames, frames[-1]] if len(frames) % 2 else frames
    height, width = smart_resize(*frames[0].shape[:2], 28, *limits)
    scaled = [np.asarray(Image.fromarray(f).resize((width, height), Image.Resampling.BICUBIC)) / 255 for f in frames]
    video = np.stack([(f - OPENAI_CLIP_MEAN) / OPENAI_CLIP_STD for f in scaled])
    patches = []
    for t in range(0, len(frames), 2):
        for top in range(0, height, 28):
            for left in range(0, width, 28):
                for y, x in [(0, 0), (0, 14), (14, 0), (14, 14)]:
                    block = video[t : t + 2, top + y : top + y + 14, left + x : left + x + 14]
                    patches.append(block.transpose(3, 0, 1, 2).reshape(-1))
    return np.array(patches), [len(frames) // 2, height // 14, width // 14]


@pytest.mark.parametrize("count, size", [(4, (60, 100)), (5, (84, 56)), (1, (30, 40))])
def test_videos(count, size):
    rng, limits = np.random.default_rng(3), (784 * 2, 784 * 16)
    frames = np.stack([picture(rng, *size) for _ in range(count)])
    processor = make_image_processor(*limits)
    pixels, grid = video_pixels(processor, frames)
    patches = pixel_patches([pixels], value_table(processor), 1176)
    expected, shape = their_video(list(frames), limits)
    np.testing.assert_array_equal(grid, [shape])
    np.testing.assert_allclose(patches, expected, atol=1e-6)


def test_a_prompt_with_image_and_video_and_its_time():
    rng = np.random.default_rng(4)
    video = np.stack([picture(rng, 56, 84) for _ in range(6)])
    prompt = encoder()(problem(images=(picture(rng, 56, 56),), videos=(video,), video_fps=(1.0,)))
    np.testing.assert_array_equal(prompt.grid_thw, [[1, 4, 4], [3, 4, 6]])
    assert len(prompt.patches) == 16 + 72
    pads = [encoder().tokenizer.convert_tokens_to_ids(f"<|{kind}_pad|>") for kind in ("image", "video")]
    assert [int((prompt.token_ids == pad).sum()) for pad in pads] == [4, 18]
    time = prompt.positions[0, prompt.token_ids == pads[1]].reshape(3, 6)
    np.testing.assert_array_equal(time - time[0], np.array([0, 4, 8])[:, None] + np.zeros(6, int))  # 2 s a grid, 2 a second


def test_bad_pictures_are_named():
    with pytest.raises(DataError, match=r"problem p1: 1 images of sizes 1x900 \(height x width\): .*aspect ratio.*crop"):
        encoder()(problem(images=(picture(np.random.default_rng(0), 1, 900),)))
    video = np.zeros((2, 28, 28, 3), np.uint8)
    for rates in [(0.0,), (1.0, 1.0)]:
        with pytest.raises(DataError, match="problem p1: video_fps .* for 1 videos"):
            encoder()(problem(videos=(video,), video_fps=rates))


def test_processors_survive_a_folder(tmp_path):
    text, pixels = digits.encoder().tokenizer, make_image_processor(*LIMITS)
    save_processors(tmp_path / "p", text, pixels)
    loaded, again = load_processors(tmp_path / "p")
    image = picture(np.random.default_rng(5), 300, 500)
    for a, b in zip(*(PromptEncoder(*pair)(problem(images=(image,))).patches for pair in [(text, pixels), (loaded, again)]),
                    strict=True):  # fmt: skip
        np.testing.assert_array_equal(a, b)
