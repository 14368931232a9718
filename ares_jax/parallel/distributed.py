"""A run of several processes: JAX's own runtime starts them; here is what their hosts tell each other.

Every process calls these functions in the same order, from its main thread. With one process they cost nothing.
"""

import os
import pickle
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from absl import flags
from jax._src.clusters import cloud_tpu_cluster  # what jax.distributed.initialize asks
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Shaped

from ares_jax.errors import UserError

T = TypeVar("T")

# Where a cluster says which of how many tasks a process is.
_TASKS = (("SLURM_PROCID", "SLURM_NTASKS"), ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"))

_joined = False  # with other processes
_COORDINATOR = flags.DEFINE_string("coordinator_address", None, "host:port of process 0; found by itself on TPU and SLURM")
_COUNT = flags.DEFINE_integer("num_processes", None, "processes of the run, all given the same command", 1)
_INDEX = flags.DEFINE_integer("process_id", None, "number of this process, from 0", 0)
_HEARTBEAT = flags.DEFINE_integer("heartbeat_timeout", 100, "seconds of silence after which a process is lost: all end", 2)


def initialize() -> None:
    """Joins the processes of the run: found on Cloud TPU, SLURM, Kubernetes and Open MPI, or told by flags.

    Outside of these there is one process and nothing to do; `--num_processes=1` says so inside of them.

    Raises:
      UserError: some but not all flags are given, or the processes do not find each other.
    """
    global _joined
    given: dict[str, Any] = {flag.name: flag.value for flag in (_COORDINATOR, _COUNT, _INDEX) if flag.value is not None}
    if _COUNT.value == 1:
        return
    if given and len(given) < 3:
        raise UserError(f"--{next(iter(given))} alone; give --coordinator_address, --num_processes and --process_id")
    # None restricted. JAX takes any task of SLURM or Open MPI for one of many on its host, and would give it one GPU.
    devices: dict[str, Any] = {"local_device_ids": []} if _one_a_host(os.environ) else {}
    try:
        jax.distributed.initialize(**given, **devices, heartbeat_timeout_seconds=_HEARTBEAT.value)
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


def task() -> tuple[int, int]:
    """Returns the number of this process, and of how many, by flags, SLURM, Open MPI or a TPU slice; (0, 1) elsewhere.

    For a command that does not join the others: it looks at no device, and at the network (Google's metadata server) only
    on a machine that has TPUs.

    Raises:
      UserError: the metadata server of a TPU VM does not say.
    """
    if _COUNT.value is not None:
        return _INDEX.value or 0, _COUNT.value
    for number, count in _TASKS:
        if number in os.environ and count in os.environ:
            all_of_them = os.environ[count]
            return int(os.environ[number]), int(all_of_them)
    try:
        for cluster in (cloud_tpu_cluster.GkeTpuCluster, cloud_tpu_cluster.GceTpuCluster):
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


def _everywhere(value: jax.Array) -> jax.Array:
    """Returns an array, whole, on each of its devices.

    It waits: the devices never hold more than one array whole in vain, and on CPUs, whose programs do not run in the order
    in which they were started, two exchanges at a time would wait for each other.
    """
    mesh = getattr(value.sharding, "mesh", None)
    return value if mesh is None else jax.block_until_ready(jax.device_put(value, NamedSharding(mesh, PartitionSpec())))


def local_parts(value: jax.Array, sharding: NamedSharding) -> jax.Array:
    """Returns a copy of an array, laid out over devices of this host that hold a part of it: no disk, no host memory."""
    whole = {shard.device: shard.data for shard in _everywhere(value).addressable_shards}
    parts = [whole[device][index] for device, index in sharding.addressable_devices_indices_map(value.shape).items()]
    parts = jax.block_until_ready([part.copy() for part in parts])  # all of it may be the very array
    return jax.make_array_from_single_device_arrays(value.shape, sharding, parts)


def to_host(value: jax.Array) -> np.ndarray:
    """Returns an array, whole, in this host's memory."""
    return np.asarray(value if value.is_fully_addressable else _everywhere(value).addressable_data(0))


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
