"""Pixels of images, kept as compressed bytes and cut into patches when somebody asks: beside the device, not before.

Patches are float32 and show a still image's pixels twice (the model looks at pairs of frames): eight times its bytes.
"""

import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

_FRAMES_SHOWN = 2  # in a patch


class Cut(NamedTuple):
    """Patches of one image or video."""

    patches: int
    frames: int  # different ones of each patch: 1 of a still image


class PixelPatches:
    """P patches [P, V] of a prompt's images and videos, in their order. NumPy sees a float32 array, made anew each time."""

    dtype = np.dtype(np.float32)

    def __init__(
        self, data: bytes | UInt8[np.ndarray, "N"], cuts: Sequence[Cut], table: Float[np.ndarray, "C 256"], values: int
    ):
        """Args:
          data: values 0 to 255 in the order of the patches, each [C, frames, pixels]; compressed (zlib) if it is smaller.
          cuts: of each image.
          table: of each colour, the float32 that each value becomes.
          values: V, of a patch.
        """
        held: Any = data
        self.data = np.frombuffer(held, np.uint8)
        self.cuts, self.table = tuple(Cut(*cut) for cut in cuts), table
        self.shape = (sum(cut.patches for cut in self.cuts), values)

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes that are held."""
        return self.data.nbytes

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Float[np.ndarray, "P V"]:
        raw, begin = self.raw(), 0
        out = np.empty(self.shape, np.float32)
        done = 0
        for (count, frames), size in zip(self.cuts, self._sizes(), strict=True):
            pixels = raw[begin : begin + size].reshape(count, len(self.table), frames, -1)
            shown = out[done : done + count].reshape(count, len(self.table), -1, pixels.shape[-1])
            for colour, values in enumerate(self.table):
                shown[:, colour] = values[pixels[:, colour]]  # a still image is shown in every frame
            begin, done = begin + size, done + count
        return out if dtype is None else out.astype(dtype, copy=False)

    def __getitem__(self, key: Any) -> np.ndarray:
        return np.asarray(self)[key]

    def raw(self) -> UInt8[np.ndarray, "N"]:
        """Returns the values as they are, in the order of the patches. Raises `ValueError` if they are not as many."""
        expected = sum(self._sizes())
        if self.data.nbytes == expected:
            return self.data
        return np.frombuffer(_decompressed(self.data, expected), np.uint8)

    def image(self, index: int, rows: int, columns: int, *, merged: int = 2) -> UInt8[np.ndarray, "H W C"]:
        """Returns an image, or a video's first frame, of `rows` x `columns` patches, as the model sees it.

        `merged`: patches along a side of those that stand together as one token.
        """
        begin = sum(self._sizes()[:index])
        count, frames = self.cuts[index]
        colours = len(self.table)
        pixels = self.raw()[begin : begin + self._sizes()[index]].reshape(count, colours, frames, -1)[: rows * columns, :, 0]
        side = round(pixels.shape[-1] ** 0.5)
        grid = pixels.reshape(rows // merged, columns // merged, merged, merged, colours, side, side)
        return grid.transpose(0, 2, 5, 1, 3, 6, 4).reshape(rows * side, columns * side, colours)

    def _sizes(self) -> list[int]:
        """Bytes of each image, not compressed."""
        per_frame = self.shape[1] // _FRAMES_SHOWN
        return [cut.patches * cut.frames * per_frame for cut in self.cuts]


def pixel_patches(
    items: Sequence[UInt8[np.ndarray, "P C F S"]], table: Float[np.ndarray, "C 256"], values: int
) -> PixelPatches:
    """Returns the patches of images and videos from their pixels; P, F and S may differ."""
    raw = b"".join(np.ascontiguousarray(item).tobytes() for item in items)
    smaller = zlib.compress(raw, 1)
    data = smaller if len(smaller) < len(raw) else raw
    return PixelPatches(data, [Cut(len(item), item.shape[2]) for item in items], table, values)


def value_table(image_processor) -> Float[np.ndarray, "3 256"]:
    """Returns what an image processor makes of each value of each colour: its own arithmetic, so to the bit."""
    values = np.tile(np.arange(256, dtype=np.uint8)[None, :, None], (3, 1, 1))
    scaled = image_processor.rescale(values, image_processor.rescale_factor) if image_processor.do_rescale else values
    if image_processor.do_normalize:
        scaled = image_processor.normalize(scaled, image_processor.image_mean, image_processor.image_std)
    return np.asarray(scaled, np.float32)[:, :, 0]


def _decompressed(data: UInt8[np.ndarray, "N"], expected: int) -> bytes:
    machine = zlib.decompressobj()
    try:
        raw = machine.decompress(data.tobytes(), expected + 1)  # no more than that is made, whatever the data say
    except zlib.error as error:
        raise ValueError(f"pixels: {error}; send {expected} bytes, or the same compressed by zlib") from None
    if len(raw) != expected:
        raise ValueError(f"pixels: {len(raw)} bytes or more; send {expected}, or the same compressed by zlib")
    return raw
