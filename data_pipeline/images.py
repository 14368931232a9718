"""Images and videos, in every form that data sets ship them, as RGB pixels; and images as data URLs."""

import base64
import binascii
import errno
import io
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageSequence

from data_pipeline.errors import DataError

_LONGEST_PATH = 1024  # a longer string is base64


def to_data_url(image: UInt8[np.ndarray, "H W 3"]) -> str:
    """Returns the image as `data:image/png;base64,...`."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def decode_image(data: bytes) -> UInt8[np.ndarray, "H W 3"]:
    """Returns the RGB pixels of an encoded image, as `on_white` does. Raises `DataError` if Pillow cannot read all of it."""
    return decode_frames(data, limit=1)[0]


def decode_frames(data: bytes, *, limit: int | None = None) -> UInt8[np.ndarray, "F H W 3"]:
    """Returns the frames (the first `limit`) of an encoded image: GIF, WebP and PNG may be animated. Raises `DataError`."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return np.stack([on_white(frame) for frame in islice(ImageSequence.Iterator(image), limit)])
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files: struct.error, IndexError, ...
        raise DataError(f"not a readable image ({error})") from None


def from_data_url(url: str) -> UInt8[np.ndarray, "H W 3"]:
    """Returns the RGB pixels of a base64 data URL. Raises `DataError` if it is none."""
    return decode_image(data_url_bytes(url))


def read_image(value: Any, folders: Sequence[Path] = ()) -> UInt8[np.ndarray, "H W 3"]:
    """Returns the RGB pixels of an image in any form that data sets use.

    Args:
      value: encoded bytes; a path, relative to one of `folders`; a data URL; base64; a mapping with `bytes` or `path`
        (Hugging Face's image feature); or pixels [H, W], [H, W, 1] or [H, W, 3], uint8.

    Raises:
      DataError: it is none of these, is not there, or is damaged.
    """
    if isinstance(value, np.ndarray):
        return _rgb(value)
    return decode_image(_encoded(value, folders))


def read_video(value: Any, folders: Sequence[Path] = ()) -> UInt8[np.ndarray, "F H W 3"]:
    """Returns the frames of a video: a list of images, as `read_image` takes them, or one animated GIF, WebP or PNG.

    Raises:
      DataError: as `read_image`, or frames of different sizes. Other containers: extract the frames first.
    """
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        frames = [read_image(frame, folders) for frame in value]
        if not frames or len({frame.shape for frame in frames}) > 1:
            raise DataError(f"a video needs frames of one size, not {sorted({frame.shape[:2] for frame in frames})}")
        return np.stack(frames)
    return decode_frames(_encoded(value, folders))


def _encoded(value: Any, folders: Sequence[Path]) -> bytes:
    if isinstance(value, Mapping):
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value)
    if not isinstance(value, str) or not value:
        raise DataError(f"an image must be bytes, a path, a data URL, base64 or pixels, not {type(value).__name__}")
    if value.startswith("data:"):
        return data_url_bytes(value)
    if len(value) < _LONGEST_PATH:
        for folder in folders:
            try:
                if (folder / value).is_file():
                    return (folder / value).read_bytes()
            except OSError as error:
                if error.errno != errno.ENAMETOOLONG:  # no path then: base64
                    raise DataError(f"{folder / value} cannot be read ({error.strerror})") from None
        if Path(value).suffix:
            raise DataError("no such file" + "".join(f" in {folder}" for folder in dict.fromkeys(folders)))
    try:
        return base64.b64decode(value, validate=True)
    except binascii.Error as error:
        raise DataError(f"neither a file nor base64 ({error})") from None


def data_url_bytes(url: str) -> bytes:
    """Returns the encoded image in a base64 data URL. Raises `DataError` if it is none."""
    header, _, payload = url.partition(",")
    if not header.startswith("data:image/") or not header.endswith(";base64"):
        raise DataError(f"not an image data URL: {url[:40]!r}; expected data:image/<type>;base64,...")
    try:
        return base64.b64decode(payload, validate=True)
    except ValueError as error:  # binascii.Error, or characters beyond ASCII
        raise DataError(f"bad image data URL: {error}") from None


def on_white(image: Image.Image) -> UInt8[np.ndarray, "H W 3"]:
    """Returns the RGB pixels of an opened image; what is transparent shows white, as transformers' processors have it."""
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return np.asarray(image.convert("RGB"))


def _rgb(pixels: np.ndarray) -> UInt8[np.ndarray, "H W 3"]:
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] not in (1, 3) or not pixels.size:
        raise DataError(f"pixels must be uint8 [H, W, 1 or 3], not {pixels.dtype} {list(pixels.shape)}")
    return np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels
