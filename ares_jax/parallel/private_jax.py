"""All that this project takes from JAX's private modules: a new JAX release is checked against this file."""

from typing import Any

from jax._src import distributed
from jax._src.clusters import cloud_tpu_cluster

# What `jax.distributed.initialize` asks for the number of a process.
TPU_CLUSTERS = (cloud_tpu_cluster.GkeTpuCluster, cloud_tpu_cluster.GceTpuCluster)


def coordination_client() -> Any:
    """Returns the client of JAX's coordination service, which has no public name; None in a process alone."""
    return distributed.global_state.client
