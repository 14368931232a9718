"""Slices side by side: a config as the trainers take it there, and a line that compares it."""

from functools import reduce

from ml_collections import ConfigDict

from ares_jax.models.qwen2_5_vl import Qwen25VLConfig
from ares_jax.parallel.chips import chip_of
from ares_jax.parallel.micro_batch import check_rows, row_count
from ares_jax.parallel.sharding import mesh_sizes
from ares_jax.planning import aot
from ares_jax.planning.rooflines import GIB, Rate, bound, kernel_flops, throughput

COLUMNS = (
    f"{'slice':<12} {'chips':>5} {'data':>4} {'fsdp':>5} {'seq':>3} {'tens':>4} {'rows':>5}  {'remat':<7} {'GiB':>6} "
    f"{'of HBM':>6} {'TFLOP':>6} {'GB moved':>8} {'GB sent':>7}  {'ms arithmetic/memory/network':>28} {'tokens/s':>9} "
    f"{'MFU':>9}"
)


def compared(config: ConfigDict, shape: Qwen25VLConfig, name: str) -> tuple[Rate | None, str]:
    """Returns the bounds of a slice's gradient step and the line that shows it."""
    devices, chip = aot.topology_devices(name), chip_of(name)
    h, p = config.mesh, aot.without_code(config, shape, name)
    start = (
        f"{name:<12} {len(devices):>5} {h.data:>4} {h.fsdp:>5} {h.sequence:>3} {h.tensor:>4} {config.packing.rows:>5}  "
        f"{config.model.remat:<7}"
    )
    if p.refused:
        return None, f"{start} too large: {p.refused}"
    kernels = kernel_flops(config, shape, len(devices), devices[0].platform)["more"]
    times = "/".join(f"{1e3 * x:.0f}" for x in bound(p, kernels, chip))
    rate = throughput(config, shape, {"more": p}, chip, len(devices))
    return rate, (
        f"{start} {p.peak / GIB:>6.1f} {p.peak / GIB / chip.hbm:>6.0%} {(p.work.flops + kernels) / 1e12:>6.0f} "
        f"{p.work.bytes / 1e9:>8.0f} {sum(p.work.collective.values()) / 1e9:>7.1f}  {times:>28} "
        + (f"{rate.tokens:>9.0f} {rate.mfu_one_by_one:>4.0%}-{rate.mfu:.0%}" if rate else "does not fit")
        + (f"; {p.work.unknown_loops} loops not counted" if p.work.unknown_loops else "")
    )


def on_slice(config: ConfigDict, chips: int, hosts: int) -> ConfigDict:
    """Returns the config as the trainers take it there: no axis is -1, and `packing.rows` not 0.

    Raises `UserError` where they would.
    """
    check_rows(config, chips, hosts)
    c = config.copy_and_resolve_references()
    c.mesh.update(mesh_sizes(chips, **c.mesh))
    c.packing.rows = row_count(c.packing.rows, c.mesh)
    return c


def overrides(config: ConfigDict, given: ConfigDict) -> str:
    """Returns the flags that make `config` of the given one: those of the mesh, of rows and remat."""
    fields = [*(f"mesh.{axis}" for axis in config.mesh), "packing.rows", "model.remat"]
    ours, theirs = ([reduce(getattr, field.split("."), c) for field in fields] for c in (config, given))
    return " ".join(f"--config.{f}={x}" for f, x, other in zip(fields, ours, theirs, strict=True) if x != other)
