"""The weights that the engine draws with, and those that wait to be."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from ares_jax.params import check_flat
from ares_jax.sampling.programs import cut_layers


class Policy:
    """Weights by their flat names, where the engine has them, with their version."""

    def __init__(self, flat: Mapping[str, jax.Array], version: int):
        self.version = version
        self.specs = {n: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=v.sharding) for n, v in flat.items()}
        self.params = _arranged(flat)
        self._coming: tuple[dict[str, Any], int] | None = None

    @property
    def waits(self) -> bool:
        """Whether other weights have been staged."""
        return self._coming is not None

    def stage(self, flat: Mapping[str, jax.Array | np.ndarray], version: int) -> None:
        """Keeps weights until `commit`. Raises `UserError` and changes nothing if they do not fit."""
        check_flat(self.specs, flat)
        self._coming = dict(flat), version

    def commit(self) -> None:
        """Takes the weights that were staged last."""
        assert self._coming is not None
        (flat, version), self._coming = self._coming, None
        self.params = _arranged(
            {n: jax.device_put(flat[n].astype(old.dtype, copy=False), old.sharding) for n, old in self.specs.items()}
        )
        self.version = version


def mesh_of(flat: Mapping[str, jax.Array]) -> Mesh | None:
    """Returns the mesh over which parameters are split, if they are."""
    mesh = getattr(next(iter(flat.values())).sharding, "mesh", None)
    return mesh if mesh is not None and mesh.size > 1 else None


def _arranged(flat: Mapping[str, jax.Array]) -> Mapping[str, Any]:
    """Returns parameters in the form that decodes fastest where they live."""
    device = next(iter(next(iter(flat.values())).devices()))
    return flat if device.platform == "tpu" else cut_layers(flat)
