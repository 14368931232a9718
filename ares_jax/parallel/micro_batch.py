"""Whether a run's batches can be split over its devices and processes: asked before anything is drawn, and by `plan`."""

import math
from collections.abc import Mapping

from ml_collections import ConfigDict

from ares_jax.errors import UserError
from ares_jax.parallel.sharding import BATCH, mesh_sizes


def row_count(rows: int, mesh: Mapping[str, int]) -> int:
    """Returns the rows of a micro-batch, of all processes: `packing.rows`, or one for every part they are split into."""
    return rows or math.prod(mesh[axis] for axis in BATCH)


def check_rows(config: ConfigDict, devices: int, processes: int) -> None:
    """Raises `UserError` where a micro-batch cannot be split over the mesh and the processes, or halved so often."""
    p, mesh = config.packing, mesh_sizes(devices, **config.mesh)
    parts = math.prod(mesh[axis] for axis in BATCH)
    if p.rows < 0 or p.rows % parts:
        raise UserError(
            f"packing.rows={p.rows} cannot be split over mesh data x fsdp = {parts}; make it a multiple of {parts}, or 0: "
            "a row for each"
        )
    if parts % processes:
        raise UserError(
            f"mesh data x fsdp = {parts} cannot be split over {processes} processes: a row would lie on two hosts; make "
            f"mesh.sequence x mesh.tensor at most the {devices // processes} devices of a process"
        )
    most = p.row_tokens.bit_length() - 1  # to one token
    if not 0 <= p.halvings <= most:
        raise UserError(f"packing.halvings={p.halvings}: packing.row_tokens={p.row_tokens} can be halved 0 to {most} times")


def share_of(count: int, setting: str, processes: int) -> int:
    """Returns a process's part of what all of them have together. Raises `UserError` if it is no whole number."""
    if count < 1 or count % processes:
        raise UserError(f"{setting}={count} cannot be split over {processes} processes; make it a multiple")
    return count // processes
