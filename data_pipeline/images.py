"""Images as data URLs and back."""

import base64
import io

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from data_pipeline.errors import DataError


def to_data_url(image: UInt8[np.ndarray, "H W 3"]) -> str:
    """Returns the image as `data:image/png;base64,...`."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def decode_image(data: bytes) -> UInt8[np.ndarray, "H W 3"]:
    """Returns the RGB pixels of an encoded image. Raises `DataError` if Pillow cannot read it."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"not a readable image ({error})") from None


def from_data_url(url: str) -> UInt8[np.ndarray, "H W 3"]:
    """Returns the RGB pixels of a base64 data URL. Raises `DataError` if it is none."""
    header, _, payload = url.partition(",")
    if not header.startswith("data:image/") or not header.endswith(";base64"):
        raise DataError(f"not an image data URL: {url[:40]!r}; expected data:image/<type>;base64,...")
    try:
        return decode_image(base64.b64decode(payload, validate=True))
    except ValueError as error:
        raise DataError(f"bad image data URL: {error}") from None
