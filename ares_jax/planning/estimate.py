"""A learner step's memory and traffic from the sharding rules alone: too rough to trust, quick enough to choose by."""

import functools
import math
from collections.abc import Mapping
from typing import NamedTuple

from jax.sharding import AbstractMesh

from ares_jax.models.flops import Flops, gradient_flops
from ares_jax.models.qwen2_5_vl import Qwen25VLConfig
from ares_jax.models.qwen2_5_vl.model import abstract_model
from ares_jax.parallel.chips import Chip
from ares_jax.parallel.sharding import MESH_AXES, param_shardings
from ares_jax.params import count_parameters, to_flat


class Estimate(NamedTuple):
    """Of one chip and one micro-batch."""

    memory: float  # bytes
    compute: float  # seconds
    network: float  # seconds

    @property
    def seconds(self) -> float:
        """The network not hidden behind arithmetic."""
        return self.compute + self.network


def estimate(
    shape: Qwen25VLConfig,
    mesh: Mapping[str, int],
    *,
    remat: str,
    rows: int,
    row_tokens: int,
    row: Flops,
    chip: Chip,
    copies: float = 20.0,
) -> Estimate:
    """Returns what the gradients of a micro-batch need.

    Args:
      row: operations of a forward pass over a row.
      copies: bytes a parameter: itself, two moments and its gradient in float32, and the reference.
    """
    t = shape.text
    parameters, held = _parameters(shape, tuple(mesh[axis] for axis in MESH_AXES))
    chips, split = math.prod(mesh.values()), mesh["fsdp"] * mesh["sequence"]
    tensor, sequence = mesh["tensor"], mesh["sequence"]
    tokens = rows / (mesh["data"] * mesh["fsdp"]) * row_tokens / sequence  # of a chip, their width whole
    inner, kv = t.intermediate_size / tensor, 2 * t.num_kv_heads * t.head_dim
    heads = t.num_heads * t.head_dim / tensor
    dots = 3 * t.hidden_size + kv + 2 * heads + 2 * inner
    kept = {"offload": 0.0, "full": t.hidden_size, "dots": dots, "none": 2 * dots}[remat]
    logits = 3 * 4 * 1024 * t.vocab_size / tensor
    one_layer = 2 * (3 * t.hidden_size * t.intermediate_size + 2 * t.hidden_size**2) * 2 / tensor
    memory = copies * held + 2 * t.num_layers * tokens * kept + 6 * dots * tokens
    memory += logits + one_layer + 2 * 2 * t.vocab_size * t.hidden_size / tensor
    sent = 2 * parameters / tensor * (split - 1) / split * 3  # gathered forwards and backwards, gradients scattered
    sent += 4 * 2 * parameters / (split * tensor) * (mesh["data"] - 1) / mesh["data"]  # float32 gradients, both ways
    passes = 3 if remat in ("full", "offload") else 2
    width = 2 * t.num_layers * tokens
    sent += 2 * passes * 2 * width * t.hidden_size * (tensor - 1) / tensor
    sent += (passes + 1) * width * kv * (sequence - 1)
    flops = sum(gradient_flops(row, remat=remat)) * rows / chips
    return Estimate(memory, flops / chip.flops, sent / chip.link)


@functools.cache
def _parameters(shape: Qwen25VLConfig, sizes: tuple[int, ...]) -> tuple[int, int]:
    """Returns how many parameters there are, and how many of them a chip of a mesh of these sizes holds.

    That is more than its share where an axis of the mesh does not divide an array: 512 do not divide the tower's 1280.
    """
    model = abstract_model(shape)
    flat, places = to_flat(model), param_shardings(model, AbstractMesh(sizes, MESH_AXES))
    return count_parameters(flat), sum(math.prod(places[name].shard_shape(x.shape)) for name, x in flat.items())
