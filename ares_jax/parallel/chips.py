"""Datasheet numbers of accelerators: what a plan and the MFU metric divide by. Nothing here was measured by us.

TPUs: cloud.google.com/tpu/docs (v4, v5e, v5p, v6e, tpu7x), GPUs: NVIDIA's data sheets, dense bfloat16.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax


@dataclass(frozen=True)
class Chip:
    """One JAX device: a TPU chip, half a chip of tpu7x, or a GPU."""

    flops: float  # bfloat16 operations a second
    hbm: int  # GiB
    bandwidth: float  # bytes a second, of its memory
    link: float  # bytes a second that it can send to its neighbours, all links together
    usable: float  # GiB of `hbm` that the compiler (libtpu 0.0.51) gives to programs
    unit: str = "chips"  # what one is called


TPUS = {
    "v4": Chip(275e12, 32, 1228e9, 300e9, 30.75),
    "v5e": Chip(197e12, 16, 819e9, 200e9, 15.75),
    "v5p": Chip(459e12, 95, 2765e9, 600e9, 95.0),
    "v6e": Chip(918e12, 32, 1640e9, 400e9, 31.2),
    "tpu7x": Chip(1153e12, 96, 3690e9, 300e9, 94.7, "half chips"),
}

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
