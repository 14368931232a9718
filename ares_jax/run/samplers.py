"""Where a run's rollouts are drawn: in a service, or in the learner's own processes."""

import jax
from ml_collections import ConfigDict

from ares_jax.errors import UserError
from ares_jax.parallel.sharding import make_mesh


def colocated(config: ConfigDict) -> bool:
    """Returns whether rollouts are drawn in the learner's own processes: if they shall be, or if there is no other way.

    On a TPU or a GPU a second process would find the devices, or their memory, taken.
    """
    s = config.sampler
    return s.colocated or (not s.url and jax.default_backend() != "cpu")


def sampler_mesh(config: ConfigDict) -> jax.sharding.Mesh:
    """Returns the first `sampler.tensor` devices of this host as a mesh. Raises `UserError` if there are fewer."""
    count, devices = config.sampler.tensor, jax.local_devices()
    if not 1 <= count <= len(devices):
        raise UserError(f"sampler.tensor={count}: this host has {len(devices)} devices; give 1 to {len(devices)}")
    return make_mesh(tensor=count, devices=devices[:count])
