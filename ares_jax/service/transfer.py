"""Weights from a learner on another host through JAX's transfer server: the learner offers arrays, the sampler fetches them.

Both do it with arrays in the host's memory, so that it does not matter over which devices either has split its parameters.
Both listen on the one address by which they reach each other, and on no other.
"""

import functools
import secrets
import socket
import threading
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from ares_jax.errors import UserError

FAILED = 424  # HTTP status where arrays did not come: what the request depends on, the caller's offer, failed
_REACHED = 5.0  # seconds to reach a port
_PAUSE = 0.01  # seconds between two looks whether arrays have come
_starting = threading.Lock()  # two samplers may be given weights at the same time


class TransferError(Exception):
    """The arrays cannot be offered, or did not come."""


def require() -> None:
    """Raises `UserError` unless this JAX has a transfer server, and devices in the host's memory."""
    try:
        from jax.experimental import transfer  # noqa: F401

        _host_devices()
    except (ImportError, RuntimeError) as error:  # JAX_PLATFORMS may leave the CPU out
        raise UserError(
            f"sampler.transfers=True needs jax.experimental.transfer and JAX's CPU backend ({_one_line(error)}): "
            "set JAX_PLATFORMS=tpu,cpu or such, or leave --config.sampler.transfers=False"
        ) from None


def offer(flat: Mapping[str, np.ndarray], address: str) -> dict[str, Any]:
    """Returns what a sampler that reaches this host at `address` must be told to fetch `flat` once: port, number, and what
    the arrays are.

    What nobody fetches stays until the process ends: JAX cannot withdraw an offer. Raises `TransferError` if there can be
    no server at that address.
    """
    try:
        server, place = _server(address), _host_devices()[0]
        arrays = {name: jax.device_put(np.ascontiguousarray(value), place) for name, value in sorted(flat.items())}
        number = secrets.randbits(62)  # who does not know it cannot fetch
        server.await_pull(number, list(arrays.values()))
    except (ImportError, RuntimeError, OSError) as error:
        raise TransferError(_one_line(error)) from None
    tensors = {name: {"dtype": str(x.dtype), "shape": x.shape} for name, x in arrays.items()}
    return {"port": int(server.address().rpartition(":")[2]), "number": number, "tensors": tensors}


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
        raise TransferError(f"the learner's arrays did not come ({_one_line(error)})") from None
    return dict(zip(sorted(specs), arrays, strict=True))


def _host_devices() -> list[jax.Device]:
    return jax.local_devices(backend="cpu")


def _server(address: str) -> Any:
    with _starting:
        return _started(address)


@functools.cache
def _started(address: str) -> Any:
    from jax.experimental import transfer

    if "%" in address:
        raise OSError(f"{address} is link-local: JAX would listen on all addresses")
    listen = f"{_bracketed(address)}:0"
    return transfer.start_transfer_server(_host_devices()[0].client, listen, [listen])


def _one_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _bracketed(address: str) -> str:
    return f"[{address}]" if ":" in address else address
