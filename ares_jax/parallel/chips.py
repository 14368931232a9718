"""Datasheet numbers of accelerators: what a plan and the MFU metric divide by. Nothing here was measured by us.

TPUs: cloud.google.com/tpu/docs (v4, v5e, v5p, v6e, tpu7x), GPUs: NVIDIA's data sheets, dense bfloat16.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax


@dataclass(frozen=True)
class Chip:
    """One JAX device: a TPU chip, half a chip of tpu7x, or a GPU."""

    flops: float  # bfloat16 operations a second
    hbm: float  # GiB
    bandwidth: float  # bytes a second, of its memory
    link: float  # bytes a second that it can send to its neighbours, all links together
    usable: float  # GiB of `hbm` that programs get: from libtpu 0.0.51; on a GPU with XLA_PYTHON_CLIENT_MEM_FRACTION=.95
    unit: str = "chips"  # what one is called


TPUS = {
    "v4": Chip(275e12, 32, 1228e9, 300e9, 30.75),
    "v5e": Chip(197e12, 16, 819e9, 200e9, 15.75),
    "v5p": Chip(459e12, 95, 2765e9, 600e9, 95.0),
    "v6e": Chip(918e12, 32, 1640e9, 400e9, 31.2),
    "tpu7x": Chip(1153e12, 96, 3690e9, 300e9, 94.7, "half chips"),
}

# Of the sockets with NVLink (SXM); what it can send is half of what is given for both ways.
GPUS = {
    "a100": Chip(312e12, 79.3, 2039e9, 300e9, 75.3, "GPUs"),
    "h100": Chip(989e12, 79.1, 3352e9, 450e9, 75.1, "GPUs"),
    "h200": Chip(989e12, 141.0, 4800e9, 450e9, 133.9, "GPUs"),
    "b200": Chip(2250e12, 178.4, 7672e9, 900e9, 169.4, "GPUs"),
}
BETWEEN_HOSTS = 50e9  # bytes a second that a GPU can send to another host: 400 Gbit/s of InfiniBand each, as in DGX


def chip_of(topology: str) -> Chip:
    """Returns what a slice such as "v5p:2x2x2", or GPUs such as "h200:8" or "h200:4x8" (hosts x GPUs), is made of.

    Where there are several hosts of GPUs, all of the network is taken to be as slow as that between them.
    """
    kind, _, shape = topology.partition(":")
    if kind in TPUS:
        return TPUS[kind]
    return replace(GPUS[kind], link=BETWEEN_HOSTS) if "x" in shape and not shape.startswith("1x") else GPUS[kind]


# By a word of `jax.Device.device_kind`, the more special first.
_PEAK_FLOPS = {
    "TPU v4": 275e12, "TPU v5 lite": 197e12, "TPU v5e": 197e12, "TPU v5": 459e12, "TPU v6": 918e12, "TPU7x": 1153e12,
    "A100": 312e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H200 NVL": 835e12, "H100": 989e12, "H200": 989e12,
    "GB200": 2500e12, "B200": 2250e12,
}  # fmt: skip


def peak_flops(device_kind: str) -> float | None:
    """Returns the bfloat16 operations a second of a kind of device; None for one not in the table, such as a CPU."""
    return next((flops for name, flops in _PEAK_FLOPS.items() if name in device_kind), None)


def utilization(flops: float, seconds: float, devices: Sequence[jax.Device]) -> dict[str, float]:
    """Returns {"mfu": share of the devices' peak} of `flops` done by all of them in `seconds`; {} where no peak is known."""
    peak = peak_flops(devices[0].device_kind)
    return {"mfu": flops / (seconds * peak * len(devices))} if peak else {}
