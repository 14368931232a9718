"""A run of several processes: JAX's own runtime starts them; here is what their hosts tell each other.

Every process calls these functions in the same order, from its main thread. With one process they cost nothing.
"""

import functools
import itertools
import math
import os
import pickle
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Shaped

from ares_jax.errors import UserError
from ares_jax.parallel.private_jax import TPU_CLUSTERS

T = TypeVar("T")

# Where a cluster says which of how many tasks a process is.
_TASKS = (("SLURM_PROCID", "SLURM_NTASKS"), ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"))

_PIECE = 2**28  # bytes
_joined = False  # with other processes


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    heartbeat_timeout: int = 100,
) -> None:
    """Joins the processes of the run: found on Cloud TPU, SLURM, Kubernetes and Open MPI, or given.

    Outside of these there is one process and nothing to do; `num_processes` 1 says so inside of them.

    Args:
      coordinator_address: host:port of process 0.
      num_processes: of the run.
      process_id: number of this process, from 0.
      heartbeat_timeout: seconds of silence after which a process is lost, and all end.

    Raises:
      UserError: some but not all of the first three are given, or the processes do not find each other.
    """
    global _joined
    named = {"coordinator_address": coordinator_address, "num_processes": num_processes, "process_id": process_id}
    given: dict[str, Any] = {name: value for name, value in named.items() if value is not None}
    if num_processes == 1:
        return
    if given and len(given) < 3:
        raise UserError(f"--{next(iter(given))} alone; give --coordinator_address, --num_processes and --process_id")
    # None restricted. JAX takes any task of SLURM or Open MPI for one of many on its host, and would give it one GPU.
    devices: dict[str, Any] = {"local_device_ids": []} if _one_a_host(os.environ) else {}
    try:
        jax.distributed.initialize(**given, **devices, heartbeat_timeout_seconds=heartbeat_timeout)
        _joined = True
    except Exception as error:  # gRPC's own types, and whatever a cluster's detection raises
        if not given and "coordinator_address should be defined" in str(error):
            return  # no cluster
        reason = str(error).strip().splitlines()[0][:200]
        raise UserError(
            f"the processes of the run did not find each other ({reason}); give --coordinator_address, --num_processes "
            "and --process_id, or --num_processes=1 to run alone"
        ) from None


def _one_a_host(environment: Mapping[str, str]) -> bool:
    """Returns whether SLURM or Open MPI has started one process on every host."""
    if "SLURM_STEP_NUM_NODES" in environment:
        return environment["SLURM_STEP_NUM_NODES"] == environment.get("SLURM_NTASKS")
    return environment.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"


def require_alone(command: str) -> None:
    """Raises `UserError` if this process is one of several, as its devices say: those of a TPU slice know all hosts."""
    if jax.process_count() > 1:
        raise UserError(
            f"{command} is one process, and this is number {jax.process_index()} of {jax.process_count()}: run it on one "
            "host, with --num_processes=1; on a host of a larger TPU slice with TPU_PROCESS_BOUNDS=1,1,1 and "
            "TPU_CHIPS_PER_PROCESS_BOUNDS set to its own chips, such as 2,2,1"
        )


def task(num_processes: int | None = None, process_id: int | None = None) -> tuple[int, int]:
    """Returns the number of this process, and of how many: as given, or by SLURM, Open MPI or a TPU slice; else (0, 1).

    For a command that does not join the others: it looks at no device, and at the network (Google's metadata server) only
    on a machine that has TPUs.

    Raises:
      UserError: the metadata server of a TPU VM does not say.
    """
    if num_processes is not None:
        return process_id or 0, num_processes
    for number, count in _TASKS:
        if number in os.environ and count in os.environ:
            all_of_them = os.environ[count]
            return int(os.environ[number]), int(all_of_them)
    try:
        for cluster in TPU_CLUSTERS:
            if cluster.is_env_present():
                return cluster.get_process_id(), cluster.get_process_count()
    except (OSError, RuntimeError, ValueError) as error:  # requests' errors are OSErrors
        raise UserError(
            f"this machine has TPUs, and does not say which of its slice it is ({error}); give --num_processes=1 to the one "
            "that is to do this"
        ) from None
    return 0, 1


def is_alone() -> bool:
    """Returns whether the run is this one process."""
    return not _joined or jax.process_count() == 1


def is_first() -> bool:
    """Returns whether this process writes what the run writes once: metrics, reports, logs."""
    return not _joined or jax.process_index() == 0  # a process alone need not hold its devices to know


