"""The images of a chat: out of data URLs, or from hosts that are allowed. A path or any other address is never opened."""

import asyncio
import io
from collections.abc import Sequence

import httpx
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from ares_jax.service.chat import RefusedError
from data_pipeline.errors import DataError
from data_pipeline.images import data_url_bytes, on_white

_FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP")  # Pillow's others start programs (EPS) or are seldom tested
_TIMEOUT = 10.0  # seconds for one image from a host


async def encoded_images(urls: Sequence[str], *, hosts: Sequence[str], max_bytes: int) -> list[bytes]:
    """Returns the encoded bytes of the images at `urls`.

    Raises `RefusedError`: 422 for what is no data URL, or a host that is not allowed or does not answer, 413 for more
    than `max_bytes` in all from hosts.
    """
    images, left = [], max_bytes
    for url in urls:
        if url.startswith(("http://", "https://")):
            images.append(await _fetched(url, hosts, left))
            left -= len(images[-1])
        else:
            try:
                images.append(data_url_bytes(url))
            except DataError as error:
                raise RefusedError(422, str(error), field="messages") from None
    return images


def decode_all(encoded: Sequence[bytes], *, max_pixels: int) -> list[UInt8[np.ndarray, "H W 3"]]:
    """Returns the RGB pixels of the images (first frames), at most `max_pixels` in all.

    Raises `RefusedError`: 413 beyond them, before anything is decoded; 422 for what is no image.
    """
    try:
        opened = [Image.open(io.BytesIO(data), formats=_FORMATS) for data in encoded]
        pixels = sum(image.width * image.height for image in opened)
        if pixels > max_pixels:
            raise RefusedError(
                413, f"images of {pixels} pixels, the limit is {max_pixels}; scale them down", field="messages"
            )
        return [on_white(image) for image in opened]
    except RefusedError:
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        reason = "" if "BytesIO" in str(error) else f" ({error})"
        raise RefusedError(422, f"not a readable image of {', '.join(_FORMATS)}{reason}", field="messages") from None


async def _fetched(url: str, hosts: Sequence[str], max_bytes: int) -> bytes:
    try:
        host = httpx.URL(url).host  # as the client that fetches it reads it: two parsers may see two hosts
    except (httpx.InvalidURL, ValueError):
        host = None
    if host not in hosts:
        raise RefusedError(
            422, f"image_url: images are not fetched from {str(host)[:80]!r}; send a data URL, or allow the host in "
            "sampler.image_hosts", field="messages",
        )  # fmt: skip
    parts, size = [], 0
    try:
        async with (
            asyncio.timeout(_TIMEOUT),  # of the whole: httpx's own is for each piece
            httpx.AsyncClient(timeout=_TIMEOUT) as client,
            client.stream("GET", url) as answer,
        ):
            if answer.status_code != 200:  # a redirect too: it could lead anywhere
                raise RefusedError(422, f"image_url: {host} answered {answer.status_code}", field="messages")
            async for part in answer.aiter_bytes():
                size += len(part)
                if size > max_bytes:
                    raise RefusedError(413, f"image_url: more than {max_bytes} bytes from {host}", field="messages")
                parts.append(part)
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, TimeoutError) as error:
        raise RefusedError(422, f"image_url: {host}: {str(error) or type(error).__name__}", field="messages") from None
    return b"".join(parts)
