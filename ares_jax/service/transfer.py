"""Weights from a learner on another host through JAX's transfer server: the learner offers arrays, the sampler fetches them.

Both do it with arrays in the host's memory, so that it does not matter over which devices either has split its parameters.
Both listen on the one address by which they reach each other, and on no other.
"""

import contextlib
import functools
import secrets
import socket
import time
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

import jax
import numpy as np

_REACHED = 5.0  # seconds to reach a port
_PAUSE = 0.01  # seconds between two looks whether arrays have come


class TransferError(Exception):
    """The arrays did not come."""


def available() -> bool:
    """Returns whether this JAX has a transfer server, and devices in the host's memory."""
    try:
        from jax.experimental import transfer  # noqa: F401

        return bool(_host_devices())
    except (ImportError, RuntimeError):  # JAX_PLATFORMS may leave the CPU out
        return False


@contextlib.contextmanager
def offered(flat: Mapping[str, np.ndarray], url: str) -> Iterator[dict[str, Any]]:
    """Yields what the sampler at `url` must be told to fetch `flat` once: port, number, and what the arrays are.

    What nobody fetches stays until the process ends: JAX cannot withdraw an offer.
    """
    number = secrets.randbits(62)  # who does not know it cannot fetch
    server = _server(_address_towards(url))
    arrays = {name: jax.device_put(np.ascontiguousarray(value), _host_devices()[0]) for name, value in sorted(flat.items())}
    server.await_pull(number, list(arrays.values()))
    tensors = {name: {"dtype": str(x.dtype), "shape": x.shape} for name, x in arrays.items()}
    yield {"port": int(server.address().rpartition(":")[2]), "number": number, "tensors": tensors}


def fetch(
    specs: Mapping[str, jax.ShapeDtypeStruct], number: int, *, peer: str, port: int, local: str, seconds: float
) -> dict[str, jax.Array]:
    """Returns the arrays that `peer` offers under this number, in the host's memory.

    `local`: this host's own address as the peer sees it. Raises `TransferError` if they do not come in time.
    """
    place = jax.sharding.SingleDeviceSharding(_host_devices()[0])
    wanted = [jax.ShapeDtypeStruct(specs[name].shape, specs[name].dtype, sharding=place) for name in sorted(specs)]
    deadline = time.monotonic() + seconds
    try:
        socket.create_connection((peer, port), timeout=_REACHED).close()  # the transfer server itself would wait for ever
        arrays = _server(local).connect(f"{_bracketed(peer)}:{port}").pull(number, wanted)
        while not all(x.is_ready() for x in arrays):
            if time.monotonic() > deadline:
                raise TransferError(f"the learner's arrays did not come in {seconds:.0f} s")
            time.sleep(_PAUSE)
        jax.block_until_ready(arrays)
    except (RuntimeError, ValueError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise TransferError(f"the learner's arrays did not come ({reason})") from None
    return dict(zip(sorted(specs), arrays, strict=True))


def _host_devices() -> list[jax.Device]:
    return jax.local_devices(backend="cpu")


@functools.cache
def _server(address: str) -> Any:
    from jax.experimental import transfer

    listen = f"{_bracketed(address)}:0"
    return transfer.start_transfer_server(_host_devices()[0].client, listen, [listen])


def _address_towards(url: str) -> str:
    """Returns this host's own address on the way to `url`. Nothing is sent."""
    parts = urlsplit(url)
    family, kind, protocol, _, target = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(target)
        return probe.getsockname()[0]


def _bracketed(address: str) -> str:
    return f"[{address}]" if ":" in address else address
