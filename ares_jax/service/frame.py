"""A frame: plain values and arrays as bytes. Rollouts travel in frames, requests and answers alike.

    magic "ARESJAX\\n" | version, uint32 | bytes of the header, uint32 | bytes of the whole frame, uint64
    header: JSON {"fields": plain values, "arrays": {name: [type, shape, offset]}}
    arrays: little-endian, row by row, each at a multiple of 8 bytes from the frame's start

All numbers are little-endian. Arrays are read where they lie in the bytes, without a copy.
"""

import json
import math
import struct
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

MEDIA_TYPE = "application/x-ares-frame"
_MAGIC, _VERSION, _ALIGNMENT, _MOST_SIZES = b"ARESJAX\n", 1, 8, 4
_START = struct.Struct("<8sIIQ")
_DTYPES = ("int32", "float32", "bool", "uint8")
LARGEST_HEADER = 2**24  # bytes


class FrameError(ValueError):
    """Bytes that are no frame of ours. The message names the value, the limit and the remedy."""


class Frame(NamedTuple):
    fields: dict[str, Any]
    arrays: dict[str, np.ndarray]


def encode(fields: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> bytes:
    """Returns the frame of plain values (JSON) and arrays of int32, float32, bool or uint8."""
    described = {name: [array.dtype.name, list(array.shape), 0] for name, array in arrays.items()}
    room = len(_header(fields, described)) + 24 * len(arrays)  # an offset takes no more digits than that
    end = _aligned(_START.size + room)
    begin = end
    for (name, array), entry in zip(arrays.items(), described.values(), strict=True):
        if array.dtype.name not in _DTYPES:
            raise FrameError(f"array {name} has type {array.dtype}; a frame takes {', '.join(_DTYPES)}")
        entry[2], end = end, _aligned(end + array.nbytes)
    header = _header(fields, described).ljust(begin - _START.size)
    parts = [_START.pack(_MAGIC, _VERSION, len(header), end), header]
    for array in arrays.values():
        data = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
        parts += [data, bytes(-len(data) % _ALIGNMENT)]
    return b"".join(parts)


def decode(data: bytes | memoryview) -> Frame:
    """Returns what a whole frame holds. Raises `FrameError` before anything as large as a number in it is made."""
    total = total_bytes(data, limit=len(data))
    if total != len(data):
        raise FrameError(f"{len(data)} bytes, but the frame says that it has {total}; send it whole and nothing behind it")
    _, _, size, _ = _START.unpack_from(data)
    begin = _START.size + size
    if begin > total or size > LARGEST_HEADER:
        raise FrameError(f"a header of {size} bytes in a frame of {total}; at most {LARGEST_HEADER}, and it must fit")
    try:
        header = json.loads(bytes(data[_START.size : begin]))
        fields, described = header["fields"], header["arrays"]
        if not (isinstance(fields, dict) and isinstance(described, dict)):
            raise TypeError
        entries = [(name, dtype, tuple(shape), offset) for name, (dtype, shape, offset) in described.items()]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise FrameError('the header is not JSON of {"fields": {...}, "arrays": {name: [type, shape, offset]}}') from None
    for name, dtype, shape, offset in entries:
        whole = [n for n in (*shape, offset) if isinstance(n, int) and not isinstance(n, bool) and n >= 0]
        if dtype not in _DTYPES or len(whole) <= len(shape) or len(shape) > _MOST_SIZES:
            said = f"array {name[:40]} is {str(dtype)[:20]} {str(shape)[:60]} at {str(offset)[:20]}"
            raise FrameError(f"{said}; give {', '.join(_DTYPES)}, at most {_MOST_SIZES} sizes and a place")
    arrays, free = {}, begin
    for name, dtype, shape, offset in sorted(entries, key=lambda entry: entry[3]):
        end = offset + math.prod(shape) * np.dtype(dtype).itemsize
        if offset < free or offset % _ALIGNMENT or end > total:
            raise FrameError(
                f"array {name[:40]} lies at bytes {offset} to {end} of a frame of {total}; those from {free} on are free, "
                f"and arrays follow each other, at multiples of {_ALIGNMENT}"
            )
        arrays[name], free = np.frombuffer(data, dtype, math.prod(shape), offset).reshape(shape), end
    return Frame(fields, arrays)


def total_bytes(start: bytes | bytearray | memoryview, *, limit: int) -> int:
    """Returns the length that a frame says it has. Raises `FrameError` if the bytes begin none, or it is above `limit`."""
    if len(start) < _START.size:
        raise FrameError(f"{len(start)} bytes are no frame, which begins with {_START.size}; send it whole")
    magic, version, _, total = _START.unpack_from(start)
    if magic != _MAGIC:
        raise FrameError(f"bytes that begin with {magic!r} are no frame, which begins with {_MAGIC!r}; see {MEDIA_TYPE}")
    if version != _VERSION:
        raise FrameError(f"a frame of version {version}, this release reads {_VERSION}; use the same release on both sides")
    if not _START.size <= total <= limit:
        raise FrameError(f"a frame of {total} bytes, the limit is {limit}; send it whole, or in portions")
    return total


class FrameStream:
    """Takes a stream of frames apart, whatever pieces it comes in."""

    def __init__(self, limit: int):
        """`limit`: bytes of a frame."""
        self._buffer, self._limit = bytearray(), limit

    def feed(self, piece: bytes) -> Iterator[Frame]:
        """Yields the frames that are whole now. Raises `FrameError` as `decode` does."""
        self._buffer += piece
        while len(self._buffer) >= _START.size:
            if len(self._buffer) < (total := total_bytes(self._buffer[: _START.size], limit=self._limit)):
                return
            whole = bytes(self._buffer[:total])
            del self._buffer[:total]
            yield decode(whole)


def _header(fields: Mapping[str, Any], described: Mapping[str, Any]) -> bytes:
    return json.dumps({"fields": fields, "arrays": described}, separators=(",", ":")).encode()


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGNMENT) * _ALIGNMENT