def barrier(name: str) -> None:
    """Returns once every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def gather(value: T) -> list[T]:
    """Returns what each process gave, in their order. For picklable host data; it goes through the devices' network."""
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(pickle.dumps(value), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(len(data), np.int64)).reshape(-1)
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: len(data)] = data
    rows = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(sizes), -1)
    return [pickle.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def share(items: Sequence[T]) -> Sequence[T]:
    """Returns this process's items: i, i + n, ... of n processes."""
    return items[jax.process_index() :: jax.process_count()]


def interleaved(parts: Sequence[Sequence[T]]) -> list[T]:
    """Returns what `share` took apart, in its first order."""
    return [part[i] for i in range(max(map(len, parts))) for part in parts if i < len(part)]


def put(value: Any, sharding: NamedSharding | None) -> jax.Array:
    """Returns an array that every process holds whole, laid out over devices of all of them."""
    if sharding is None or sharding.is_fully_addressable:
        return jax.device_put(value, sharding)
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        return jax.device_put(value, sharding)
    whole = np.asarray(value)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


def piece_shape(shape: Sequence[int], dtype: Any, sharding: Any) -> tuple[int, ...]:
    """Returns how much of an array every device holds whole at a time while it is handed over.

    At most 256 MiB, but at least one index of the first axis that is not split (a layer of a stack); all of an array whose
    every axis is split, or that every device holds whole anyway.
    """
    spec = (*getattr(sharding, "spec", ()), *(None for _ in shape))
    axis = next((axis for axis, size in enumerate(shape) if size > 1 and not spec[axis]), None)
    if axis is None or sharding.is_fully_replicated:
        return tuple(shape)
    one = math.prod(shape) // shape[axis] * np.dtype(dtype).itemsize
    return *shape[:axis], min(shape[axis], max(1, _PIECE // one)), *shape[axis + 1 :]


@functools.partial(jax.jit, static_argnames=("shape", "sharding"))
def _cut(value: jax.Array, start: Sequence[int], *, shape: tuple[int, ...], sharding: NamedSharding) -> jax.Array:
    """`sharding`: the value's. Without it the compiler would gather first and cut then."""
    piece = jax.lax.with_sharding_constraint(jax.lax.dynamic_slice(value, start, shape), sharding)
    return jax.lax.with_sharding_constraint(piece, NamedSharding(sharding.mesh, PartitionSpec()))


@functools.partial(jax.jit, donate_argnums=0)
def _put_in(whole: jax.Array, piece: jax.Array, start: Sequence[int]) -> jax.Array:
    return jax.lax.dynamic_update_slice(whole, piece, start)


def _pieces(value: jax.Array) -> Iterator[tuple[tuple[int, ...], jax.Array]]:
    """Yields an array piece by piece: where it starts, and the piece, whole, on each of the array's devices.

    It waits: the devices never hold more than one piece whole in vain, and on CPUs, whose programs do not run in the order
    in which they were started, two exchanges at a time would wait for each other.
    """
    if value.sharding.is_fully_replicated:
        yield (0,) * value.ndim, value
        return
    shape = piece_shape(value.shape, value.dtype, value.sharding)
    for start in itertools.product(*(range(0, size, part) for size, part in zip(value.shape, shape, strict=True))):
        # The last piece is as large as the others, so that one program cuts them all: some of it comes twice.
        start = tuple(min(i, size - part) for i, size, part in zip(start, value.shape, shape, strict=True))
        yield start, jax.block_until_ready(_cut(value, start, shape=shape, sharding=value.sharding))


def local_parts(value: jax.Array, sharding: NamedSharding) -> jax.Array:
    """Returns a copy of an array, laid out over devices of this host that hold a part of it: no disk, no host memory."""
    places = sharding.addressable_devices_indices_map(value.shape)
    first = {device: [s.start or 0 for s in index or ()] for device, index in places.items()}
    ours = sharding.shard_shape(value.shape)
    parts: dict[jax.Device, jax.Array] = {}
    for start, piece in _pieces(value):
        whole = {shard.device: shard.data for shard in piece.addressable_shards}
        for device, origin in first.items():
            low = [max(a, b) for a, b in zip(start, origin, strict=True)]
            ends = zip(start, piece.shape, origin, ours, strict=True)
            high = [min(a + size, b + part) for a, size, b, part in ends]
            if any(a >= b for a, b in zip(low, high, strict=True)):
                continue
            cut = tuple(slice(a - s, b - s) for a, b, s in zip(low, high, start, strict=True))
            own = whole[device][cut]
            if own.shape == ours:
                parts[device] = own.copy()  # all of it may be the very array
                continue
            so_far = parts[device] if device in parts else jnp.zeros(ours, value.dtype, device=device)
            parts[device] = _put_in(so_far, own, [a - b for a, b in zip(low, origin, strict=True)])
        jax.block_until_ready(list(parts.values()))
    return jax.make_array_from_single_device_arrays(value.shape, sharding, [parts[device] for device in places])


def to_host(value: jax.Array) -> np.ndarray:
    """Returns an array, whole, in this host's memory."""
    if value.is_fully_addressable:
        return np.asarray(value)
    whole = np.empty(value.shape, value.dtype)
    for start, piece in _pieces(value):
        place = tuple(slice(a, a + size) for a, size in zip(start, piece.shape, strict=True))
        whole[place] = np.asarray(piece.addressable_data(0))
    return whole


def local_rows(value: jax.Array) -> Shaped[np.ndarray, "B ..."]:
    """Returns this process's rows of an array that is split by rows, as `Placement.put_batch` took them."""
    rows = {shard.index[0].start or 0: shard.data for shard in value.addressable_shards}
    return np.concatenate([np.asarray(rows[start]) for start in sorted(rows)])


def joint_position(state: Mapping[str, int]) -> dict[str, int]:
    """Returns the state of a stream whose every process has taken what the farthest has: of all processes' elements."""
    return {"position": max(gather(state["position"])) * jax.process_count()}


def own_position(state: Mapping[str, int]) -> dict[str, int]:
    """Returns this process's state from `joint_position`'s, which may come from another number of processes."""
    return {"position": -(-state["position"] // jax.process_count())}
