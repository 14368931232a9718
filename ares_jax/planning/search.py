"""Looks for a better mesh: settings of the learner ranked by estimate, the best of them compiled."""

import itertools
from collections.abc import Generator, Iterator

from ml_collections import ConfigDict

from ares_jax.models.qwen2_5_vl import Qwen25VLConfig
from ares_jax.models.qwen2_5_vl.layers import REMAT
from ares_jax.parallel.chips import Chip, chip_of
from ares_jax.planning import aot
from ares_jax.planning.estimate import Estimate, estimate
from ares_jax.planning.rooflines import GIB, assumptions, row_flops
from ares_jax.planning.slices import COLUMNS, compared, overrides


def candidates(config: ConfigDict, shape: Qwen25VLConfig, chips: int, hosts: int) -> Iterator[ConfigDict]:
    """Yields configs with other meshes, remat policies and micro-batches that fill the slice, and that the trainers take."""
    shares = ((t, s, d) for t in (1, 2, 4, 8) for s in (1, 2, 4, 8) for d in (1, 2, 4, 8))
    for tensor, sequence, data in shares:
        parts = tensor * sequence * data
        if chips % parts or parts > chips // 2 or tensor * sequence > chips // hosts or shape.text.num_heads % tensor:
            continue
        for rows, remat in itertools.product((1, 2, 4), REMAT):
            c = config.copy_and_resolve_references()
            c.mesh.update(data=data, fsdp=chips // parts, sequence=sequence, tensor=tensor)
            c.packing.rows = rows * data * c.mesh.fsdp
            c.model.remat = remat
            yield c


def _estimate(config: ConfigDict, shape: Qwen25VLConfig, chip: Chip) -> Estimate:
    p = config.packing
    return estimate(
        shape, config.mesh, remat=config.model.remat, rows=p.rows, row_tokens=p.row_tokens, row=row_flops(config, shape),
        chip=chip,
    )  # fmt: skip


def with_shorter_rows(config: ConfigDict) -> ConfigDict | None:
    """Returns the config with rows half as long, and with answers that fit in them; None where no prompt would."""
    c = config.copy_and_resolve_references()
    p, s = c.packing, c.sampler
    p.update(row_tokens=p.row_tokens // 2, row_patches=p.row_patches // 2)
    room = p.row_tokens - s.max_prompt_tokens
    if room <= 0 or p.row_patches < s.max_prompt_patches:
        return None
    s.max_response_tokens = min(s.max_response_tokens, room)
    return c


def search(config: ConfigDict, shape: Qwen25VLConfig, name: str, compiled: int) -> Iterator[str]:
    """Yields the learner's settings that may fit, the quickest estimate first, then the best of them as compiled.

    Where none fits, the same with rows half as long.
    """
    yield assumptions(chip_of(name))
    while not (yield from _search_rows(config, shape, name, compiled)):
        shorter = with_shorter_rows(config)
        if shorter is None:
            yield f"{name}: no shorter row holds a prompt (sampler.max_prompt_tokens, max_prompt_patches); take more chips"
            return
        config, p = shorter, shorter.packing
        yield (
            f"\nshorter rows: --config.packing.row_tokens={p.row_tokens} --config.packing.row_patches={p.row_patches} "
            f"--config.sampler.max_response_tokens={config.sampler.max_response_tokens}"
        )


def _search_rows(config: ConfigDict, shape: Qwen25VLConfig, name: str, compiled: int) -> Generator[str, None, bool]:
    """Searches with rows as long as they are. Returns whether a setting fits; without compiling, whether one may."""
    devices, chip = aot.topology_devices(name), chip_of(name)
    found = []
    every = list(candidates(config, shape, len(devices), aot.host_count(devices)))
    for c in every:
        e = _estimate(c, shape, chip)
        if e.memory < chip.usable * GIB:
            found.append((c.packing.rows * c.packing.row_tokens / e.seconds, c, e))
    found.sort(key=lambda x: -x[0])
    fitting = len(found)
    best = {tuple(c.mesh.values()): (rate, c, e) for rate, c, e in reversed(found)}  # of each mesh
    found = sorted(best.values(), key=lambda x: -x[0])
    if not found:
        yield f"{name}: none of {len(every)} settings fits {len(devices)} {chip.unit}"
        return False
    yield f"{name}, {len(devices)} {chip.unit}: {len(every)} settings, {fitting} may fit by estimate. The best of each mesh:"
    yield (
        f"{'data':>4} {'fsdp':>5} {'seq':>4} {'tensor':>6} {'rows':>5}  {'remat':<8} {'GiB':>6} {'ms arithmetic':>14} "
        f"{'network':>8} {'tokens/s':>10}, one after the other"
    )
    for rate, c, e in found[:12]:
        h = c.mesh
        yield (
            f"{h.data:>4} {h.fsdp:>5} {h.sequence:>4} {h.tensor:>6} {c.packing.rows:>5}  {c.model.remat:<8} "
            f"{e.memory / GIB:>6.1f} {1e3 * e.compute:>14.0f} {1e3 * e.network:>8.0f} {rate:>10.0f}\n"
            f"      {overrides(c, config)}"
        )
    if not compiled:
        return True
    yield f"\nas compiled, a micro-batch's gradients, the best first\n{COLUMNS}"
    lines = []
    for _, c, _ in found[:compiled]:
        bounds, text = compared(c, shape, name)
        lines.append((bounds.mfu_one_by_one if bounds else 0.0, f"{text}\n      {overrides(c, config)}"))
    lines.sort(key=lambda x: -x[0])
    yield from (text for _, text in lines)
    return lines[0][0] > 0
