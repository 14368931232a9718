"""Images in every form that data sets ship them, damaged ones, and videos."""

import base64
import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from data_pipeline.errors import DataError
from data_pipeline.images import decode_image, from_data_url, read_image, read_video, to_data_url

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 9, 3), np.uint8)


def encoded(pixels=PIXELS, kind="PNG", **options):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=kind, **options)
    return buffer.getvalue()


def test_every_form_gives_the_same_pixels(tmp_path):
    data = encoded()
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.png").write_bytes(data)
    for value in (
        data, {"bytes": data, "path": "gone.png"}, {"bytes": None, "path": "sub/a.png"}, "sub/a.png",
        str(tmp_path / "sub" / "a.png"), to_data_url(PIXELS), base64.b64encode(data).decode(), PIXELS,
    ):  # fmt: skip
        np.testing.assert_array_equal(read_image(value, [tmp_path / "sub", tmp_path]), PIXELS)
    grey = PIXELS[:, :, :1]
    np.testing.assert_array_equal(read_image(grey), np.repeat(grey, 3, axis=2))
    np.testing.assert_array_equal(read_image(encoded(grey[:, :, 0])), np.repeat(grey, 3, axis=2))


@pytest.mark.parametrize(
    "value, message",
    [
        ("gone.png", "no such file in /"), ("data:image/png;base64,AAAA", "not a readable image"),
        ("data:text/plain,x", "not an image data URL"), ("data:image/png;base64,?", "bad image data URL"),
        ("no base64!", "neither a file nor base64"), (None, "not NoneType"), ({"bytes": None}, "not NoneType"),
        (3, "not int"), (np.zeros((2, 2, 3)), "uint8"), (np.zeros((2, 2, 4), np.uint8), "uint8"),
    ],
)  # fmt: skip
def test_what_is_no_image_is_named(value, message, tmp_path):
    with pytest.raises(DataError, match=message):
        read_image(value, [tmp_path])


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"]), st.data())
def test_damage_raises_a_data_error_or_nothing(kind, data):
    good = bytearray(encoded(kind=kind))
    for _ in range(data.draw(st.integers(1, 6))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    cut = good[: data.draw(st.integers(0, len(good)))]
    try:
        pixels = decode_image(bytes(cut))
    except DataError:
        return
    assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3


def test_base64_as_long_as_a_file_name_may_not_be_but_a_path_may(tmp_path):
    comment = PngInfo()
    comment.add_text("t", "x" * 240)
    texts = {n: base64.b64encode(encoded(PIXELS[:n, :1], pnginfo=comment)).decode() for n in range(1, 12)}
    n, text = next((n, text) for n, text in texts.items() if 255 < len(text.partition("/")[0]) and len(text) < 1024)
    np.testing.assert_array_equal(read_image(text, [tmp_path]), PIXELS[:n, :1])


def test_a_file_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(encoded())
    monkeypatch.setattr("pathlib.Path.read_bytes", lambda path: (_ for _ in ()).throw(PermissionError(13, "not allowed")))
    with pytest.raises(DataError, match="a.png cannot be read .not allowed"):
        read_image("a.png", [tmp_path])


def test_a_video_is_a_list_of_frames_or_an_animated_file():
    frames = [np.full((8, 6, 3), value, np.uint8) for value in (0, 120, 240)]
    images = [Image.fromarray(frame) for frame in frames]
    buffer = io.BytesIO()
    images[0].save(buffer, format="WEBP", save_all=True, append_images=images[1:], lossless=True)
    for value in (frames, [encoded(frame) for frame in frames], buffer.getvalue()):
        np.testing.assert_array_equal(read_video(value), np.stack(frames))
    with pytest.raises(DataError, match="frames of one size"):
        read_video([frames[0], PIXELS])
    with pytest.raises(DataError, match="frames of one size"):
        read_video([])


def test_data_urls_round_trip():
    np.testing.assert_array_equal(from_data_url(to_data_url(PIXELS)), PIXELS)
