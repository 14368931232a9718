"""One table says over which axes of the mesh each logical axis of an array is split; nothing else in the code knows."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Shaped

from ares_jax.errors import UserError
from ares_jax.parallel.distributed import put
from ares_jax.params import logical_axes, to_flat

MESH_AXES = ("data", "fsdp", "sequence", "tensor")
BATCH = ("data", "fsdp")  # rows of a batch are split over both

RULES: dict[str, tuple[str, ...]] = {
    # of parameters
    "layers": (), "rank": (), "patch": (), "embed": ("fsdp", "sequence"), "vision": ("fsdp", "sequence"),
    "vocab": ("tensor",),
    "heads": ("tensor",), "kv_heads": ("tensor",), "mlp": ("tensor",), "vision_heads": ("tensor",),
    "vision_mlp": ("tensor",),
    # of activations; tokens are attended to by all others of their row, so there keys and values are gathered
    "rows": BATCH, "tokens": ("sequence",), "attended_tokens": ("sequence", "tensor"), "width": (),
}  # fmt: skip


def mesh_sizes(devices: int, *, data: int = 1, fsdp: int = -1, sequence: int = 1, tensor: int = 1) -> dict[str, int]:
    """Returns the axes of a mesh over so many devices. One may be -1 and takes what the others leave.

    Raises `UserError` if they do not fill the devices.
    """
    sizes = [data, fsdp, sequence, tensor]
    known = math.prod(size for size in sizes if size > 0)
    if sizes.count(-1) == 1 and devices % known == 0:
        sizes[sizes.index(-1)] = devices // known
    if math.prod(sizes) != devices or min(sizes) < 1:
        given = f"mesh data={data} fsdp={fsdp} sequence={sequence} tensor={tensor}"
        raise UserError(f"{given} does not fill {devices} devices; one axis may be -1: what the others leave")
    return dict(zip(MESH_AXES, sizes, strict=True))


def make_mesh(
    *, data: int = 1, fsdp: int = -1, sequence: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """Returns a mesh over all devices, host by host; the axes are those of `mesh_sizes`."""
    # A row's devices are neighbours, and must be of one host.
    devices = sorted(jax.devices() if devices is None else devices, key=lambda device: device.process_index)
    sizes = mesh_sizes(len(devices), data=data, fsdp=fsdp, sequence=sequence, tensor=tensor)
    return Mesh(np.array(devices).reshape(list(sizes.values())), MESH_AXES)


def platform() -> str:
    """Returns "cpu", "gpu" or "tpu": that of the mesh in use (`jax.set_mesh`), which may not be this machine's."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device is not None else jax.default_backend()


def split_over(axis: str | None, size: int, mesh: Any) -> tuple[str, ...]:
    """Returns the axes of the mesh that split a logical axis of this size: as many of its rule as divide it."""
    axes = tuple(name for name in RULES[axis] if mesh.shape.get(name, 1) > 1) if axis else ()
    while axes and size % math.prod(mesh.shape[name] for name in axes):
        axes = axes[:-1]
    return axes


def mesh_axes(axis: str, size: int) -> dict[str, int]:
    """Returns the axes of the mesh in use that split a logical axis of this size, with their sizes."""
    mesh = jax.sharding.get_abstract_mesh()
    return {name: mesh.shape[name] for name in split_over(axis, size, mesh)}


def constrain(x: Shaped[Array, "..."], *axes: str) -> Shaped[Array, "..."]:
    """Keeps an activation split over the mesh in use as the rules say for its logical axes; without a mesh, as it is."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    spec = [tuple(mesh_axes(axis, size)) or None for axis, size in zip(axes, x.shape, strict=True)]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def param_shardings(model: nnx.Module, mesh: Mesh | AbstractMesh) -> dict[str, NamedSharding]:
    """Returns where each parameter lives. A mesh axis that does not divide an array's axis is left out there."""
    shapes = to_flat(model)
    shardings = {}
    for name, axes in logical_axes(model).items():
        sizes = shapes[name].shape
        spec = [split_over(axis, size, mesh) or None for axis, size in zip(axes, sizes, strict=True)]
        shardings[name] = NamedSharding(mesh, PartitionSpec(*spec))
    return shardings


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch: rows over `data` and `fsdp`, everything else whole."""
    return NamedSharding(mesh, PartitionSpec(BATCH))


@dataclass(frozen=True)
class Placement:
    """Where everything of a training step lives."""

    mesh: Mesh
    params: Mapping[str, NamedSharding]

    def abstract(self, tree: Any) -> Any:
        """Returns the shapes of a tree (parameters, moments, counters), each with its sharding.

        What hangs under a parameter's name and has its shape lies where the parameter lies; all else is everywhere.
        """
        everywhere = NamedSharding(self.mesh, PartitionSpec())

        def place(path, leaf):
            name = next((key.key for key in reversed(path) if isinstance(key, jax.tree_util.DictKey)), None)
            sharding = self.params.get(name, everywhere)
            fits = len(leaf.shape) >= len(sharding.spec)
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding if fits else everywhere)

        return jax.tree_util.tree_map_with_path(place, tree)

    def put(self, params: Mapping[str, Any]) -> dict[str, jax.Array]:
        """Returns the parameters on their devices."""
        return {name: put(value, self.params[name]) for name, value in params.items()}

    def put_batch(self, batch: Mapping[str, Any]) -> dict[str, jax.Array]:
        """Returns a batch with its rows split over the mesh; each process gives its own rows of it.

        Raises `UserError` if they cannot be split evenly, over devices and over processes.
        """
        sharding, parts = batch_sharding(self.mesh), math.prod(self.mesh.shape[axis] for axis in BATCH)
        processes = 1 if sharding.is_fully_addressable else jax.process_count()
        rows = len(next(iter(batch.values()))) * processes
        if rows % parts:
            raise UserError(
                f"packing.rows={rows} cannot be split over mesh data x fsdp = {parts}; make it a multiple of {parts}"
            )
        if parts % processes:
            raise UserError(
                f"mesh data x fsdp = {parts} cannot be split over {processes} processes: a row would lie on two hosts; "
                "make mesh.tensor at most the devices of a host"
            )
        if processes == 1:
            return jax.device_put(dict(batch), sharding)
        return {name: jax.make_array_from_process_local_data(sharding, np.asarray(value)) for name, value in batch.items()}


def place_model(model: nnx.Module, mesh: Mesh) -> Placement:
    """Returns where the parameters of a model (which may be abstract) live on a mesh."""
    return Placement(mesh, param_shardings(model, mesh))
